"""log: the build log, one JSON line a task that was looked into (as Ninja's ``.ninja_log``)."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from cache.files import atomic, own

MAX_BYTES = 16 << 20
OUTCOMES = ("computed", "reused", "fetched", "failed")  # reused: from the action cache
# What a line can say: damage can make any number of it, which a page of a report would draw.
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        run: id of the invocation.
        task: the task's name.
        outcome: one of ``OUTCOMES``.
        why: what made it look.
        start: Unix time, seconds.
        seconds: wall time.
        bytes_read: through the store.
        bytes_written: through the store, what is packed included.
        thread: name of the thread.
    """

    run: str
    task: str
    outcome: str
    why: str
    start: _Seconds
    seconds: _Seconds
    bytes_read: _Bytes
    bytes_written: _Bytes
    thread: str


_LINE = msgspec.json.Decoder(Entry)


class Log:
    """The build log at ``path``. Appending is safe from threads and from processes.

    Attributes:
        listeners: are told each entry, one at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[Entry], None]] = []
        self._lock = threading.Lock()

    def add(self, entry: Entry) -> None:
        """Append a line; the oldest half goes when the log has grown past its bound."""
        line = json.dumps(asdict(entry), ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock:
            for listener in self.listeners:
                listener(entry)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode is one line, also beside another process.
            descriptor = own.open_own(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a killed run tore the last line: leave it behind
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
            if size > MAX_BYTES:
                self._trim()

    def entries(self) -> Iterator[Entry]:
        """Yield the lines, oldest first; but those that are torn, or another version's."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            with suppress(msgspec.DecodeError, RecursionError):
                yield _LINE.decode(line)

    def _trim(self) -> None:
        data = self.path.read_bytes()
        atomic.write(self.path, data[data.index(b"\n", len(data) // 2) + 1 :])

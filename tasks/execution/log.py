"""log: the build log, one JSON line a task that was looked into (as Ninja's ``.ninja_log``)."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.files import atomic

MAX_BYTES = 16 << 20
OUTCOMES = ("computed", "reused", "fetched", "failed")  # reused: from the action cache


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
    start: float
    seconds: float
    bytes_read: int
    bytes_written: int
    thread: str


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
        line = json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            for listener in self.listeners:
                listener(entry)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode is one line, also beside another process.
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
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
            try:
                yield Entry(**json.loads(line))
            except (ValueError, TypeError):
                continue

    def _trim(self) -> None:
        data = self.path.read_bytes()
        atomic.write(self.path, data[data.index(b"\n", len(data) // 2) + 1 :])

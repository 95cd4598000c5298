"""log: the build log: one JSON line for each task that was not up to date.

As Ninja's ``.ninja_log``.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from cache.files import atomic, own
from tasks.core.task_names import group_of, target_of

MAX_BYTES = 16 << 20
OUTCOMES = ("computed", "reused", "fetched", "failed")  # reused: from the action cache
# The bounds of what is believed: a damaged line may hold any number, and reports draw it.
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class Trace(NamedTuple):
    """When and where something was done.

    Attributes:
        machine: of a cluster, the machine's name; "" for this one.
        thread: the thread's name there.
        start: Unix time, seconds.
        seconds: wall time.
        bytes_read: through the store there.
        bytes_written: the same, with what is packed.
    """

    machine: str
    thread: str
    start: float
    seconds: float
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        run: id of the invocation.
        task: the task's name.
        outcome: one of ``OUTCOMES``.
        why: what made the task run.
        start: Unix time, seconds.
        seconds: wall time.
        bytes_read: through the store.
        bytes_written: through the store, with what is packed.
        thread: the thread's name.
        machine: of a cluster, the machine's name; "" for this one.
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
    machine: str = ""

    @classmethod
    def of(cls, run: str, task: str, outcome: str, why: str, trace: Trace) -> Entry:
        """Return the line for what was done in a way."""
        read, written = trace.bytes_read, trace.bytes_written
        start, seconds = trace.start, trace.seconds
        return cls(
            run, task, outcome, why, start, seconds, read, written, trace.thread, trace.machine
        )

    @property
    def lane(self) -> str:
        """The thread, with the machine if it is another."""
        return f"{self.machine}: {self.thread}" if self.machine else self.thread

    @property
    def group(self) -> str:
        """The group of the task."""
        return group_of(self.task)

    @property
    def target(self) -> str:
        """The target of the task; "" of one that is of all."""
        return target_of(self.task)


_LINE = msgspec.json.Decoder(Entry)


def parse(line: bytes) -> Entry | None:
    """Return the entry that a line holds, or None if it is torn or another version's."""
    try:
        return _LINE.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return None


class Log:
    """The build log at ``path``. Appending is safe from threads and from processes.

    Attributes:
        listeners: called with each new entry, one at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[Entry], None]] = []
        self._lock = threading.Lock()

    def add(self, entry: Entry) -> None:
        """Append a line; the oldest half goes when the log has grown past its bound."""
        record = asdict(entry)
        if not entry.machine:
            del record["machine"]
        line = json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
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
        """Yield the entries, oldest first, without lines that are torn or another version's."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        yield from filter(None, map(parse, lines))

    def _trim(self) -> None:
        data = self.path.read_bytes()
        atomic.write(self.path, data[data.index(b"\n", len(data) // 2) + 1 :])

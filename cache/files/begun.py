"""begun: files that a process has begun and of which no record tells yet, gone when it has ended.

```
.tmp-HOST-PID-…          held locked for as long as the process lives
.tmp-HOST-PID-…+NAME     the file NAME beside it is begun
```
A process number tells little of who lives: another container has others. A lock does, wherever the
folder is seen from; where there are none, what is left is garbage collection's to find.
"""

from __future__ import annotations

import fcntl
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from cache.files import atomic, own

_OF = "+"  # between a lock's name and that of a file


class Begun:
    """The files that this process has begun in a folder. Safe in threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._guard = threading.Lock()
        self._lock: Path | None = None
        self._end: Callable[[], object] = lambda: None
        self._marks: dict[Path, Path] = {}

    def begin(self, path: Path) -> None:
        """Make a file, empty, that goes if this process ends before ``keep``.

        Raises:
            FileExistsError: it is there.
        """
        with self._guard:
            if self._lock is None and (locked := _locked(self._folder)):
                self._lock, descriptor = locked
                self._end = weakref.finalize(self, _end, self._lock, descriptor, self._marks)
            if self._lock:
                mark = path.with_name(f"{self._lock.name}{_OF}{path.name}")
                mark.touch(exist_ok=False)
                self._marks[path] = mark
        path.touch(exist_ok=False)

    def keep(self, path: Path) -> None:
        """Let a file stay, whatever becomes of this process: a record will tell of it."""
        with self._guard:
            if mark := self._marks.pop(path, None):
                mark.unlink(missing_ok=True)
            if self._lock and not self._marks:
                self._end()
                self._lock = None


def _end(lock: Path, descriptor: int, marks: Mapping[Path, Path]) -> None:
    """Remove what is begun still, and let go of the lock: when all is kept, or at exit."""
    with suppress(OSError):  # what is left goes at the next start
        for path, mark in marks.items():
            path.unlink(missing_ok=True)
            mark.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what processes have begun that are gone."""
    for lock in (name for name in _temporary(folder) if _OF not in name):
        with suppress(OSError), (folder / lock).open("rb") as file:  # a later one tries again
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Only now is it known what is left: until then more may have been begun, or kept.
            for mark in (name for name in _temporary(folder) if name.startswith(f"{lock}{_OF}")):
                (folder / mark.removeprefix(f"{lock}{_OF}")).unlink(missing_ok=True)
                (folder / mark).unlink(missing_ok=True)
            (folder / lock).unlink(missing_ok=True)


def _temporary(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.startswith(atomic.TEMPORARY))
    except FileNotFoundError:
        return []


def _locked(folder: Path) -> tuple[Path, int] | None:
    """Make a file, and lock it; return its path and descriptor, or None where nothing can be."""
    while True:
        path = folder / f"{atomic.own_prefix()}{os.urandom(8).hex()}"
        descriptor = own.open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # else one that sweeps was faster
                return path, descriptor
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            return None
        os.close(descriptor)

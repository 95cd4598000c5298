"""atomic: whole files or nothing: written beside their place, then renamed into it."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

from cache.errors import naming
from cache.files import trash
from cache.files.durable import sync
from cache.files.space import enospc_as_no_room, require_free

TEMPORARY = ".tmp-"
SWEEP_SECONDS = 3600
STRANGE_SWEEP_SECONDS = 24 * 3600
USE_SECONDS = 3600  # how exactly files tell when they were last used
WRITE_BYTES = 256 << 10
_BEGUN = time.time_ns()  # another in a later process that has this one's number
_numbers = itertools.count()


class Temporary:
    """A new file that is about to be renamed into its place.

    Attributes:
        file: open to be written, unbuffered.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._renamed = False
        self.file: IO[bytes] = open(path, "xb", buffering=0)  # noqa: SIM115

    def rename(self, target: Path) -> None:
        """Let it be ``target``, in whose folder's place one is made if there is none."""
        try:
            os.replace(self._path, target)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._path, target)
        self._renamed = True

    def close(self) -> None:
        """Close it; unless it was renamed, it is gone.

        Raises:
            OSError: some disks say only now that they are full.
        """
        try:
            self.file.close()
        finally:
            if not self._renamed:
                with suppress(FileNotFoundError):
                    os.unlink(self._path)


@contextmanager
def temporary(folder: Path, need: int = 0) -> Iterator[Temporary]:
    """Open a new file in ``folder``; unless it was renamed meanwhile, it is gone afterwards.

    Args:
        folder: made if it is not there.
        need: bytes that will be written, if known: refused at once where there is no room.

    Raises:
        NoRoom: the disk is full.
    """
    path = f"{folder}/{own_prefix()}{_BEGUN}-{next(_numbers)}"
    with enospc_as_no_room(folder, need), naming(folder):
        try:
            new = Temporary(path)
        except FileNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
            new = Temporary(path)
        with closing(new):
            if need:
                require_free(folder, need)
            yield new


def write(path: Path, data: bytes | memoryview, *, durable: bool = False) -> None:
    """Make ``path`` hold exactly ``data``, or leave it as it was.

    The temporary file lies in the same folder, since only a rename within one file system is
    atomic.

    Args:
        path: the file.
        data: its bytes.
        durable: whether it is so after a power cut, too. Else that can leave a short file, or one
            of zeros, which readers must notice by its contents.

    Raises:
        NoRoom: the disk is full.
    """
    with temporary(path.parent, len(data)) as new:
        write_all(new.file, memoryview(data))
        if durable:
            os.fsync(new.file.fileno())
        new.rename(path)
    if durable:
        sync(path.parent)


def write_all(file: IO[bytes], data: memoryview, at: int = 0) -> None:
    """Write all of ``data`` to a file, from byte ``at`` on.

    In calls of ``WRITE_BYTES``: for longer ones Linux looks for memory in pieces as long, up to
    2 MiB, and those are what a virtual machine has given back to its host: ten times the copy.
    """
    while data:
        count = os.pwrite(file.fileno(), data[:WRITE_BYTES], at)
        data, at = data[count:], at + count


def own_prefix() -> str:
    """Return how this process's temporary names begin, so that others can tell whose they are."""
    return f"{TEMPORARY}{platform.node()}-{os.getpid()}-"


def touch(path: str | Path, mtime_ns: int) -> None:
    """Note that a file was used, in its mtime: access times are off on many systems (noatime).

    Args:
        path: the file.
        mtime_ns: its mtime; one of the last hour is left alone.
    """
    if time.time_ns() - mtime_ns > USE_SECONDS * 10**9:
        with suppress(OSError):  # somebody else's, or gone
            os.utime(path)


def sweep(folder: Path) -> None:
    """Remove temporary files that killed processes left."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if abandoned(path):
            trash.remove(path)


def abandoned(path: Path) -> bool:
    """Tell whether a temporary file's process was killed.

    Not within the hour: two containers can go by one machine's name. Of other machines nothing is
    known but the time, so that a day has to pass.
    """
    begin = f"{TEMPORARY}{platform.node()}-"
    process = path.name.removeprefix(begin).split("-")[0]
    ours = path.name.startswith(begin) and process.isdigit()
    if ours and _runs(int(process)):
        return False
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # renamed, or swept by somebody else
        return False
    return age >= (SWEEP_SECONDS if ours else STRANGE_SWEEP_SECONDS)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True

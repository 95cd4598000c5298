"""files: whole files or nothing: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

from cache.errors import NoRoom

TEMPORARY = ".tmp-"
# There is no call that only reads the umask, and setting it is not safe in threads: read it once.
_UMASK = os.umask(0)
os.umask(_UMASK)
MODE = 0o666 & ~_UMASK


class Stamp(NamedTuple):
    """What tells, without reading it, that a file is the one last seen."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> Stamp:
        """Return the stamp of the file at ``path``, links followed."""
        stat = os.stat(path)
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@contextmanager
def temporary(folder: Path, need: int = 0) -> Iterator[tuple[IO[bytes], str]]:
    """Open a new file in ``folder``; unless it was renamed meanwhile, it is gone afterwards.

    Args:
        folder: made if it is not there.
        need: bytes that will be written, if known: refused at once where there is no room.

    Raises:
        NoRoom: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if need:
        room(folder, need)
    prefix = f"{TEMPORARY}{platform.node()}-{os.getpid()}-"
    handle, name = tempfile.mkstemp(prefix=prefix, dir=folder)
    try:
        os.fchmod(handle, MODE)  # mkstemp makes files that nobody else can read
        with open(handle, "wb", buffering=0) as file:
            yield file, name
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(folder, need) from error
        raise
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def write(path: Path, data: bytes | memoryview) -> None:
    """Make ``path`` hold exactly ``data``, or leave it as it was.

    The temporary file lies in the same folder, since only a rename within one file system is
    atomic. No fsync: a power cut can leave a short file, which readers notice by its size or
    its contents.

    Raises:
        NoRoom: the disk is full.
    """
    with temporary(path.parent) as (file, name):
        left = memoryview(data)
        while left:  # one call writes 2 GiB at most
            left = left[file.write(left) :]
        os.replace(name, path)


def room(folder: Path, need: int) -> None:
    """Refuse to begin what the disk cannot take.

    Args:
        folder: where it will be written.
        need: bytes.

    Raises:
        NoRoom: there is less free.
    """
    if need > shutil.disk_usage(folder).free:
        raise no_room(folder, need)


def sweep(folder: Path) -> None:
    """Remove temporary files that processes of this machine left when they were killed."""
    for path in folder.glob(f"{TEMPORARY}{platform.node()}-*"):
        process = path.name.removeprefix(f"{TEMPORARY}{platform.node()}-").split("-")[0]
        if process.isdigit() and not _runs(int(process)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def no_room(folder: Path, need: int) -> NoRoom:
    """Return the error that says so."""
    free = shutil.disk_usage(folder).free
    needed = f"{need:,} bytes are needed, " if need else ""
    return NoRoom(
        f"{folder}: the disk is full: {needed}{free:,} are free. Make room and run doit again: "
        "what is already built is kept."
    )

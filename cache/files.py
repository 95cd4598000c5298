"""files: whole files or nothing: written beside their place, then renamed into it."""

from __future__ import annotations

import errno
import os
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
def temporary(folder: Path) -> Iterator[tuple[IO[bytes], str]]:
    """Open a new file in ``folder``; unless it was renamed meanwhile, it is gone afterwards.

    Raises:
        NoRoom: the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    try:
        os.fchmod(handle, MODE)  # mkstemp makes files that nobody else can read
        with open(handle, "wb", buffering=0) as file:
            yield file, name
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            raise NoRoom(
                f"{folder}: the disk is full ({free:,} bytes free). Make room and run again: "
                "what is already built is kept."
            ) from error
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

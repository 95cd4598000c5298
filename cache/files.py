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
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that takes the place of ``path`` when the block ends well.

    It lies in the same folder, since only a rename within one file system is atomic. No fsync:
    a power cut can leave a short file, which readers notice by its size or its contents.

    Raises:
        NoRoom: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp makes files private; what is built is as readable as any other file.
        os.chmod(name, 0o666 & ~_UMASK)
        os.replace(name, path)
    except OSError as error:
        _unlink(name)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            raise NoRoom(
                f"{path}: the disk is full ({free:,} bytes free). Make room and run again: "
                "what is already built is kept."
            ) from error
        raise
    except BaseException:
        _unlink(name)
        raise


def write(path: Path, data: bytes | memoryview) -> None:
    """Make ``path`` hold exactly ``data``, or leave it as it was."""
    with replacing(path) as file:
        file.write(data)


def _unlink(name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name)


# There is no call that only reads it, and setting it is not safe in threads: read once.
_UMASK = os.umask(0)
os.umask(_UMASK)

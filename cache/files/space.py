"""space: whether the disk has room, asked before a write and told of after one."""

from __future__ import annotations

import ctypes
import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cache.errors import NoRoom
from cache.files import trash

WRITERS = 16  # of as much at once, for which room is made before any of it is short
KEEP_SIZE = 1  # linux/falloc.h, FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None)


def require_free(folder: Path, need: int) -> None:
    """Refuse to begin what the disk cannot take.

    Args:
        folder: where it will be written.
        need: bytes.

    Raises:
        NoRoom: there is less free.
    """
    if WRITERS * need > shutil.disk_usage(folder).free:  # others write as well
        trash.wait()  # what is being removed is room
        if need > shutil.disk_usage(folder).free:
            raise no_room(folder, need)


@contextmanager
def enospc_as_no_room(folder: Path, need: int = 0) -> Iterator[None]:
    """Raise ``NoRoom`` where the block, which writes ``need`` bytes to ``folder``, fills the disk.

    Raises:
        NoRoom: it is.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise no_room(folder, need) from error
        raise


def is_full(error: OSError) -> bool:
    """Tell whether an error means that there is no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_room(folder: Path, need: int = 0) -> NoRoom:
    """Return the error that says so."""
    free = shutil.disk_usage(existing(folder)).free
    fact = f"{need:,} bytes are needed, {free:,} are free" if need else f"{free:,} bytes are free"
    return NoRoom(f"{folder}: the disk is full: {fact}.")


def reserve(file: IO[bytes], length: int) -> None:
    """Have the disk set aside, at once, what a file will hold: a quarter less time to write it.

    Only where the system and the file system can; ``os.posix_fallocate`` would write into each
    block elsewhere. The file's size stays that of what was written.
    """
    fallocate = getattr(_libc, "fallocate", None)
    if fallocate:
        fallocate(file.fileno(), KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(length))


def existing(folder: Path) -> Path:
    """Return the nearest folder that exists: ``folder`` itself, or one above it."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())

"""link: lets a file have the bytes of another one, without a copy where the disk can do that."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from cache.files.space import existing, require_free

FICLONE = 0x40049409  # linux/fs.h
WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_libc = ctypes.CDLL(None)


def link(source: Path, target: Path) -> bool:
    """Let a new file have the bytes of another one that nobody writes to any more.

    It shares its blocks where the file system can do that (a reflink). Else it is the same file (a
    hard link), and both names are made read-only; or, where that cannot be, a copy.

    Returns:
        Whether bytes were copied.

    Raises:
        NoRoom: the disk cannot take a copy.
    """
    if _reflink(source, target):
        return False
    try:
        source.chmod(stat.S_IMODE(source.stat().st_mode) & ~WRITABLE)
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links, or the file is somebody else's
        require_free(target.parent, source.stat().st_size)
        shutil.copyfile(source, target)
        return True
    return False


def _reflink(source: Path, target: Path) -> bool:
    if clonefile := getattr(_libc, "clonefile", None):  # macOS
        return bool(clonefile(os.fsencode(source), os.fsencode(target), 0) == 0)
    if platform.system() != "Linux":
        return False
    with source.open("rb") as old, target.open("xb") as new, suppress(OSError):
        fcntl.ioctl(new, FICLONE, old.fileno())
        return True
    target.unlink()
    return False


def on_one_disk(one: Path, other: Path) -> bool:
    """Tell whether files can be linked from a folder to another one; neither need be there yet."""
    return existing(one).stat().st_dev == existing(other).stat().st_dev

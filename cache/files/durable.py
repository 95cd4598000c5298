"""durable: has the disk hold what must outlast a power cut, and not the system's memory alone.

Waiting for the disk costs as much as it takes to write, so only that is synced which cannot be
found damaged and made again: a built model, the record that it is ours, models.lock.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.errors import naming

FILES_AT_ONCE = 8
_UNABLE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR)  # of folders, on some systems


def sync(path: Path) -> None:
    """Return once the disk has a file's bytes, or a folder's names.

    Raises:
        OSError: the disk does not take them.
    """
    folder = path.is_dir()
    descriptor = -1
    try:
        with naming(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(descriptor)
    except OSError as error:
        if not (folder and error.errno in _UNABLE):
            raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Return once the disk has all files in a folder, and in those below it.

    Raises:
        OSError: the disk does not take them.
    """
    tree = [(Path(root), names) for root, _, names in os.walk(folder)]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(sync, (root / name for root, names in tree for name in names)))
    for root, _ in reversed(tree):
        sync(root)

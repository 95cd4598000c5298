"""own: opens files of our own state, and only those: a link in their place leads elsewhere."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from cache.errors import CacheError

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


class Linked(CacheError):
    """A link lies where a file or folder of our own belongs."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(
            f"{path} is a link, and what it names would be overwritten: remove the link."
        )


def open_own(path: str | Path, flags: int) -> int:
    """Open a file of our own, and return its descriptor; an ``opener`` for ``open``.

    Raises:
        Linked: it is a link.
    """
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise Linked(path) from error
        raise

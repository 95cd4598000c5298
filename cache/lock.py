"""lock: keeps those who use a cache folder's files, and who removes some, out of each other's way.

Whoever has found a blob must be able to read it to its end. So each task of a build holds the
folder's lock together with all others, and who collects garbage, or sets corrupt files aside,
holds it alone: files go between two tasks, never under one, in whatever checkout or container it
runs. What goes between two tasks, and the later one wants, is made again as any lost blob is.
That costs a build some time and nothing else; least recently used goes first, so that it is
seldom.

It is no lock on whole builds, since a build may take hours, and may have filled the disk.

There are two files, since many tasks one after another would else keep a collector out for ever:
who wants the lock first takes the *turn*, and a collector keeps it while it waits.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cache import folder
from cache.errors import CacheError
from cache.files import own

_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # to the file system


class NoLocks(CacheError):
    """The file system knows no locks."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            f"{root} lies where files cannot be locked, so that a build might lose files that it "
            "reads. When none runs, all of it may be deleted by hand."
        )


class Lock:
    """The lock of the cache folder ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def using(self) -> Iterator[None]:
        """Hold the lock with others who use files. Not to be taken again in the block.

        Raises:
            NotACache: the folder holds something else.
        """
        folder.claim(self.root)
        with ExitStack() as held:
            # No build fails for want of locks: nobody can hold them alone there either.
            with suppress(NoLocks), self._held("turn", fcntl.LOCK_SH):
                held.enter_context(self._held("lock", fcntl.LOCK_SH))
            yield

    @contextmanager
    def alone(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the lock alone. ``waiting`` is called if tasks have to be waited for.

        Raises:
            NoLocks: the file system has none.
            NotACache: the folder holds something else.
        """
        folder.claim(self.root)
        with (
            self._held("turn", fcntl.LOCK_EX),
            self._held("lock", fcntl.LOCK_EX, waiting),
        ):
            yield

    @contextmanager
    def _held(
        self, name: str, how: int, waiting: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        path = self.root / name
        descriptor = _open(path, must_write=how == fcntl.LOCK_EX)
        try:
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, how)
            except OSError as error:
                if error.errno in _UNKNOWN:
                    raise NoLocks(self.root) from error
                error.filename = str(path)
                raise
            yield
        finally:
            os.close(descriptor)


def _open(path: Path, *, must_write: bool) -> int:
    """Open a lock's file; where nothing can be written, one that is there can be locked as well.

    Raises:
        NoLocks: there is none, and none can be made: nor can anybody who sees the folder as it is
            seen here remove anything.
    """
    try:
        return own.open_own(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if must_write or error.errno not in own.UNWRITABLE:
            raise
    try:
        return own.open_own(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise NoLocks(path.parent) from error

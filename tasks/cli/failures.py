"""failures: what a user reads when something fails: the fact and its cause, then what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from doit.exceptions import InvalidDodoFile, TaskFailed

from cache.errors import CacheError, FileChanged, NoRoom, one_line
from cache.files import space
from cache.folder import NotACache
from tasks.core.errors import BuildError, Stopped
from tasks.core.program import COMMAND

_WRITABLE = "Have it writable, or name another folder (for the cache, [cache] dir)"
_IN_THE_WAY = "A file is where a folder must be, or the other way round: move it away"
_MENDS = {
    errno.EIO: "The disk, or what connects it, may be failing: check it",
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.EMFILE: "Let a process open more files (ulimit -n 4096)",
    errno.ENFILE: "Let the system open more files",
    errno.ESTALE: "Mount that file system anew",
}
MENDABLE = (BuildError, CacheError, OSError)  # by users: told with a message, and no traceback


def message(error: Exception) -> str:
    """Return the text of an error, with the mend where only the command line knows one.

    The cache's errors carry the fact and its cause: it does not know what it is used by.
    """
    if isinstance(error, OSError):
        if not space.is_full(error):
            where = f"{error.filename}: " if isinstance(error.filename, str) else ""
            mend = _MENDS.get(error.errno or 0, "Mend that")
            return one_line(
                f"{where}{error.strerror or error}. {mend}, and run {COMMAND} again: what is "
                "already built is kept."
            )
        error = space.no_room(Path(error.filename if isinstance(error.filename, str) else "."))
    if isinstance(error, NoRoom):
        return f"{error} Make room and run {COMMAND} again: what is already built is kept."
    if isinstance(error, NotACache):
        mend = f"a folder that is new or empty, such as {error.root / 'mlx-make-cache'}"
        return f"{error} Set [cache] dir in models.toml to {mend}."
    if isinstance(error, FileChanged):
        return f"{error} Run {COMMAND} again when it is whole."
    return str(error)


@contextmanager
def as_invalid_dodo_file() -> Iterator[None]:
    """Raise errors that come up before any task runs as the one whose message doit prints.

    Raises:
        InvalidDodoFile: in place of what users can mend.
    """
    try:
        yield
    except MENDABLE as error:
        raise InvalidDodoFile(message(error)) from error


def values_or_failure(action: Callable[[], dict[str, Any]]) -> dict[str, Any] | TaskFailed:
    """Return what a task's action returns, or doit's failure with the message of its error."""
    try:
        return action()
    except Stopped as error:  # which says nothing that is not said already
        return TaskFailed(message(error), report=False)
    except MENDABLE as error:
        return TaskFailed(message(error))

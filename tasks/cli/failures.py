"""failures: what a user reads when something fails: the fact and its cause, then what to do."""

from __future__ import annotations

from pathlib import Path

from cache.errors import FileChanged, NoRoom
from cache.files import space


def message(error: Exception) -> str:
    """Return the text of an error, with the mend where only the command line knows one.

    The cache's errors carry the fact and its cause: it does not know what it is used by.
    """
    if isinstance(error, OSError):
        if not space.is_full(error):
            where = f"{error.filename}: " if error.filename else ""
            fact = f"{where}{error.strerror or error}."
            return f"{fact} Mend that and run doit again: what is already built is kept."
        error = space.no_room(Path(error.filename or "."))
    if isinstance(error, NoRoom):
        return f"{error} Make room and run doit again: what is already built is kept."
    if isinstance(error, FileChanged):
        return f"{error} Run doit again when it is whole."
    return str(error)

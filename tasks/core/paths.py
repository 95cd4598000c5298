"""paths: what models.toml may call a file or a folder."""

from __future__ import annotations

from pathlib import Path

from tasks.core.kinds import Mistake, Mistakes


def path_of(text: str, what: str = "folder") -> Path:
    """Return the path that a text means; ``~`` is the user's home.

    Args:
        text: the text.
        what: what is to lie there, for messages.

    Raises:
        Mistakes: nothing can be called so.
    """
    if not text or "\0" in text:
        raise Mistakes(Mistake(f"is {text!r}, which no {what} can be called", f"name a {what}"))
    try:
        return Path(text).expanduser()
    except RuntimeError:
        fact = f"is {text!r}, but there is no such user"
        raise Mistakes(Mistake(fact, f"write the {what} out")) from None

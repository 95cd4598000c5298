"""errors: what can go wrong in the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_SHOWN = 500  # characters


def printable(text: str) -> str:
    """Return a text from elsewhere as it may be shown: on one line, in bounds, as it is seen.

    So it can neither forge a line, nor move the cursor, nor fill the screen.
    """
    return one_line(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…")


def one_line(text: str) -> str:
    """Return a text on one line, what a terminal would act on as ASCII spells it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have an error of the system name a file: of an open one it has at best a number."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | bytes | Path):
            error.filename = str(path)
        raise


class CacheError(Exception):
    """Base of the store's errors. The message is one a user can act on, on one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class BlobLost(CacheError):
    """A blob's bytes are not where the store last had them.

    Attributes:
        digest: the blob that was asked for.
        cause: what was found instead, for people.
    """

    def __init__(self, digest: str, cause: str) -> None:
        super().__init__(f"blob {digest}: {cause}")
        self.digest = digest
        self.cause = cause


class WrongLength(CacheError):
    """What was fetched is longer or shorter than it was said to be."""

    def __init__(self, length: int, came: int) -> None:
        super().__init__(f"{came:,} bytes came, not {length:,}")


class FileChanged(CacheError):
    """A file that the store refers to, or reads, is another than when it was looked at."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} changed while it was read.")


class NoRoom(CacheError):
    """The disk cannot take what has to be written."""


class Refused(CacheError):
    """A record that is there, but must not be used.

    Attributes:
        cause: what is wrong with it, for people.
    """

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"record {name} is refused: {printable(cause)}")
        self.cause = printable(cause)


class BadRemote(CacheError):
    """A remote's URL that can never work."""


class NotFetched(CacheError):
    """A blob cannot be had from the remote: it is not there, or the remote cannot be used."""

    def __init__(self, blake3: str, cause: str) -> None:
        super().__init__(f"remote blob {blake3}: {cause}")


class Mismatch(CacheError):
    """Bytes that are not those of the BLAKE3 digest that names them."""

    def __init__(self, blake3: str, cause: str) -> None:
        super().__init__(f"remote blob {blake3}: {cause}")

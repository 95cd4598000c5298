"""errors: what can go wrong in the store."""


class CacheError(Exception):
    """Base of the store's errors. The message is one a user can act on."""


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


class FileChanged(CacheError):
    """A file that the store refers to, or reads, is another than when it was looked at."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} changed while it was read. Run doit again when it is whole.")


class NoRoom(CacheError):
    """The disk cannot take what has to be written."""

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
        super().__init__(f"{path} changed while it was read.")


class NoRoom(CacheError):
    """The disk cannot take what has to be written."""


class Refused(CacheError):
    """A record that is there, but must not be used.

    Attributes:
        cause: what is wrong with it, for people.
    """

    def __init__(self, name: str, cause: str) -> None:
        super().__init__(f"record {name} is refused: {cause}")
        self.cause = cause


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

"""content: bytes that are held against their BLAKE3 as they come or go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cache.errors import Mismatch

if TYPE_CHECKING:
    from typing_extensions import Buffer


def blake3_of(chunks: Iterable[Buffer]) -> str:
    """Return the BLAKE3 of all ``chunks`` as if they were one run of bytes, 64 hex digits."""
    state = hasher()
    for chunk in chunks:
        state.update(chunk)
    return str(state.hexdigest())


def hasher() -> Any:
    """Return what works a BLAKE3 out."""
    from blake3 import blake3  # only where a remote is used

    return blake3()


def verified(blake3: str, length: int, chunks: Iterable[Buffer]) -> Iterator[memoryview]:
    """Yield ``chunks``, the last of them only when all are known to be the blob's bytes.

    So an upload of wrong bytes is never complete.

    Raises:
        Mismatch: they are not.
    """
    state = hasher()
    count = 0
    held: memoryview | None = None
    for chunk in chunks:
        data = memoryview(chunk).cast("B")
        if held is not None:
            yield held
        held = data
        state.update(data)
        count += data.nbytes
    check(blake3, length, count, state)
    if held is not None:
        yield held


def check(blake3: str, length: int, count: int, state: Any) -> None:
    """Make sure that bytes are those of a blob.

    Args:
        blake3: its name.
        length: its bytes.
        count: of the bytes that there were.
        state: of the ``hasher`` that was given them.

    Raises:
        Mismatch: they are not.
    """
    if count != length:
        raise Mismatch(blake3, f"there are {count:,} bytes, expected {length:,}")
    if (digest := state.hexdigest()) != blake3:
        raise Mismatch(blake3, f"the bytes have BLAKE3 {digest}")

"""contents: the bytes of what a node made, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from cache.blobs import Blobs, Part
from tasks.planning.node import Inputs
from tasks.stages.stage import Key


class Contents(Mapping[str, bytes]):
    """The bytes of tensors, fetched or made again if they are not here."""

    def __init__(
        self, blobs: Blobs, tensors: Inputs, locate: Callable[[Key], Sequence[Part]]
    ) -> None:
        """Read nothing yet.

        Args:
            blobs: the store's.
            tensors: what there is.
            locate: returns where the bytes of one lie.
        """
        self._blobs = blobs
        self._locate = locate
        self._keys = {key.name: key for key in tensors}

    def __getitem__(self, name: str) -> bytes:
        """Read a tensor."""
        return b"".join(map(bytes, self._blobs.chunks(self._locate(self._keys[name]))))

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._keys)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._keys)

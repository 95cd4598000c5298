"""stored: tensors as they lie in a checkpoint's files, whatever the files' format."""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import prod
from typing import IO, Any, Literal, NamedTuple, Protocol

from cache.records.manifests import DTYPE_BYTES

MAX_AXIS = 2**31 - 1  # MLX counts along an axis in 32 bits, and wraps around in silence
MAX_AXES = 64  # as NumPy and torch have them at most
MAX_NAME = 4096  # characters: names are looked through for layers, experts and patterns
TORCH = -1  # offset of a tensor that does not lie in its file as plain bytes: torch must read it


class FileStat(NamedTuple):
    """What a format needs of a file's ``os.stat_result``.

    Attributes:
        st_size: its size in bytes.
    """

    st_size: int


class WeightFile(Protocol):
    """What a format needs of the path of a weight file: ``ranges.RangedFile`` has it, too."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""

    @property
    def suffix(self) -> str:
        """What its name ends with."""

    def stat(self) -> FileStat | os.stat_result:
        """Return its size, at least."""

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open it to read."""


class Stored(NamedTuple):
    """A tensor as it lies in one of the checkpoint's files.

    Attributes:
        name: its name there.
        dtype: as MLX spells it.
        shape: of what is stored: one shard's part, where the checkpoint is sharded.
        file: the file's name in the checkpoint's folder.
        offset: first byte in the file, or ``TORCH``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def checked_shape(shape: Iterable[Any]) -> tuple[int, ...]:
    """Return a shape; raise ValueError for what is none, or none that MLX can have."""
    shape = tuple(shape)
    if len(shape) > MAX_AXES:  # of a million sizes the product takes hours
        raise ValueError(f"a shape of {len(shape):,} axes, over {MAX_AXES}")
    if not all(type(size) is int and 0 <= size <= MAX_AXIS for size in shape):
        raise ValueError(f"shape {shape}")
    return shape


def checked_name(name: str) -> str:
    """Return a tensor's name; raise ValueError for what is none, or longer than any path."""
    name.encode()  # half a surrogate pair is no text
    if len(name) > MAX_NAME:
        raise ValueError(f"a name of {len(name):,} characters, over {MAX_NAME:,}")
    return name

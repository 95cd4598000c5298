"""checkpoint: what a checkpoint holds, told from its files' headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from cache.files.stamp import Stamp
from cache.records.manifests import DTYPE_BYTES
from tasks.core.errors import CheckpointError

LFS = b"version https://git-lfs"
LFS_BYTES = 1024  # a pointer has fewer
TORCH = -1  # offset of a tensor that does not lie in its file as plain bytes: torch must read it


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


class Whole(NamedTuple):
    """A whole tensor of the model, and how it is made from stored ones.

    Attributes:
        dtype: as MLX spells it.
        shape: when made.
        inputs: keys of stored tensors (``Checkpoint.stored``), in order.
        steps: what to do with them, see ``tasks.stages.unshard``; none for one tensor as it is.
    """

    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    steps: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read by a loader.

    Attributes:
        folder: where it lies.
        names: whose tensor names it has, ``huggingface`` or ``meta``.
        config: config.json or params.json.
        files: the other small files that tell how the model is built, text by name.
        stored: the tensors in its files, by key: the name, with ``#N`` for shard N if sharded.
        wholes: the model's tensors, by name.
        stamps: of each weight file.
        notes: what people should know, e.g. files that were left out.
        record: BLAKE3 of what the checkpoint is known by, if it is not here itself: ``folder``
            then holds its small files alone, and ``stamps`` are none.
        digests: of stored tensors, by key, as the record has them.
    """

    folder: Path
    names: str
    config: dict[str, Any]
    files: dict[str, str]
    stored: dict[str, Stored]
    wholes: dict[str, Whole]
    stamps: dict[str, Stamp]
    notes: tuple[str, ...] = field(default=())
    record: str | None = None
    digests: dict[str, str] = field(default_factory=dict)

    @cached_property
    def table(self) -> list[Any]:
        """The whole tensors as JSON: what the plan of a model depends on."""
        return [[name, w.dtype, list(w.shape)] for name, w in self.wholes.items()]


def _sizes(shape: Iterable[Any]) -> tuple[int, ...]:
    """Return a shape; raise ValueError for what is none."""
    shape = tuple(shape)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape


def is_pointer(path: Path) -> bool:
    """Tell whether a file is a Git LFS pointer, which stands for one that was not fetched.

    Weights are not opened for it: a pointer is smaller (git-lfs, docs/spec.md).
    """
    if path.stat().st_size >= LFS_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _damaged(path: Path, fact: str) -> CheckpointError:
    if is_pointer(path):
        return CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself. Run git lfs pull in its folder."
        )
    return CheckpointError(f"{path} is damaged or incomplete: {fact}. Fetch it again.")

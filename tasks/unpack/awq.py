"""awq: AutoAWQ's, of 4 bits, of its version ``gemm``.

``qweight`` (columns, rows / 8) of int32, ``qzeros`` (groups, rows / 8), ``scales`` (groups, rows).
The eight numbers of a word are those of its rows in the order 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ,
``utils/packing_utils.py``). A weight is (number - zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from msgspec import Struct

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, count
from tasks.unpack import bits
from tasks.unpack.packed import Found, Packed, Read, Tensors, paths, require

METHODS: tuple[str, ...] = ("awq",)
NAME = "awq"
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the rows among the numbers of a word


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have ``qweight``."""
    width = settings.get("bits", settings.get("w_bit", 4))
    version = str(settings.get("version", "gemm")).lower()
    packed = {}
    for path in paths(tensors, ".qweight"):
        if width != 4 or version != "gemm":
            raise CheckpointError(
                f"config.json has bits = {width!r} and version = {version!r}, and AWQ is unpacked "
                "of 4 bits and version gemm. Get the checkpoint in bfloat16."
            )
        weight, zeros, scales = (f"{path}.{part}" for part in ("qweight", "qzeros", "scales"))
        columns, words = tensors[weight].shape
        groups = tensors[scales].shape[0] if scales in tensors else 0
        require(scales, tensors, (groups, words * 8), "float16", "bfloat16", "float32")
        require(zeros, tensors, (groups, words), "int32", "uint32")
        how = {"group_size": columns // groups}
        packed[f"{path}.weight"] = Packed((words * 8, columns), (weight, zeros, scales), how)
    return Found(NAME, packed) if packed else None


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers, less their zero points, times their scales."""
    return Awq(sources, shape, settings)


class Awq(Struct, frozen=True, dict=True):
    """A weight that is stored transposed: its words are read at once, and unpacked by rows."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    settings: dict[str, Any]
    dtype: str = "float32"
    unit: int = 8

    @cached_property
    def _words(self) -> tuple[mx.array, mx.array, mx.array]:
        words, zeros, scales = (s.read(0, count(s)).reshape(s.shape) for s in self.sources)
        return words, zeros, scales.astype(mx.float32)

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``: whole words."""
        words, zeros, scales = self._words
        span = slice(start // 8, -(-stop // 8))
        numbers = _numbers(words[:, span])
        size, columns = self.settings["group_size"], self.shape[1]
        less = bits.grouped(_numbers(zeros[:, span]), size, columns)
        return (numbers - less) * bits.grouped(scales[:, start:stop].T, size, columns)


def _numbers(words: mx.array) -> mx.array:
    """Return the numbers of (count, words), by rows of the weight: (words · 8, count)."""
    numbers = bits.fields(words, 4).reshape(words.shape[0], -1, 8)[..., mx.array(PLACES)]
    return numbers.reshape(words.shape[0], -1).T.astype(mx.float32)

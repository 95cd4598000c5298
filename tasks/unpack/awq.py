"""awq: AutoAWQ's, of 4 bits, of its version ``gemm``.

``qweight`` (columns, rows / 8) of int32, ``qzeros`` (groups, rows / 8), ``scales`` (groups, rows).
The eight numbers of a word are those of its rows in the order 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ,
``utils/packing_utils.py``). A weight is (number - zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, whole
from tasks.unpack import bits
from tasks.unpack.packed import (
    FLOATS,
    WORDS,
    Found,
    Packed,
    Read,
    Tensors,
    group_size,
    paths,
    require,
)
from tasks.unpack.whole_numbers import Transposed, repacking

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
        said = group_size(settings, "group_size", group_size(settings, "q_group_size", -1))
        size = said if said > 0 else columns // max(groups, 1)
        require(scales, tensors, (groups, words * 8), *FLOATS)
        require(weight, tensors, (size * groups, words), *WORDS)
        require(zeros, tensors, (groups, words), *WORDS)
        held = repacking(4, size, columns, tensors[scales].dtype, centred=False)
        inputs = (weight, zeros, scales)
        packed[f"{path}.weight"] = Packed((words * 8, columns), inputs, {"group_size": size}, held)
    return Found(NAME, packed) if packed else None


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers, less their zero points, times their scales."""
    return Awq(sources, shape, {**settings, "bits": 4})


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return twice the size: all of it, and scales and zero points once they are unpacked."""
    return 2 * sum(nbytes)


class Awq(Transposed, frozen=True, dict=True):
    """A weight that is stored transposed: its words are read at once, and unpacked by rows."""

    @cached_property
    def _zeros(self) -> mx.array:
        return whole(self.sources[1])

    def numbers(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows."""
        return _numbers(self._words, start, stop)

    def zeros(self, start: int, stop: int) -> mx.array:
        """Return the zero points of rows."""
        return _numbers(self._zeros, start, stop).astype(mx.float32)


def _numbers(words: mx.array, start: int, stop: int) -> mx.array:
    """Return the numbers of rows ``start`` to ``stop`` of a weight.

    Args:
        words: (count, rows / 8).
        start: the first row.
        stop: the row after the last.

    Returns:
        (rows, count), uint32.
    """
    words = words[:, start // 8 : -(-stop // 8)]
    numbers = bits.fields(words, 4).reshape(words.shape[0], -1, 8)[..., mx.array(PLACES)]
    first = start % 8
    return numbers.reshape(words.shape[0], -1)[:, first : first + stop - start].T

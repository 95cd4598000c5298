"""block_fp8: 8-bit floats (E4M3) with a scale for each block, as DeepSeek and Qwen ship them.

``weight`` (rows, columns) and ``weight_scale_inv`` (rows / 128, columns / 128), by which it is
multiplied: floats, or bytes that are powers of two (E8M0). Blocks at the edges may be cut off. The
same arithmetic as ``FineGrainedFP8Config``'s dequantization in transformers
(``integrations/finegrained_fp8.py``): both in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

from msgspec import Struct

from tasks.checkpoints.checkpoint import LogicalTensor
from tasks.tensors import mx
from tasks.tensors.rows import Rows, count
from tasks.unpack import bits, mxfp8
from tasks.unpack.packed import (
    FLOATS,
    LARGEST_GROUP,
    Found,
    Packed,
    Read,
    Tensors,
    activations,
    require,
)

METHODS: tuple[str, ...] = ("fp8",)
NAME = "block_fp8"
SCALES = "_scale_inv"


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have ``…_scale_inv`` beside them."""
    block = settings.get("weight_block_size")
    others = mxfp8.weights(tensors)
    packed = {}
    known: dict[tuple[Any, ...], dict[str, Any]] = {}  # a mixture has thousands of few shapes
    for scale, tensor in tensors.items():
        if not scale.endswith(SCALES):
            continue
        name = scale.removesuffix(SCALES)
        if name not in tensors or tensors[name].dtype != "uint8" or name in others:
            continue
        shape = tensors[name].shape
        kind = (shape, tensor.dtype, tensor.shape)
        if kind not in known:
            sides = _block(tensor, shape, block)
            blocks = tuple(-(-n // b) for n, b in zip(shape[-2:], sides, strict=False))
            of = tensor.shape if tensor.shape in ((), (1,)) else (*shape[:-2], *blocks)
            require(scale, tensors, of, *FLOATS, "uint8")
            known[kind] = {"block": list(sides)}
        packed[name] = Packed(shape, (name, scale), known[kind])
    if not packed:
        return None
    return Found(NAME, packed, activations(tensors))


def _block(scale: LogicalTensor, shape: tuple[int, ...], said: Any) -> tuple[int, int]:
    """Return the rows and columns of a block: all, where there is one scale."""
    if prod(scale.shape) == 1:
        return shape[-2], shape[-1]
    match said:
        case [int() as height, int() as width] if all(
            0 < side <= LARGEST_GROUP for side in (height, width)
        ):
            return height, width
    return 128, 128


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the product of a weight and its scales."""
    weight, scale = sources
    return BlockFp8(weight, scale, shape, *settings["block"])


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return what the scales take once they are float32."""
    return 4 * nbytes[1]


class BlockFp8(Struct, frozen=True, dict=True):
    """A weight of E4M3, (…, rows, columns), times a scale for each block of it."""

    weight: Rows
    scale: Rows
    shape: tuple[int, ...]
    block_rows: int
    block_columns: int
    dtype: str = "float32"
    unit: int = 1

    @cached_property
    def _scales(self) -> mx.array:
        scales = self.scale.read(0, count(self.scale))
        if scales.dtype == mx.uint8:
            scales = bits.powers_of_two(scales)
        scales = scales.astype(mx.float32)
        return scales.reshape(-1, -(-self.shape[-1] // self.block_columns))

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        from tasks.tensors import fp8  # with NumPy, which reading models.toml does without

        at = mx.arange(start, stop)
        height = self.shape[-2]
        blocks = -(-height // self.block_rows)
        of_row = self._scales[at // height * blocks + at % height // self.block_rows]
        return fp8.scaled(self.weight.read(start, stop), of_row, self.block_columns)

"""rounding: whether what another machine quantized differs from what is made here by ties alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from tasks.tensors import kernels, mx

# Two devices disagree on a weight that lies as near to one step as to the next. How much nearer one
# may be, as a part of the largest error in the group, which is about half a step.
TIE = 1 / 8
EDGE_TIE = 1e-3  # of a step: as near to one number of steps as to the next
DTYPE_STEP = 2.0**-7  # of bfloat16, which scales and weights may be rounded to


class Compared(Struct, frozen=True):
    """What two quantized blocks of one original are to each other.

    Attributes:
        count: weights that are not the same.
        first: the first of them, counted through the block.
        most: by how much they are not, at most.
        is_tie: whether each is about as far from the original in both, or in a group whose scale
            was a tie.
    """

    count: int
    first: int
    most: float
    is_tie: bool


def compare(
    original: mx.array,
    ours: Sequence[mx.array],
    theirs: Sequence[mx.array],
    setting: Mapping[str, Any],
) -> Compared:
    """Compare what was made here of a block of rows with what somebody else made of it.

    Args:
        original: (rows, columns).
        ours: packed weights, scales, and biases in mode ``affine``, of ``kernels.quantize``.
        theirs: the same.
        setting: how both are quantized: arguments of ``kernels.quantize``.
    """
    groups = original.astype(mx.float32).reshape(-1, setting["group_size"])
    one, other = (
        kernels.dequantize(parts, **setting).astype(mx.float32).reshape(groups.shape)
        for parts in (ours, theirs)
    )
    where = ~(one == other)
    errors = [mx.abs(groups - each) for each in (one, other)]
    ties = mx.abs(errors[1] - errors[0]) <= TIE * mx.max(errors[0], axis=-1, keepdims=True)
    if setting["mode"] == "affine":
        another_scale = (ours[1] != theirs[1]).reshape(-1, 1)
        ties = ties | (another_scale & _other_way(groups, other, theirs, setting["bits"]))
    apart = mx.where(where, mx.abs(one - other), 0)
    return Compared(
        int(mx.sum(where)),
        int(mx.argmax(where.reshape(-1))),
        float(mx.max(apart)),
        bool(mx.all(ties | ~where)),
    )


def _other_way(
    groups: mx.array, restored: mx.array, packed: Sequence[mx.array], bits: int
) -> mx.array:
    """Tell which groups are as a device makes them that decides a tie of their scale another way.

    MLX has a scale be such that the end of a group that is farther from 0 is a whole number of
    steps: of a group that is as wide above 0 as below that is a tie, which each kind of device
    decides by the last bit of a division.

    Returns:
        (groups, 1).
    """
    ends = [find(groups, axis=-1, keepdims=True) for find in (mx.min, mx.max)]
    top = 2**bits - 1
    scale = mx.maximum((ends[1] - ends[0]) / top, kernels.AFFINE_EPS)
    below = mx.abs(ends[0]) > mx.abs(ends[1])
    edge = mx.where(below, *ends)
    exact = mx.abs(edge) / scale
    steps = mx.floor(exact)
    is_tie = mx.abs(exact - steps - 0.5) < EDGE_TIE
    scales, biases = (part.astype(mx.float32).reshape(-1, 1) for part in packed[1:])

    def near(made: mx.array, wanted: mx.array) -> mx.array:
        return mx.abs(made - wanted) <= DTYPE_STEP * mx.abs(wanted)

    width = mx.abs(scales)
    either = near(width, mx.abs(edge) / steps) | near(width, mx.abs(edge) / (steps + 1))
    last = biases + top * scales
    beyond = near(restored, last) & ((groups - last) * scales >= 0)
    nearest = mx.abs(groups - restored) <= width / 2 + DTYPE_STEP * mx.abs(edge)
    held = mx.all(nearest | beyond, axis=-1, keepdims=True)
    return is_tie & either & near(biases, edge) & held

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
LEAST_EPS = 2.0**-20  # in which divisions of two devices may differ, in float32


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
    """Tell which groups are as a device makes them that divides with other last bits.

    MLX has a scale be such that the end of a group that is farther from 0 is a whole number of
    steps. Of a group that is as wide above 0 as below, that number is a tie; of any, the scale is
    rounded to its dtype.

    Returns:
        (groups, 1).
    """
    eps = max(mx.finfo(packed[1].dtype).eps, LEAST_EPS)
    ends = [find(groups, axis=-1, keepdims=True) for find in (mx.min, mx.max)]
    top = 2**bits - 1
    scale = mx.maximum((ends[1] - ends[0]) / top, kernels.AFFINE_EPS)
    edge = mx.where(mx.abs(ends[0]) > mx.abs(ends[1]), *ends)
    exact = mx.abs(edge) / scale
    fraction = exact - mx.floor(exact)
    scales, biases = (part.astype(mx.float32).reshape(-1, 1) for part in packed[1:])

    def near(made: mx.array, wanted: mx.array) -> mx.array:
        return mx.abs(made - wanted) <= eps * mx.abs(wanted)

    width = mx.abs(scales)
    below, above = (
        near(width, mx.abs(edge) / mx.floor(exact)),
        near(width, mx.abs(edge) / mx.ceil(exact)),
    )
    is_tie = mx.abs(fraction - 0.5) < EDGE_TIE
    either = mx.where(is_tie, below | above, mx.where(fraction < 0.5, below, above))
    last = biases + top * scales
    beyond = near(restored, last) & ((groups - last) * scales >= 0)
    rounded = 2 * eps * mx.abs(edge)  # of the scale, and of what is restored
    nearest = mx.abs(groups - restored) <= width / 2 + rounded
    held = mx.all(nearest | beyond, axis=-1, keepdims=True)
    return either & near(biases, edge) & held

"""What another kind of device makes of the same weights is told from what was changed."""

import mlx.core as mx
import pytest

from tasks.tensors import kernels, rounding

pytestmark = pytest.mark.usefixtures("by_cpu")  # another device's result is made by hand


def packed(groups: mx.array, steps: int, bits: int) -> list[mx.array]:
    """As MLX, but for the steps between 0 and the end of a group that is farther from 0."""
    edge = mx.max(groups, axis=-1, keepdims=True)
    scales = (edge / -steps).astype(mx.bfloat16)
    codes = mx.round((groups - edge) / (edge / -steps))
    codes = mx.clip(codes, 0, 2**bits - 1).astype(mx.uint8)
    weight = kernels.pack(codes.reshape(-1), bits).view(mx.uint32)
    return [weight.reshape(len(groups), -1), scales, edge.astype(mx.bfloat16)]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_tie_of_a_scale(bits: int) -> None:
    """Of a group that is as wide above 0 as below."""
    groups = mx.random.uniform(-1, 1, (32, 64), key=mx.random.key(bits)).astype(mx.bfloat16)
    groups[:, 5], groups[:, 9] = 1.5, -1.5
    setting = {"group_size": 64, "bits": bits, "mode": "affine"}
    wide = groups.astype(mx.float32)
    one, other = (packed(wide, steps, bits) for steps in (2 ** (bits - 1), 2 ** (bits - 1) - 1))
    mine = kernels.quantize(groups, **setting)
    assert mx.array_equal(mine[1], one[1]) or mx.array_equal(mine[1], other[1])
    for theirs in (one, other):
        found = rounding.compare(groups, mine, theirs, setting)
        assert found.is_tie
        assert bool(found.count) == (not mx.array_equal(theirs[1], mine[1]))
    for theirs in (one, other):
        flipped = [theirs[0] + 0, *theirs[1:]]
        flipped[0][3, 2] = flipped[0][3, 2] ^ 0b10
        assert not rounding.compare(groups, mine, flipped, setting).is_tie
        scaled = [theirs[0], theirs[1] * 1.1, theirs[2]]
        assert not rounding.compare(groups, mine, scaled, setting).is_tie


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_scale_that_is_rounded_another_way(dtype: mx.Dtype) -> None:
    groups = mx.random.normal((8, 64), key=mx.random.key(0)).astype(dtype)
    setting = {"group_size": 64, "bits": 4, "mode": "affine"}
    mine = kernels.quantize(groups, **setting)
    bits, edge = mine[1].view(mx.uint16), mine[2].astype(mx.float32)
    scale = edge / mx.round(edge / mine[1].astype(mx.float32))
    up = mx.abs(scale) > mx.abs(mine[1].astype(mx.float32))  # what it was rounded away from
    one = mx.where(up, 1, -1)
    for ulps, is_tie in ((one, True), (40, False)):
        theirs = [mine[0], (bits + ulps).astype(mx.uint16).view(dtype), mine[2]]
        found = rounding.compare(groups, mine, theirs, setting)
        assert found.count > 300
        assert found.is_tie is is_tie

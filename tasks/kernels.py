"""kernels: what computes on blocks of weights, on the current stream."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from tasks import mx

EPS = 1e-7  # the least scale, as MLX has it
ROUND = 1.5 * 2.0**23  # a float32 that is added to it is rounded, ties to even, into its low bits
LANE = 64  # bits of the widest integer


def quantize(weight: mx.array, *, group_size: int, bits: int, mode: str) -> tuple[mx.array, ...]:
    """Quantize a weight.

    Args:
        weight: (…, rows, columns), columns a multiple of ``group_size``.
        group_size: weights that share a scale.
        bits: bits per weight.
        mode: ``affine``, ``mxfp4``, ``mxfp8``, ``nvfp4``.

    Returns:
        The packed weight, uint32 (…, rows, columns · bits / 32); scales (…, rows,
        columns / group_size); and for ``affine`` biases, shaped as the scales.
    """
    return tuple(mx.quantize(weight, group_size, bits, mode))


def quantize_affine(
    weight: mx.array, *, group_size: int, bits: int
) -> tuple[tuple[mx.array, ...], mx.array]:
    """Quantize finite weights as MLX's CPU kernel does in mode affine, in half of its time.

    The kernel (``mlx/backend/cpu/quantized.cpp``) takes one weight after another. Here each of its
    steps is taken for all weights of a block, which a compiler makes vectors of: the same numbers,
    in the same precision, so the same bits. ``agrees`` tells whether the installed MLX's are.

    Args:
        weight: as for ``quantize``: float16, bfloat16 or float32.
        group_size: weights that share a scale.
        bits: bits per weight.

    Returns:
        As ``quantize``; and, not evaluated yet, whether an element is infinite or NaN. If so, what
        was made is not what ``quantize`` makes.
    """
    least, most, odd = _extremes(weight.reshape(-1, group_size))
    top = 2**bits - 1
    scales = mx.maximum((most - least) / top, EPS)
    below = mx.abs(least) > mx.abs(most)
    scales = mx.where(below, scales, -scales)
    edge = mx.where(below, least, most)
    steps = mx.round(edge / scales)
    near_zero = steps == 0
    scales = mx.where(near_zero, scales, edge / steps)
    biases = mx.where(near_zero, 0.0, edge)
    # float32 only from here: at 16 bits the largest and least of a group are found sooner.
    codes = (weight.reshape(-1, group_size).astype(mx.float32) - biases) / scales + ROUND
    if bits == 8:
        codes = mx.minimum(codes, ROUND + top)  # or the code 256 were a 0
    codes = codes.view(mx.uint32).astype(mx.uint8)
    if bits < 8:
        codes = mx.minimum(codes, top)  # of bytes it is sooner found
    packed = _pack(codes.reshape(-1), bits).view(mx.uint32)
    parts = (packed, scales.astype(weight.dtype), biases.astype(weight.dtype))
    return tuple(part.reshape(*weight.shape[:-1], -1) for part in parts), odd


@lru_cache
def agrees(dtype: mx.Dtype, group_size: int, bits: int) -> bool:
    """Tell, by a sample, whether the MLX that is installed quantizes as ``quantize_affine``."""
    spread = mx.power(2.0, mx.arange(-44, 4, 0.5))[:, None]  # a magnitude a row, some below EPS
    sample = (mx.random.normal((96, 512), key=mx.random.key(0)) * spread).astype(dtype)
    found, _ = quantize_affine(sample, group_size=group_size, bits=bits)
    expected = quantize(sample, group_size=group_size, bits=bits, mode="affine")
    same = [mx.array_equal(one, other) for one, other in zip(found, expected, strict=True)]
    return all(one.item() for one in same)


def not_finite(weight: mx.array) -> mx.array:
    """Return, lazily, whether an element is infinite or NaN. Twenty times faster than isfinite."""
    signed, unsigned = _integers(weight.dtype)
    return _odd(weight.dtype, mx.max(weight.view(signed)), mx.max(weight.view(unsigned)))


def _extremes(groups: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return, in float32, the least and the largest of each group; and what ``not_finite`` does.

    Floats of one sign are in the order of their bits, so integers do, which are compared sooner.

    Args:
        groups: (groups, group_size).

    Returns:
        (groups, 1) twice, and a scalar.
    """
    signed, unsigned = _integers(groups.dtype)
    # The largest as signed integers is positive, if any is; as unsigned ones, if any is negative,
    # the least of the floats. Where all have one sign, the smallest is the other end.
    positive = mx.max(groups.view(signed), axis=-1, keepdims=True)
    negative = mx.max(groups.view(unsigned), axis=-1, keepdims=True)
    smallest = mx.min(groups.view(unsigned), axis=-1, keepdims=True)
    most = mx.where(positive >= 0, positive.view(unsigned), smallest)
    least = mx.where(negative.view(signed) < 0, negative, smallest)
    odd = _odd(groups.dtype, mx.max(positive), mx.max(negative))
    least, most = (one.view(groups.dtype).astype(mx.float32) for one in (least, most))
    return least, most, odd


def _odd(dtype: mx.Dtype, positive: mx.array, negative: mx.array) -> mx.array:
    """Tell infinity and NaN by the largest of the bits as signed, and as unsigned integers.

    They have no sign bit and have it, unless all floats have the other sign. More than infinity is
    NaN.
    """
    signed, unsigned = _integers(dtype)
    infinity = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80, mx.float32: 0x7F800000}[dtype]
    sign = 1 << (8 * dtype.size - 1)
    return mx.logical_or(
        positive >= mx.array(infinity, signed), negative >= mx.array(sign + infinity, unsigned)
    )


def _integers(dtype: mx.Dtype) -> tuple[mx.Dtype, mx.Dtype]:
    """Return what to view floats as, signed and unsigned."""
    return (mx.int16, mx.uint16) if dtype.size == 2 else (mx.int32, mx.uint32)


def _pack(codes: mx.array, bits: int) -> mx.array:
    """Put codes of ``bits`` bits one after another, little-endian: (codes,), uint8.

    Neighbours are moved together, twice as many each time, until they fill an integer, or there is
    no wider one: then the bytes of each that are filled are taken.
    """
    integers = {8: mx.uint8, 16: mx.uint16, 32: mx.uint32, 64: mx.uint64}
    held, lane = bits, 8  # bits of each integer that are codes, and all of them
    while held not in integers and lane < LANE:
        wide = codes.view(integers[2 * lane])
        codes = wide - (wide >> lane) * (2**lane - 2**held)
        held, lane = 2 * held, 2 * lane
    if held in integers:
        return codes.astype(integers[held])
    unit = gcd(held, 16)
    return codes.view(integers[unit]).reshape(-1, lane // unit)[:, : held // unit].reshape(-1)

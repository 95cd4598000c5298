"""kernels: what computes on blocks of weights, on the current stream."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from tasks import mx

AFFINE_EPS = 1e-7  # the least scale, as MLX has it
ROUND = 1.5 * 2.0**23  # a float32 that is added to it is rounded, ties to even, into its low bits
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # above each, the next of 0 0.5 1 1.5 2 3 4 6
E2M1_MAX, E4M3_MAX = 6, 448
E8M0_BIAS = 127
LARGE = 2.0**30  # MLX's nvfp4 has ways of its own with what is larger than about this
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


def quantize_fast(
    weight: mx.array, *, group_size: int, bits: int, mode: str
) -> tuple[tuple[mx.array, ...], mx.array]:
    """Quantize as MLX does on a CPU, sooner: in half of the time, in fp4 in a twentieth.

    In mode affine its kernel (``mlx/backend/cpu/quantized.cpp``) takes one weight after another;
    for fp4 it compares each with all sixteen numbers of that. Here each step is taken for all
    weights of a block, which a compiler makes vectors of: the same numbers in the same precision,
    so the same bits. ``agrees`` tells whether those are the installed MLX's, and in which modes.

    Args:
        weight: as for ``quantize``: float16, bfloat16 or float32.
        group_size: weights that share a scale.
        bits: bits per weight.
        mode: ``affine``, ``mxfp4``, ``nvfp4``.

    Returns:
        As ``quantize``; and, not evaluated yet, whether an element is infinite, NaN or, but in
        mode affine, as large as ``LARGE``. If so, what was made is not what ``quantize`` makes.
    """
    groups = weight.reshape(-1, group_size)
    if mode == "affine":
        codes, parts, odd = _affine(groups, bits)
    else:
        codes, parts, odd = _floats(groups, mode)
    parts = (_pack(codes.reshape(-1), bits).view(mx.uint32), *parts)
    return tuple(part.reshape(*weight.shape[:-1], -1) for part in parts), odd


@lru_cache
def agrees(dtype: mx.Dtype, group_size: int, bits: int, mode: str) -> bool:
    """Tell, by a sample, whether the MLX that is installed quantizes as ``quantize_fast``."""
    spread = mx.power(2.0, mx.arange(-44, 4, 0.5))[:, None]  # a magnitude a row
    sample = (mx.random.normal((96, 512), key=mx.random.key(0)) * spread).astype(dtype)
    found, _ = quantize_fast(sample, group_size=group_size, bits=bits, mode=mode)
    expected = quantize(sample, group_size=group_size, bits=bits, mode=mode)
    same = [mx.array_equal(one, other) for one, other in zip(found, expected, strict=True)]
    return all(one.item() for one in same)


def not_finite(weight: mx.array) -> mx.array:
    """Return, lazily, whether an element is infinite or NaN. Twenty times faster than isfinite."""
    signed, unsigned = _integers(weight.dtype)
    return _odd(weight.dtype, mx.max(weight.view(signed)), mx.max(weight.view(unsigned)))


def _affine(groups: mx.array, bits: int) -> tuple[mx.array, tuple[mx.array, ...], mx.array]:
    """Return codes, scales and biases of groups, and whether an element is not finite."""
    least, most, odd = _extremes(groups)
    top = 2**bits - 1
    scales = mx.maximum((most - least) / top, AFFINE_EPS)
    below = mx.abs(least) > mx.abs(most)
    scales = mx.where(below, scales, -scales)
    edge = mx.where(below, least, most)
    steps = mx.round(edge / scales)
    near_zero = steps == 0
    scales = mx.where(near_zero, scales, edge / steps)
    biases = mx.where(near_zero, 0.0, edge)
    codes = (groups.astype(mx.float32) - biases) / scales + ROUND
    if bits == 8:
        codes = mx.minimum(codes, ROUND + top)  # or the code 256 were a 0
    codes = codes.view(mx.uint32).astype(mx.uint8)
    if bits < 8:
        codes = mx.minimum(codes, top)  # of bytes it is sooner found
    return codes, (scales.astype(groups.dtype), biases.astype(groups.dtype)), odd


def _floats(groups: mx.array, mode: str) -> tuple[mx.array, tuple[mx.array, ...], mx.array]:
    """Return codes and scales of groups, and whether an element is ``LARGE``.

    Codes are e2m1 in mxfp4 and nvfp4, e4m3 in mxfp8, scales e8m0, but e4m3 in nvfp4 (OCP
    Microscaling Formats 1.0; how a scale is chosen is MLX's own).
    """
    dtype = groups.dtype
    signed, unsigned = _integers(dtype)
    sign = 1 << (8 * dtype.size - 1)
    bits = groups.view(unsigned)
    sizes = bits & (sign - 1)
    most = mx.max(sizes.view(signed), axis=-1, keepdims=True)  # floats are in order of their bits
    odd = mx.max(most) >= mx.array(LARGE, dtype).view(signed)
    top = mx.array(E4M3_MAX if mode == "mxfp8" else E2M1_MAX, dtype)
    peak = (most.view(dtype) / top).astype(mx.float32)
    if mode == "nvfp4":
        scales = mx.to_fp8(peak)
        divisor = mx.from_fp8(scales, dtype)
        divisor = mx.where(divisor == 0, float("inf"), divisor)
    else:
        exponent = mx.where(peak == 0, 0.0, mx.ceil(mx.log2(peak)))
        scales = (exponent + E8M0_BIAS).astype(mx.uint8)
        divisor = mx.power(2.0, exponent).astype(dtype)
    if mode == "mxfp8":
        return mx.to_fp8(groups.astype(mx.float32) / divisor.astype(mx.float32)), (scales,), odd
    quotients = sizes.view(dtype) / divisor
    if dtype == mx.float32:  # 16 bits are enough: rounded up, what is above a bound stays so
        quotients = ((quotients.view(mx.uint32) + 0xFFFF) >> 16).astype(mx.uint16)
    quotients = quotients.view(mx.int16)
    bounds = mx.array(E2M1_BOUNDS, mx.bfloat16 if dtype == mx.float32 else dtype).view(mx.int16)
    above = [(quotients > bound).view(mx.uint8) for bound in bounds]
    codes = sum(above[1:], above[0])
    minus = (bits >> (8 * dtype.size - 4)).astype(mx.uint8) & 8
    return codes | mx.minimum(codes * 8, minus), (scales,), odd  # there is no -0


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

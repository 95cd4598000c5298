"""kernels: quantizes blocks of weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd, inf
from typing import Any

from tasks.tensors import mx

AFFINE_EPS = 1e-7  # the least scale, as MLX has it
ROUND = 1.5 * 2.0**23  # a float32 that is added to it is rounded, ties to even, into its low bits
E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # above each, the next of 0 0.5 1 1.5 2 3 4 6
E2M1_MAX, E4M3_MAX = 6, 448
E8M0_BIAS = 127
LARGE = 2.0**30  # from about here on MLX overflows in ways of its own, another in each mode
TOLERANCE = 0.1  # of what weights are, by which a GPU's roundings may differ: memory is all of it
LANE = 64  # bits of the widest integer


def quantize(
    weight: mx.array,
    *,
    group_size: int,
    bits: int,
    mode: str,
    stream: mx.Stream | None = None,
) -> tuple[mx.array, ...]:
    """Quantize a weight.

    Args:
        weight: (…, rows, columns), columns a multiple of ``group_size``.
        group_size: weights that share a scale.
        bits: bits per weight.
        mode: ``affine``, ``mxfp4``, ``mxfp8``, ``nvfp4``.
        stream: what computes it; by default the thread's own.

    Returns:
        The packed weight, uint32 (…, rows, columns · bits / 32); scales (…, rows,
        columns / group_size); and for ``affine`` biases, shaped as the scales.
    """
    return tuple(mx.quantize(weight, group_size, bits, mode, stream=stream))


def dequantize(
    packed: Sequence[mx.array],
    *,
    group_size: int,
    bits: int,
    mode: str,
    stream: mx.Stream | None = None,
) -> mx.array:
    """Return what rows of a quantized weight stand for, in the dtype that MLX gives it.

    Args:
        packed: as ``quantize`` returns it: (rows, …) each.
        group_size: as for ``quantize``, like all that follow.
        bits: bits per weight.
        mode: how it was quantized.
        stream: what computes it.
    """
    count = len(packed[0])
    weight, scales, *rest = (even_rows(part, stream) for part in packed)
    biases = rest[0] if rest else None
    made = mx.dequantize(weight, scales, biases, group_size, bits, mode, stream=stream)
    if len(made) == count:
        return made
    return mx.as_strided(made, (count, *made.shape[1:]), stream=stream)


def even_rows(rows: mx.array, stream: mx.Stream | None = None) -> mx.array:
    """Return rows, and one of zeros if their number is odd: on a CPU MLX takes nvfp4 in pairs."""
    return mx.pad(rows, [(0, 1), (0, 0)], stream=stream) if len(rows) % 2 else rows


def quantize_fast(
    weight: mx.array, *, group_size: int, bits: int, mode: str
) -> tuple[tuple[mx.array, ...], mx.array]:
    """Quantize as MLX does on a CPU, in half of its time, in fp4 in a tenth or less.

    In mode affine MLX's kernel takes one weight after another, and for fp4 each weight is compared
    with all sixteen numbers of that. Here each step is taken for all weights of a block, which a
    compiler makes vectors of: the same numbers in the same precision, so the same bits. ``agrees``
    tells whether those are the installed MLX's.

    Args:
        weight: as for ``quantize``: float16, bfloat16 or float32.
        group_size: weights that share a scale.
        bits: bits per weight.
        mode: as for ``quantize``.

    Returns:
        As ``quantize``; and, not evaluated yet, whether an element is infinite, NaN or at least
        ``LARGE``. If so, what was made may differ from what ``quantize`` makes.
    """
    groups = weight.reshape(-1, group_size)
    if mode == "affine":
        codes, parts, large = _affine(groups, bits)
    else:
        codes, parts, large = _floats(groups, mode)
    parts = (pack(codes.reshape(-1), bits).view(mx.uint32), *parts)
    return tuple(part.reshape(*weight.shape[:-1], -1) for part in parts), large


@lru_cache
def agrees(dtype: mx.Dtype, group_size: int, bits: int, mode: str) -> bool:
    """Tell, by a sample, whether the MLX that is installed quantizes as ``quantize_fast``."""
    width = 128  # of rows: a multiple of each group size
    exponents = mx.arange(-44, 4)[:, None]
    spread = mx.random.normal((48, 2 * width), key=mx.random.key(0)) * mx.power(2.0, exponents)
    spread = spread.reshape(-1, width)
    # Groups whose largest is about where a scale of mxfp4 and mxfp8 changes; ties; zeros.
    ulps = 1 + mx.arange(-2, 3) * 2.0**-23
    changes = mx.concatenate([most * ulps for most in (E2M1_MAX, E4M3_MAX)])
    changes = (mx.power(2.0, mx.arange(-9, 3))[:, None] * changes).reshape(-1, 1)
    ties = (mx.arange(width) % 61 - 30)[None] / 4
    rows = [spread, mx.abs(spread[-32:]), -mx.abs(spread[-32:]), ties, ties * 0]
    sample = mx.concatenate([*rows, mx.repeat(changes, width, axis=1)]).astype(dtype)
    fast, _ = quantize_fast(sample, group_size=group_size, bits=bits, mode=mode)
    expected = quantize(sample, group_size=group_size, bits=bits, mode=mode)
    same = [mx.array_equal(one, other) for one, other in zip(fast, expected, strict=True)]
    return all(one.item() for one in same)


@lru_cache
def gpu_agrees(dtype: mx.Dtype, group_size: int, bits: int, mode: str) -> bool:
    """Tell, by a sample, whether what the GPU makes stands for what it was given.

    It need not have the bits that a CPU makes. But where MLX's CUDA backend has no kernel, as of 1
    bit, ``mx.quantize`` returns what lay in memory, without a word.
    """
    options: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    on_cpu, on_gpu = mx.new_stream(mx.cpu), mx.new_stream(mx.gpu)
    sample = mx.random.normal((8, 512), key=mx.random.key(0), stream=on_cpu)
    sample = sample.astype(dtype, stream=on_cpu)
    mx.eval(sample)
    made, expected = (
        dequantize(quantize(sample, **options, stream=stream), **options, stream=on_cpu)
        for stream in (on_gpu, on_cpu)
    )
    apart, size = (
        mx.mean(mx.abs(each, stream=on_cpu), stream=on_cpu)
        for each in (mx.subtract(made, expected, stream=on_cpu), expected)
    )
    most = mx.multiply(size, TOLERANCE, stream=on_cpu)
    return bool(mx.less(apart, most, stream=on_cpu).item())  # False of NaN


def not_finite(weight: mx.array, stream: mx.Stream | None = None) -> mx.array:
    """Return, lazily, whether an element is infinite or NaN. Twenty times faster than isfinite."""
    views = (weight.view(integers, stream=stream) for integers in _integers(weight.dtype))
    positive, negative = (mx.max(view, stream=stream) for view in views)
    return _reaches(weight.dtype, positive, negative, bound=inf, stream=stream)


def _affine(groups: mx.array, bits: int) -> tuple[mx.array, tuple[mx.array, ...], mx.array]:
    """Return codes, scales and biases of groups, and whether an element is ``LARGE``."""
    least, most, large = _extremes(groups)
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
    return codes, (scales.astype(groups.dtype), biases.astype(groups.dtype)), large


def _floats(groups: mx.array, mode: str) -> tuple[mx.array, tuple[mx.array, ...], mx.array]:
    """Return codes and scales of groups, and whether an element is ``LARGE``.

    Codes are e2m1 in mxfp4 and nvfp4, e4m3 in mxfp8, scales e8m0, but e4m3 in nvfp4 (OCP
    Microscaling Formats 1.0; how a scale is chosen is MLX's own).
    """
    dtype = groups.dtype
    signed, unsigned = _integers(dtype)
    sign = 1 << (8 * dtype.size - 1)
    raw = groups.view(unsigned)
    sizes = raw & (sign - 1)
    most = mx.max(sizes.view(signed), axis=-1, keepdims=True)  # floats are in order of their bits
    large = mx.max(most) >= _bounds(dtype, LARGE)[0]
    top = mx.array(E4M3_MAX if mode == "mxfp8" else E2M1_MAX, dtype)
    peak = (most.view(dtype) / top).astype(mx.float32)
    if mode == "nvfp4":
        scales = mx.to_fp8(peak)
        divisor = mx.from_fp8(scales, dtype)
        divisor = mx.where(divisor == 0, inf, divisor)  # a group that is too small is all zeros
    else:
        exponent = mx.where(peak == 0, 0.0, mx.round(mx.log2(peak)))
        exponent = exponent + (mx.power(2.0, exponent) < peak)  # ceil misses one, as log2 rounds
        scales = (exponent + E8M0_BIAS).astype(mx.uint8)
        divisor = mx.power(2.0, exponent).astype(dtype)
    if mode == "mxfp8":
        return mx.to_fp8(groups.astype(mx.float32) / divisor.astype(mx.float32)), (scales,), large
    quotients = sizes.view(dtype) / divisor
    bounds = mx.array(E2M1_BOUNDS, dtype)
    if dtype == mx.float32:
        # Half of the bits do, rounded up: a bound has none in the other half, so what is above it
        # stays above it.
        bounds = bounds.astype(mx.bfloat16)
        quotients = ((quotients.view(mx.uint32) + 0xFFFF) >> 16).astype(mx.uint16)
    quotients, bounds = quotients.view(mx.int16), bounds.view(mx.int16)
    above = [(quotients > bound).view(mx.uint8) for bound in bounds]
    codes = sum(above[1:], above[0])
    minus = (raw >> (8 * dtype.size - 4)).astype(mx.uint8) & 8
    return codes | mx.minimum(codes * 8, minus), (scales,), large  # a zero has no sign


def _extremes(groups: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return, in float32, the least and the largest of each group; and whether one is ``LARGE``.

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
    large = _reaches(groups.dtype, mx.max(positive), mx.max(negative), bound=LARGE)
    least, most = (one.view(groups.dtype).astype(mx.float32) for one in (least, most))
    return least, most, large


def _reaches(
    dtype: mx.Dtype,
    positive: mx.array,
    negative: mx.array,
    *,
    bound: float,
    stream: mx.Stream | None = None,
) -> mx.array:
    """Tell whether floats reach ``bound`` or its negative. NaN is more than infinity.

    Args:
        dtype: of the floats.
        positive: the largest of their bits as signed integers: no sign bit, unless all have it.
        negative: the largest as unsigned integers: the sign bit, unless none has it.
        bound: positive; what ``dtype`` cannot hold is infinity.
        stream: what computes it.
    """
    positive_bound, negative_bound = _bounds(dtype, bound)
    return mx.logical_or(
        mx.greater_equal(positive, positive_bound, stream=stream),
        mx.greater_equal(negative, negative_bound, stream=stream),
        stream=stream,
    )


@lru_cache
def _bounds(dtype: mx.Dtype, bound: float) -> tuple[mx.array, mx.array]:
    """Return the bits of a number as a signed, and of its negative as an unsigned integer."""
    signed, unsigned = _integers(dtype)
    bits = mx.array(bound, dtype).view(signed, stream=mx.cpu).item()
    negative_bits = mx.array(-bound, dtype).view(unsigned, stream=mx.cpu).item()
    return mx.array(bits, signed), mx.array(negative_bits, unsigned)


def _integers(dtype: mx.Dtype) -> tuple[mx.Dtype, mx.Dtype]:
    """Return what to view floats as, signed and unsigned."""
    return (mx.int16, mx.uint16) if dtype.size == 2 else (mx.int32, mx.uint32)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Put codes of ``bits`` bits one after another, little-endian: (codes,), uint8.

    Neighbours are moved together, twice as many each time, until they fill an integer, or there is
    no wider one: then the bytes of each that are filled are taken.
    """
    integers = {8: mx.uint8, 16: mx.uint16, 32: mx.uint32, 64: mx.uint64}
    filled, lane = bits, 8  # bits of each integer that are codes, and all its bits
    while filled not in integers and lane < LANE:
        wide = codes.view(integers[2 * lane])
        codes = wide - (wide >> lane) * (2**lane - 2**filled)
        filled, lane = 2 * filled, 2 * lane
    if filled in integers:
        return codes.astype(integers[filled])
    unit = gcd(filled, 16)
    return codes.view(integers[unit]).reshape(-1, lane // unit)[:, : filled // unit].reshape(-1)

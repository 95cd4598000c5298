"""gptq: weights rounded one channel after another, each error made good by the channels to come.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): what a layer makes of its inputs
changes by ``tr(E H Eᵀ)``, where E is the error of its weights and H the sum of the products of its
inputs' channels, the *Hessian*. Groups of channels that share a scale are taken in the order of
what they are given, the largest first, and the channels of a group likewise, since what is rounded
late has few others left to make it good. A group's scales are found as it begins, of what the
groups before have left of it, and in the precision in which they are stored.
"""

from __future__ import annotations

from typing import NamedTuple

from tasks.tensors import kernels, mx

DAMPING = 0.01  # of the diagonal's mean, added to it, as the paper has it


class Order(NamedTuple):
    """In what order a weight's channels are rounded, and how errors are handed on.

    Attributes:
        channels: their numbers, in order: (channels,).
        groups: numbers of the groups, in order.
        factor: upper triangular U with UᵀU the inverse of the Hessian in that order: (channels,
            channels), float32.
    """

    channels: mx.array
    groups: mx.array
    factor: mx.array


def order(hessian: mx.array, group_size: int) -> Order:
    """Return the order in which channels are rounded; on a stream of the CPU.

    MLX factors matrices there alone, and has float64.

    Args:
        hessian: the sum over inputs x of xxᵀ: (channels, channels). If all of it is zero, errors
            are not handed on.
        group_size: how many channels share a scale.
    """
    hessian = hessian.astype(mx.float64)
    diagonal = mx.diag(hessian)
    given = diagonal.reshape(-1, group_size)
    groups = mx.argsort(-given.sum(axis=1))
    inside = mx.argsort(-given, axis=1)
    channels = (inside + mx.arange(0, diagonal.size, group_size)[:, None])[groups].reshape(-1)
    damping = DAMPING * diagonal.mean()
    damping = mx.where(damping > 0, damping, mx.array(1.0, mx.float64))
    hessian = hessian[channels][:, channels] + damping * mx.eye(diagonal.size, dtype=mx.float64)
    # Of the reversed matrix, the lower factor is the upper one of the matrix, reversed.
    upper = mx.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    factor = mx.linalg.tri_inv(upper, upper=True).astype(mx.float32)
    mx.eval(channels, groups, factor)
    return Order(channels, groups, factor)


def quantize(
    weight: mx.array, order: Order, *, group_size: int, bits: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Return rows of a weight as ``mx.quantize`` packs them in mode ``affine``.

    Args:
        weight: (rows, channels).
        order: of the channels.
        group_size: how many of them share a scale.
        bits: of each.

    Returns:
        The packed weight, uint32, the scales and the biases: (rows, …).
    """
    left = weight.astype(mx.float32).T[order.channels]
    codes, scales, biases = [], [], []
    for start in range(0, weight.shape[1], group_size):
        group, left = left[:group_size], left[group_size:]
        given = group.T.astype(weight.dtype)
        _, scale, bias = kernels.quantize(given, group_size=group_size, bits=bits, mode="affine")
        factor = order.factor[start : start + group_size, start:]
        code, errors = _round_group(
            2**bits - 1,
            group,
            scale.astype(mx.float32).reshape(-1),
            bias.astype(mx.float32).reshape(-1),
            factor[:, :group_size],
        )
        if left.size:  # not all that MLX has takes arrays of no size
            left = left - factor[:, group_size:].T @ errors
        codes.append(code)
        scales.append(scale)
        biases.append(bias)
        mx.eval(left, codes[-1], scale, bias)
    packed = mx.concatenate(codes)[mx.argsort(order.channels)].T
    groups = mx.argsort(order.groups)
    return (
        _pack(packed, bits),
        mx.concatenate(scales, axis=1)[:, groups],
        mx.concatenate(biases, axis=1)[:, groups],
    )


def _round_group(
    most: int, group: mx.array, scale: mx.array, bias: mx.array, factor: mx.array
) -> tuple[mx.array, mx.array]:
    """Round a group of channels, one after another.

    Args:
        most: the largest code.
        group: (channels, rows).
        scale: (rows,).
        bias: (rows,).
        factor: (channels, channels).

    Returns:
        Codes, uint8, and what is to be made good of their errors: (channels, rows).
    """
    inverse = mx.where(scale == 0, 0, 1 / scale)
    codes, errors = [], []
    for at in range(len(factor)):
        column = group[0]
        code = mx.clip(mx.round((column - bias) * inverse), 0, most)
        error = (column - (code * scale + bias)) / factor[at, at]
        if at + 1 < len(factor):
            group = group[1:] - factor[at, at + 1 :, None] * error
        codes.append(code.astype(mx.uint8))
        errors.append(error)
    return mx.stack(codes), mx.stack(errors)


def _pack(codes: mx.array, bits: int) -> mx.array:
    """Put codes of ``bits`` bits one after another, little-endian: (rows, channels), uint8.

    Eight of them fill as many bytes as they have bits.
    """
    eight = codes.reshape(-1, 8).astype(mx.uint64)
    together = (eight << mx.arange(0, 8 * bits, bits, mx.uint64)).sum(axis=1)
    packed = together[:, None].view(mx.uint8)[:, :bits].reshape(len(codes), -1)
    return mx.contiguous(packed).view(mx.uint32)

"""gptq: weights rounded one channel after another, each error made good by the channels to come.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323): what a layer makes of its inputs
changes by ``tr(E H Eᵀ)``, where E is the error of its weights and H the sum of the products of its
inputs' channels, the *Hessian*. Groups of channels that share a scale are taken in the order of
what they are given, the largest first, and the channels of a group likewise, since what is rounded
late has few others left to make it good. A group's scales are found as it begins, of what the
groups before have left of it, and in the precision in which they are stored.

The paper takes rows of a factor of the inverse of H. With H itself as CCᵀ, C triangular, the change
is the sum of the squares of EC: what a column of that has of earlier channels' errors, the channels
of a group make good together, by the inverse of their own part of C. That comes to the same, and
nothing larger is inverted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tasks.tensors import blas, mx

if TYPE_CHECKING:
    import numpy as np

VERSION = 2  # of this; raised when it makes other numbers
DAMPING = 0.01  # of the diagonal's mean, added to it, as the paper has it
BLOCK = 512  # channels that are factored together: the fastest, and more take more memory


class Order(NamedTuple):
    """In what order a weight's channels are rounded, and how errors are handed on.

    Attributes:
        channels: their numbers, in order: (channels,).
        groups: numbers of the groups, in order.
        factor: what an earlier channel's error, in a row, adds to a later one, in a column: of
            another group, as that begins; of its own, to what that is then. Upper triangular,
            (channels, channels), float32.
    """

    channels: np.ndarray
    groups: np.ndarray
    factor: np.ndarray


def order(read: Callable[[], Iterable[np.ndarray]], channels: int, group_size: int) -> Order:
    """Return the order in which channels are rounded.

    It holds one matrix in float64, which is worked on in its place, and blocks of ``BLOCK`` rows.

    Args:
        read: yields the rows of the sum over inputs x of xxᵀ, float32, some at a time. If all of it
            is zero, errors are not handed on.
        channels: how many there are.
        group_size: how many of them share a scale.
    """
    import numpy as np

    blas.one_thread()
    diagonal = np.concatenate(
        [rows[np.arange(len(rows)), np.arange(at, at + len(rows))] for at, rows in _placed(read())]
    ).astype(np.float64)
    given = diagonal.reshape(-1, group_size)
    groups = np.argsort(-given.sum(axis=1), kind="stable")
    inside = np.argsort(-given, axis=1, kind="stable")
    numbers = (inside + np.arange(0, channels, group_size)[:, None])[groups].reshape(-1)
    # Of the reversed matrix, the lower factor is the upper one of the matrix, reversed.
    backwards = numbers[::-1]
    place = np.empty(channels, np.int64)
    place[backwards] = np.arange(channels)
    factor = np.empty((channels, channels), np.float64)
    for at, rows in _placed(read()):
        for row, to in zip(rows, place[at : at + len(rows)], strict=True):
            factor[to] = row[backwards]
    factor[np.diag_indices_from(factor)] += DAMPING * diagonal.mean() or 1.0
    _factor(factor)
    _reverse(factor)
    for start in range(0, channels, group_size):
        before, own = np.split(factor[: start + group_size, start : start + group_size], [start])
        before[:] = before @ np.linalg.inv(own)
        own /= own.diagonal().copy()
    return Order(numbers, groups, _narrow(factor))


def order_memory(channels: int) -> int:
    """Return the bytes that ``order`` holds at once."""
    together = min(channels, BLOCK)
    return 8 * (channels**2 + channels * together + 2 * together**2)


def _placed(blocks: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of rows, with the number of each one's first row."""
    at = 0
    for rows in blocks:
        yield at, rows
        at += len(rows)


def _factor(matrix: np.ndarray) -> None:
    """Put the lower Cholesky factor of a matrix in its place, ``BLOCK`` columns at a time."""
    import numpy as np

    size = len(matrix)
    if size <= BLOCK:
        matrix[:] = np.linalg.cholesky(matrix)
        return
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        own = np.linalg.cholesky(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = own
        matrix[start:stop, stop:] = 0
        below = matrix[stop:, start:stop]
        below[:] = below @ np.linalg.inv(own).T
        for column in range(stop, size, BLOCK):
            ahead = matrix[column:, column : column + BLOCK]
            ahead -= below[column - stop :] @ below[column - stop :][:BLOCK].T


def _reverse(matrix: np.ndarray) -> None:
    """Reverse the rows and columns of a matrix, in its place."""
    for first in range((len(matrix) + 1) // 2):
        last = len(matrix) - 1 - first
        row = matrix[first, ::-1].copy()
        matrix[first] = matrix[last, ::-1]
        matrix[last] = row


def _narrow(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix of float64 in float32, in the first half of the same memory."""
    import numpy as np

    size = len(matrix)
    narrow = matrix.reshape(-1).view(np.float32)[: size * size].reshape(size, size)
    for number, row in enumerate(matrix):
        narrow[number] = row.astype(np.float32)  # a copy: of the first row, both are in one place
    return narrow


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
    import numpy as np

    blas.one_thread()
    left = np.array(weight.astype(mx.float32, stream=mx.cpu)).T[order.channels]
    codes = np.empty(left.shape, np.uint8)
    scales, biases = np.empty((2, len(order.groups), left.shape[1]), np.float32)
    for number, group in enumerate(order.groups):
        start, stop = number * group_size, (number + 1) * group_size
        factor = order.factor[:stop, start:stop]
        made_good = factor[:start].T @ left[:start]
        made_good += left[start:stop]
        scale, bias = _scale(made_good, weight.dtype, bits)
        codes[order.channels[start:stop]], errors = _round_group(
            2**bits - 1, made_good, scale, bias, factor[start:]
        )
        left[start:stop] += errors - made_good  # of errors alone
        scales[group], biases[group] = scale, bias
    return (
        mx.array(_pack(np.ascontiguousarray(codes.T), bits)),
        *(
            mx.array(np.ascontiguousarray(each.T)).astype(weight.dtype, stream=mx.cpu)
            for each in (scales, biases)
        ),
    )  # type: ignore[return-value]


def _scale(group: np.ndarray, dtype: mx.Dtype, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and the bias that MLX gives a group of channels, as ``dtype`` has them.

    Args:
        group: (channels, rows), float32.
        dtype: of the weight.
        bits: of each.
    """
    import numpy as np

    given = mx.array(np.ascontiguousarray(group.T)).astype(dtype, stream=mx.cpu)
    _, *both = mx.quantize(given, len(group), bits, stream=mx.cpu)
    scale, bias = (np.array(each.astype(mx.float32, stream=mx.cpu))[:, 0] for each in both)
    return scale, bias


def _round_group(
    most: int, group: np.ndarray, scale: np.ndarray, bias: np.ndarray, factor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Round a group of channels, one after another.

    Args:
        most: the largest code.
        group: (channels, rows), what groups before add to it included.
        scale: (rows,).
        bias: (rows,).
        factor: (channels, channels).

    Returns:
        Codes, uint8, and errors: (channels, rows).
    """
    import numpy as np

    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    adds = np.ascontiguousarray(factor.T)
    codes, errors = np.empty(group.shape, np.uint8), np.empty_like(group)
    for at, channel in enumerate(group):
        rounded = adds[at, :at] @ errors[:at]
        rounded += channel
        rounded -= bias
        rounded *= inverse
        np.rint(rounded, out=rounded)
        np.clip(rounded, 0, most, out=rounded)
        codes[at] = rounded
        rounded *= scale
        rounded += bias
        np.subtract(channel, rounded, out=errors[at])
    return codes, errors


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Put codes of ``bits`` bits one after another, little-endian: (rows, channels), uint8.

    As ``kernels.pack`` does, by NumPy: nothing here waits for a stream of MLX's. Eight of them fill
    as many bytes as they have bits.
    """
    import numpy as np

    eight = codes.reshape(-1, 8).astype("<u8")
    together = np.bitwise_or.reduce(eight << np.arange(0, 8 * bits, bits, dtype="<u8"), axis=1)
    packed = together[:, None].view(np.uint8)[:, :bits].reshape(len(codes), -1)
    return np.ascontiguousarray(packed).view("<u4")

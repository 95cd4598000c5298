"""bits: whole numbers of a few bits, packed into words."""

from __future__ import annotations

from tasks.core.errors import CheckpointError
from tasks.tensors import kernels, mx
from tasks.tensors.rows import Rows


def stream(words: mx.array, bits: int, count: int) -> mx.array:
    """Return numbers that follow each other without a gap, from the first word's lowest bit on.

    Args:
        words: (words, columns), 32 bits each.
        bits: of a number; one may lie in two words.
        count: how many there are in a column.

    Returns:
        (count, columns), uint32.
    """
    words = words.view(mx.uint32)
    at = mx.arange(count, dtype=mx.uint32) * bits
    word, shift = at // 32, (at % 32)[:, None]
    low = words[word] >> shift
    if 32 % bits:
        following = words[mx.minimum(word + 1, words.shape[0] - 1)]
        crosses = shift + bits > 32
        low = mx.where(crosses, low | (following << (32 - shift) % 32), low)
    return low & ((1 << bits) - 1)


def fields(words: mx.array, bits: int) -> mx.array:
    """Return numbers of which each word holds as many as it can, the first lowest.

    Args:
        words: (rows, words), 32 bits each.
        bits: of a number.

    Returns:
        (rows, words · (32 // bits)), uint32.
    """
    shifts = mx.arange(32 // bits, dtype=mx.uint32) * bits
    numbers = (words.view(mx.uint32)[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.reshape(words.shape[0], -1)


def powers_of_two(exponents: mx.array) -> mx.array:
    """Return what bytes of E8M0 stand for, float32: 2 to each less 127; 255 is no number."""
    # A power of two has its exponent alone; 0 stands for 2^-127, which float32 has as 2^22.
    powers = mx.maximum(exponents.astype(mx.uint32) << 23, 1 << 22).view(mx.float32)
    return mx.where(exponents == 255, mx.nan, powers)


def pack(numbers: mx.array, bits: int) -> mx.array:
    """Return numbers that follow each other without a gap in words, the first lowest.

    Args:
        numbers: (rows, columns), uint32; columns · bits is a multiple of 32.
        bits: of a number.

    Returns:
        (rows, columns · bits / 32), uint32: as MLX packs them.
    """
    packed = kernels.pack(numbers.astype(mx.uint8).reshape(-1), bits)
    return packed.view(mx.uint32).reshape(numbers.shape[0], -1)


def checked(indices: mx.array, stop: int, what: str) -> mx.array:
    """Return indices, of any shape, all of them from 0 to ``stop`` - 1.

    MLX reads whatever lies at an index, beyond its array as well.

    Raises:
        CheckpointError: one is none.
    """
    if indices.size:
        least, most = (int(f(indices).item()) for f in (mx.min, mx.max))  # type: ignore[arg-type]
        if least < 0 or most >= stop:
            raise CheckpointError(
                f"{what} has {least if least < 0 else most}, which is none of the numbers from 0 "
                f"to {stop - 1}. Fetch the checkpoint again."
            )
    return indices


def from_parts(
    source: Rows, bits: int, parts: int, start: int, stop: int, *, lowest_first: bool
) -> mx.array:
    """Return rows of numbers that were cut into parts of as many rows, which share bytes or words.

    Args:
        source: the bytes or words, (rows / parts, columns).
        bits: of a number.
        parts: how many there are; the last may have fewer rows.
        start: the first row, and
        stop: the row after the last, of all.
        lowest_first: whether the first part has the lowest bits, or the highest of ``parts``.

    Returns:
        (rows, columns), uint32.
    """
    high = source.shape[0]
    pieces = []
    for part in range(start // high, -(-stop // high)):
        first = part * high
        words = source.read(max(start, first) - first, min(stop, first + high) - first)
        shift = bits * (part if lowest_first else parts - 1 - part)
        pieces.append((words.astype(mx.uint32) >> shift) & ((1 << bits) - 1))
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)


def grouped(values: mx.array, group_size: int, columns: int) -> mx.array:
    """Return values of groups, (rows, groups), as those of each column: (rows, columns)."""
    if values.shape[1] == 1:
        return values
    return mx.repeat(values, group_size, axis=1)[:, :columns]

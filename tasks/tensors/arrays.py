"""arrays: MLX arrays from bytes and back, without a copy where there need be none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import cast

from cache.blobs import Blobs, Part
from tasks.tensors import cuda, mx


def read(
    blobs: Blobs,
    parts: Sequence[Part],
    dtype: str,
    shape: Sequence[int],
    memory: mx.array | None = None,
    on_read: Callable[[memoryview], None] | None = None,
) -> mx.array:
    """Return an array of the bytes in ``parts``.

    Args:
        blobs: the store.
        parts: the runs of bytes, row-major, little-endian.
        dtype: as MLX spells it.
        shape: of the array.
        memory: what to read them into, if it is large enough: (bytes,), uint8. The next that is
            read into it overwrites the array, so what is made of that must be evaluated before.
        on_read: called with the bytes, before they are used.

    Raises:
        FileChanged: a file has changed since it was first seen.
    """
    count = sum(part.length for part in parts)
    if memory is None or memory.size < count:
        memory = blank(count)
    if count:
        data = memoryview(cast(bytearray, memory))[:count]
        blobs.read_into(parts, data)
        if on_read:
            on_read(data)
    return memory[:count].view(getattr(mx, dtype)).reshape(shape)


def blank(count: int) -> mx.array:
    """Return new memory of the CPU that may be filled in place: (bytes,), uint8."""
    memory = mx.zeros((count,), mx.uint8, stream=mx.cpu)
    mx.eval(memory)
    return memory


def slice_parts(parts: Sequence[Part], start: int, stop: int) -> list[Part]:
    """Return the parts that hold bytes ``start`` to ``stop`` of what ``parts`` hold together."""
    cut = []
    at = 0
    for part in parts:
        first, last = max(start, at), min(stop, at + part.length)
        if first < last:
            cut.append(part._replace(offset=part.offset + first - at, length=last - first))
        at += part.length
    return cut


def share(array: mx.array) -> None:
    """Evaluate an array of the CPU, and let a GPU read it where it lies."""
    cuda.share(view(array))


def flat(array: mx.array, stream: mx.Stream | None = None) -> mx.array:
    """Return an array's bytes, row-major, little-endian, not evaluated yet: (bytes,), uint8.

    On the stream that the array is made on, by default the thread's own: another device would move
    it page by page.
    """
    row_major = mx.contiguous(array, stream=stream)
    return row_major.reshape(-1, stream=stream).view(mx.uint8, stream=stream)


def view(array: mx.array) -> memoryview:
    """Evaluate an array, and return its bytes as ``flat`` does."""
    if not array.size:
        return memoryview(b"")
    return views([array], together=False)[0]


def views(
    arrays: Sequence[mx.array],
    *others: mx.array,
    together: bool,
    stream: mx.Stream | None = None,
) -> list[memoryview]:
    """Evaluate arrays, and ``others``; return the bytes of each.

    Args:
        arrays: the arrays.
        others: arrays to be evaluated at the same time: each wait for a GPU costs.
        together: whether to join them into one array first, as should be for a GPU: its results
            then leave it in one go, and kernels that write small pieces write to its own memory.
        stream: what they are made on, see ``flat``.
    """
    flats = [flat(array, stream) for array in arrays]
    if not together:
        mx.eval(flats, others)
        return [memoryview(cast(bytes, one)) for one in flats]
    joined = mx.concatenate(flats, stream=stream)
    mx.eval(joined, others)
    memory = memoryview(cast(bytes, joined))
    cuda.share(memory)
    ends = accumulate(one.size for one in flats)
    return [memory[end - one.size : end] for one, end in zip(flats, ends, strict=True)]


def dtype_name(array: mx.array) -> str:
    """Return an array's dtype as MLX spells it."""
    return str(array.dtype).removeprefix("mlx.core.")


class Streams(threading.local):
    """Each thread's own MLX streams, one for each device, and memory to read blocks into.

    MLX runs what shares a stream one after another.
    """

    def __init__(self) -> None:
        self._streams: dict[str, mx.Stream] = {}
        self._memory: mx.array | None = None

    def get(self, device: str) -> mx.Stream:
        """Return this thread's stream on ``cpu`` or ``gpu``."""
        if device not in self._streams:
            self._streams[device] = mx.new_stream(mx.cpu if device == "cpu" else mx.gpu)
        return self._streams[device]

    def memory(self, count: int) -> mx.array:
        """Return memory of at least ``count`` bytes, to read one block after another into.

        (bytes,), uint8; a GPU can read it, too. New memory for each block would cost as much as
        reading it.
        """
        if self._memory is None or self._memory.size < count:
            self._memory = blank(count)
            share(self._memory)
        return self._memory

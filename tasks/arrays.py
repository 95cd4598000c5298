"""arrays: MLX arrays from bytes and back, without a copy where there need be none."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from cache.blobs import Blobs, Part


def read(blobs: Blobs, parts: Sequence[Part], dtype: str, shape: Sequence[int]) -> mx.array:
    """Return an array of the bytes in ``parts``.

    Args:
        blobs: the store.
        parts: the runs of bytes, row-major, little-endian.
        dtype: as MLX spells it.
        shape: of the array.

    Raises:
        FileChanged: a file is another than when it was found.
    """
    count = sum(part.length for part in parts)
    with mx.stream(mx.cpu):
        buffer = mx.zeros((count,), mx.uint8)
        mx.eval(buffer)
        if count:
            # The array is new and nobody else's, so its memory may be filled in place.
            blobs.read_into(parts, memoryview(cast(bytearray, buffer)))
        array = buffer.view(getattr(mx, dtype)).reshape(shape)
        mx.eval(array)
    return array


def view(array: mx.array) -> memoryview:
    """Return the bytes of an array, row-major, little-endian."""
    if not array.size:
        return memoryview(b"")
    with mx.stream(mx.cpu):
        flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
        mx.eval(flat)
    return memoryview(cast(bytes, flat))


def dtype_name(array: mx.array) -> str:
    """Return an array's dtype as MLX spells it."""
    return str(array.dtype).removeprefix("mlx.core.")


class Streams(threading.local):
    """One stream a thread and device: MLX runs what shares a stream one after another."""

    def __init__(self) -> None:
        self._streams: dict[str, mx.Stream] = {}

    def get(self, device: str) -> mx.Stream:
        """Return this thread's stream on ``cpu`` or ``gpu``."""
        if device not in self._streams:
            self._streams[device] = mx.new_stream(mx.cpu if device == "cpu" else mx.gpu)
        return self._streams[device]

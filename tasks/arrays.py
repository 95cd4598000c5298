"""arrays: MLX arrays from bytes and back, without a copy where there need be none."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from cache.blobs import Blobs, Part

SAFETENSORS_DTYPES = {
    "bool_": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16",
    "uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "complex64": "C64",
}  # fmt: skip


def read(blobs: Blobs, parts: Sequence[Part], dtype: str, shape: Sequence[int]) -> mx.array:
    """Return an array of the bytes in ``parts``, evaluated, on the current stream's device.

    Args:
        blobs: the store.
        parts: the runs of bytes, row-major, little-endian.
        dtype: as MLX spells it.
        shape: of the array.

    Raises:
        FileChanged: a file is another than when it was found.
    """
    count = sum(part.length for part in parts)
    if count and mx.default_device().type == mx.gpu:
        return _load(blobs, parts, dtype, shape)
    with mx.stream(mx.cpu):
        buffer = mx.zeros((count,), mx.uint8)
        mx.eval(buffer)
        if count:
            # The array is new and nobody else's, so its memory may be filled in place.
            blobs.read_into(parts, memoryview(cast(bytearray, buffer)))
        array = buffer.view(getattr(mx, dtype)).reshape(shape)
        mx.eval(array)
    return array


def _load(blobs: Blobs, parts: Sequence[Part], dtype: str, shape: Sequence[int]) -> mx.array:
    """Do as ``read``, by ``mx.load``, which copies to a GPU of its own memory at full speed."""
    file = _Safetensors(blobs, parts, dtype, shape)
    loaded = mx.load(cast(str, file), format="safetensors")  # its stubs know paths alone
    array = cast("dict[str, mx.array]", loaded)["array"]
    mx.eval(array)
    if file.error:
        raise file.error
    return array


class _Safetensors(io.RawIOBase):
    """Bytes in ``parts`` as if they were a safetensors file of one tensor, ``array``."""

    name = "array.safetensors"

    def __init__(self, blobs: Blobs, parts: Sequence[Part], dtype: str, shape: Sequence[int]):
        super().__init__()
        count = sum(part.length for part in parts)
        entry = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape)}
        header = json.dumps({"array": {**entry, "data_offsets": [0, count]}}).encode()
        self._header = len(header).to_bytes(8, "little") + header
        self._blobs = blobs
        self._parts = parts
        self._size = len(self._header) + count
        self._at = 0
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read; an error waits in ``error``, as MLX's thread that calls this cannot raise it."""
        target = memoryview(buffer).cast("B")
        begin = len(self._header)
        if self._at < begin:
            piece = self._header[self._at : self._at + len(target)]
            target[: len(piece)] = piece
            count = len(piece)
        else:
            count = min(len(target), self._size - self._at)
            start = self._at - begin
            try:
                self._blobs.read_into(slice_parts(self._parts, start, start + count), target)
            except Exception as error:
                self.error = error
        self._at += count
        return count


def slice_parts(parts: Sequence[Part], start: int, stop: int) -> list[Part]:
    """Return the parts that hold bytes ``start`` to ``stop`` of what ``parts`` hold together."""
    found = []
    at = 0
    for part in parts:
        first, last = max(start, at), min(stop, at + part.length)
        if first < last:
            found.append(part._replace(offset=part.offset + first - at, length=last - first))
        at += part.length
    return found


def flat(array: mx.array) -> mx.array:
    """Return an array's bytes, row-major, little-endian, not evaluated yet: (bytes,), uint8.

    On the current stream, which had better be the one that the array is made on: another device's
    would move it page by page.
    """
    return mx.contiguous(array).reshape(-1).view(mx.uint8)


def view(array: mx.array) -> memoryview:
    """Evaluate an array, and return its bytes as ``flat`` does."""
    if not array.size:
        return memoryview(b"")
    found = flat(array)
    mx.eval(found)
    return memoryview(cast(bytes, found))


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

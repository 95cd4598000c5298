"""npz_format: how an .npz file is laid out, as ``mx.savez`` writes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from struct import pack

from cache.records.manifests import Tensor, TensorSpec
from tasks.layouts.weight_file import Shard, WeightFormat

# As mx.savez spells them; NumPy has no bfloat16, MLX reads two raw bytes as one.
DTYPES = {
    "bool_": "|b1", "uint8": "|u1", "int8": "|i1", "uint16": "<u2", "int16": "<i2",
    "uint32": "<u4", "int32": "<i4", "uint64": "<u8", "int64": "<i8", "float16": "<f2",
    "bfloat16": "<V2", "float32": "<f4", "complex64": "<c8",
}  # fmt: skip
ZIP32_LIMIT = 0xFFFFFFFF  # sizes and offsets from here on are in ZIP64 records
_IN_ZIP64 = 0xFFFFFFFF  # stands in their place


def _arrange(shard: Shard, crcs: Iterable[int]) -> Iterator[bytes | str]:
    """Lay out an .npz file as mx.savez does: a zip archive of uncompressed .npy files.

    Dated 1980, so that equal weights are equal files. The format is PKWARE's APPNOTE 6.3.10,
    ZIP64 where a size or an offset needs it.
    """
    directory = []
    at = 0
    for (name, tensor), crc in zip(shard, crcs, strict=True):
        npy = _npy_header(tensor)
        size = len(npy) + tensor.nbytes
        local, central = _zip_entry(f"{name}.npy".encode(), crc, size, at)
        directory.append(central)
        yield local + npy
        yield name
        at += len(local) + size
    yield b"".join(directory) + _zip_end(len(directory), sum(map(len, directory)), at)


def _zip_entry(name: bytes, crc: int, size: int, at: int) -> tuple[bytes, bytes]:
    """Return a member's header before its data, and its entry in the directory."""
    large = size >= ZIP32_LIMIT
    extra = pack("<HHQQ", 1, 16, size, size) if large else b""
    short = _IN_ZIP64 if large else size
    version = 45 if large else 20
    flags = 0 if name.isascii() else 0x800  # UTF-8
    common = pack("<HHHHHLLL", version, flags, 0, 0, 0x21, crc, short, short)
    local = b"PK\x03\x04" + common + pack("<HH", len(name), len(extra)) + name + extra

    far = at >= ZIP32_LIMIT
    fields = ((size, size) if large else ()) + ((at,) if far else ())
    extra = pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
    short_at = _IN_ZIP64 if far else at
    made_by = 0x0300 | (45 if fields else 20)  # Unix
    needs = 45 if fields else 20
    common = pack("<HHHHHHLLL", made_by, needs, flags, 0, 0, 0x21, crc, short, short)
    tail = pack("<HHHHHLL", len(name), len(extra), 0, 0, 0, 0o600 << 16, short_at)
    return local, b"PK\x01\x02" + common + tail + name + extra


def _zip_end(count: int, size: int, at: int) -> bytes:
    """Return what ends a zip archive whose directory of ``size`` bytes begins at ``at``."""
    end = b""
    if at >= ZIP32_LIMIT or count >= 0xFFFF:
        record = pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, size, at)
        end = b"PK\x06\x06" + record + b"PK\x06\x07" + pack("<LQL", 0, at + size, 1)
        count, at = 0xFFFF, _IN_ZIP64
    return end + b"PK\x05\x06" + pack("<HHHHLLH", 0, 0, count, count, size, at, 0)


def _npy_header(tensor: Tensor | TensorSpec) -> bytes:
    """Return what comes before the data in a .npy file, version 1.0 (numpy.lib.format)."""
    shape = "".join(f"{size}, " for size in tensor.shape)
    dtype = DTYPES[tensor.dtype]
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({shape}), }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + pack("<H", len(text)) + text.encode()


NPZ = WeightFormat("npz", ".npz", _arrange, _npy_header)

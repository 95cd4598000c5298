"""safetensors_format: how a .safetensors file is laid out, with the metadata that MLX writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tasks.layouts.weight_file import Shard, WeightFormat

DTYPES = {
    "bool_": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16",
    "uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "complex64": "C64",
}  # fmt: skip


def _arrange(shard: Shard, _crcs: Iterable[int]) -> Iterator[bytes | str]:
    """Lay out a safetensors file (https://github.com/huggingface/safetensors)."""
    raw = f"{{{','.join(_header_entries(shard))}}}".encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors begin on a multiple of 8
    yield len(raw).to_bytes(8, "little") + raw
    yield from (name for name, _ in shard)


def _header_entries(shard: Shard) -> Iterator[str]:
    """Yield the header's entries, JSON each: a dictionary of them all takes five times the room."""
    dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
    yield '"__metadata__":{"format":"mlx"}'
    offset = 0
    for name, tensor in shard:
        end = offset + tensor.nbytes
        entry = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        yield f"{dumps(name)}:{dumps(entry)}"
        offset = end


SAFETENSORS = WeightFormat("safetensors", ".safetensors", _arrange)

"""safetensors_file: where the tensors of a .safetensors file lie, by its header."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tasks.checkpoints.small_files import check_values, damaged
from tasks.checkpoints.source import Source
from tasks.checkpoints.stored import Stored, WeightFile, checked_name, checked_shape
from tasks.core.errors import CheckpointError

SUFFIXES: tuple[str, ...] = (".safetensors",)
MAX_HEADER_BYTES = 100_000_000  # as the safetensors library allows
MOST_VALUES = 5_000_000  # of JSON: of 450,000 tensors, five times those of the largest models


# Both spelled as mx.load gives them back, and no others than it takes. MLX has no eight-bit floats:
# models unpack the bytes.
SAFETENSORS_DTYPES = {
    "BOOL": "bool_", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "C64": "complex64", "F8_E4M3": "uint8",
    "F8_E8M0": "uint8",
}  # fmt: skip


def read(path: WeightFile) -> list[Stored]:
    """Read a safetensors file's header (https://github.com/huggingface/safetensors).

    Raises:
        CheckpointError: it is truncated, corrupt, or holds a dtype that MLX has not.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise damaged(path, f"its header should have {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    begin = 8 + length
    try:
        check_values(raw, MOST_VALUES)
        text = raw.decode("utf-8-sig")
        header = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
        metadata = header.pop("__metadata__", None)
        if isinstance(metadata, dict) and not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ has values that are no strings")
        json.dumps(metadata, ensure_ascii=False).encode()  # nor is half a surrogate pair text
        tensors = []
        filled = 0  # as the format asks: one tensor after the other, nothing between
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if start != filled:
                raise damaged(path, f"{name} begins at byte {start:,} of the data, not {filled:,}")
            filled = end
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{path}: {name} has dtype {entry['dtype']}, which MLX does not have. "
                    "Convert the checkpoint to one that it has: bfloat16, float16, float32."
                )
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            checked_name(name)
            shape = checked_shape(entry["shape"])
            stored = Stored(name, dtype, shape, path.name, begin + start)
            if stored.nbytes != end - start:
                raise damaged(path, f"{name} has {end - start:,} bytes for shape {shape}")
            tensors.append(stored)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise damaged(path, f"its header is not JSON of that format ({cause})") from error
    if begin + filled > size:  # what comes after the last one is nobody's, and mx.load takes it
        raise damaged(path, f"its tensors end at byte {begin + filled:,}, the file at {size:,}")
    order = {name: number for number, name in enumerate(header)}
    return sorted(tensors, key=lambda tensor: order[tensor.name])


def metadata(source: Source, name: str) -> dict[str, str]:
    """Return what a source's file says of itself; nothing if it is no safetensors file.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not name.endswith(SUFFIXES):
        return {}
    length = int.from_bytes(b"".join(source.read(name, 0, 8)), "little")
    if length > MAX_HEADER_BYTES:
        return {}  # of which who reads its tensors says that it is damaged
    try:
        header = json.loads(b"".join(source.read(name, 8, length)).decode("utf-8-sig"))
        return dict(header.get("__metadata__") or {})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, of which other readers take the first of two members of one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"{names.most_common(1)[0][0]} comes twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")

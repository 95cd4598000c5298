"""differences: where a built folder and another one differ, to the key and to the bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from safetensors import safe_open


def weight_differences(build: Path, reference: Path) -> Iterator[str]:
    """In the reference's files: metadata; names, dtypes, shapes and bytes of the tensors."""
    for path in sorted(reference.glob("*.safetensors")):
        if not (build / path.name).exists():
            yield f"{path.name}: missing"
            continue
        with safe_open(build / path.name, framework="numpy") as opened:
            if opened.metadata() != {"format": "mlx"}:
                yield f"{path.name}: metadata {opened.metadata()}"
        ours, theirs = mx.load(str(build / path.name)), mx.load(str(path))
        yield from (f"{path.name}: {name} missing" for name in sorted(theirs.keys() - ours.keys()))
        yield from (f"{path.name}: {name} too many" for name in sorted(ours.keys() - theirs.keys()))
        for name in sorted(ours.keys() & theirs.keys()):
            a, b = ours[name], theirs[name]
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                yield f"{path.name}: {name} is {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
            elif raw_bytes(a) != raw_bytes(b):
                yield f"{path.name}: {name} has other bytes"


def raw_bytes(array: mx.array) -> bytes:
    return bytes(array.reshape(-1).view(mx.uint8))


def read_json(path: Path) -> dict:
    """Parse a JSON file, which may not hold NaN or Infinity: they are not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path.name}: {constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def json_differences(where: str, ours: object, theirs: object) -> Iterator[str]:
    """Where two parsed files differ, to the key. 1, 1.0 and true are three things here."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        yield from (f"{where}{key} missing" for key in theirs if key not in ours)
        yield from (f"{where}{key} too many" for key in ours if key not in theirs)
        for key in theirs:
            if key in ours:
                yield from json_differences(f"{where}{key}.", ours[key], theirs[key])
    elif json.dumps(ours) != json.dumps(theirs):
        yield f"{where.rstrip('.')} is {json.dumps(ours)}, not {json.dumps(theirs)}"

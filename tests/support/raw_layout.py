"""raw_layout: a layout in one file, with a weight format of its own: a line of JSON, then bytes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.spec import Target
from tasks.layouts import mlx_lm
from tasks.layouts.model import Model
from tasks.layouts.weight_file import Shard, WeightFormat


def _arrange(shard: Shard, _crcs: Iterable[int]) -> Iterator[bytes | str]:
    yield json.dumps([[name, t.dtype, *t.shape] for name, t in shard]).encode() + b"\n"
    yield from (name for name, _ in shard)


weight_format = WeightFormat("raw", ".raw", _arrange)
default_shard_bytes = 100_000
loaded = "*.raw"
loading = ""
pipeline_tag = ""


def model(checkpoint: Checkpoint, memos: Memos) -> Model:
    return mlx_lm.model(checkpoint, memos)


def default_dtype(checkpoint: Checkpoint, model: Model) -> str | None:
    return "float32"


def check(target: Target, model: Model) -> None:
    pass


def config(target: Target, model: Model, quantization: dict[str, Any] | None) -> dict[str, Any]:
    return {"raw": True, "quantization": quantization}


def takes(name: str) -> bool:
    return name == "tokenizer.json"


def sources(checkpoint: Checkpoint) -> list[Path]:
    return [checkpoint.folder / "tokenizer.json"]


def files(
    checkpoint: Checkpoint,
    memos: Memos,
    shards: Sequence[Sequence[tuple[str, int]]],
    parameters: int,
) -> dict[str, bytes]:
    (tokenizer,) = sources(checkpoint)
    return {"words.json": tokenizer.read_bytes(), "count": str(parameters).encode()}


def tokenizer_files(checkpoint: Checkpoint, memos: Memos) -> dict[str, bytes]:
    return mlx_lm.tokenizer_files(checkpoint, memos)


def programs(checkpoint: Checkpoint) -> dict[str, str]:
    return {}


def shard_names(count: int) -> list[str]:
    return [f"part-{number}.raw" for number in range(count)]

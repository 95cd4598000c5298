"""transformers: Hugging Face folders: config.json with *.safetensors or pytorch_model*.bin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.small_files import numbered, read_json, read_text
from tasks.checkpoints.source import ReadableSource
from tasks.checkpoints.stored import TORCH, Stored
from tasks.core.errors import CheckpointError

# The kinds of weight file, the first that is there wins: (all of them, a numbered row, index).
KINDS = (
    ("model*.safetensors", r"model.*-(\d+)-of-(\d+)\.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", r".*-(\d+)-of-(\d+)\.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", r"pytorch_model-(\d+)-of-(\d+)\.bin", "pytorch_model.bin.index.json"),
)
WEIGHTS = tuple(pattern for pattern, *_ in KINDS)
HOLDS = "*.safetensors or pytorch_model*.bin with config.json (Hugging Face)"
# What mlx-lm reads beside config.json to build a model.
SIDE_FILES = ("generation_config.json", "hf_quant_config.json")


def fits(source: ReadableSource) -> bool:
    """Tell whether a source looks like one of these."""
    return source.has("config.json") or any(source.names(pattern) for pattern, *_ in KINDS)


def read(source: ReadableSource, memos: Memos) -> Checkpoint:
    """Read the checkpoint's headers.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = source.small_files
    config = read_json(folder / "config.json", "it names the architecture and its dimensions")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{folder / 'config.json'} has no model_type, which names the architecture."
        )
    names, notes = _weight_files(source)
    tables = source.headers(names, memos)
    stored: dict[str, Stored] = {}
    for _, header in tables.values():
        for tensor in header:
            if (other := stored.get(tensor.name)) is not None:
                raise CheckpointError(
                    f"{folder}: {tensor.name} is both in {other.file} and in {tensor.file}. "
                    "Remove the file that is left from another checkpoint."
                )
            stored[tensor.name] = tensor
    _drop_tied_head(config, stored)
    if not stored:
        raise CheckpointError(f"{folder}: its weight files hold no tensor. Fetch them again.")
    files = {
        name: read_text(folder / name)
        for name in ("config.json", *SIDE_FILES)
        if (folder / name).exists()
    }
    tensors = {name: LogicalTensor(s.dtype, s.shape, (name,)) for name, s in stored.items()}
    stamps = {name: stamp for name, (stamp, _) in tables.items()}
    return Checkpoint(
        source, "huggingface", config, files, stored, tensors, stamps, notes, "config.json"
    )


def _drop_tied_head(config: dict[str, Any], stored: dict[str, Stored]) -> None:
    """Drop a head that is the embedding by another name: torch.save keeps both, mlx-lm one."""
    head = stored.get("lm_head.weight")
    if head is None or head.offset == TORCH or config.get("tie_word_embeddings") is False:
        return
    place = head[1:]
    if any(tensor[1:] == place for name, tensor in stored.items() if name != head.name):
        del stored[head.name]


def _weight_files(source: ReadableSource) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the weight files, and notes on those that are left out."""
    folder = source.small_files
    for pattern, row, index in KINDS:
        names = source.names(pattern)
        if not names:
            continue
        if source.has(index):
            weight_map = read_json(folder / index, "it lists the shards").get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) and Path(name).name == name for name in weight_map.values()
            ):
                raise CheckpointError(
                    f"{folder / index} has no weight_map from tensors to files. Fetch it again."
                )
            named = sorted(set(weight_map.values()))
            if missing := [name for name in named if not source.has(name)]:
                raise CheckpointError(
                    f"{folder}: {missing[0]} is missing ({len(missing)} of the {len(named)} files "
                    f"that {index} names). Fetch the missing files."
                )
            extra = [name for name in names if name not in named]
            notes = (f"{', '.join(extra)} left out: not in {index}",) if extra else ()
            return named, notes
        numbered(source.location, names, row)  # only to refuse a gap
        return names, ()
    raise CheckpointError(
        f"{folder} has no *.safetensors and no pytorch_model*.bin. Fetch the weight files."
    )

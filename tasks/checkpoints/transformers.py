"""transformers: Hugging Face folders: config.json with *.safetensors or pytorch_model*.bin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import TORCH, Checkpoint, Stored, Whole
from tasks.checkpoints.folder import numbered, read_json, read_text
from tasks.checkpoints.headers import headers
from tasks.core.errors import CheckpointError

# The kinds of weight file, the first that is there wins: (all of them, a numbered row, index).
KINDS = (
    ("model*.safetensors", r"model.*-(\d+)-of-(\d+)\.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", r".*-(\d+)-of-(\d+)\.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", r"pytorch_model-(\d+)-of-(\d+)\.bin", "pytorch_model.bin.index.json"),
)
WEIGHTS = tuple(pattern for pattern, *_ in KINDS)
# What mlx-lm reads beside config.json to build a model.
SIDE_FILES = ("generation_config.json", "hf_quant_config.json")


def fits(folder: Path) -> bool:
    """Tell whether ``folder`` looks like one of these."""
    return (folder / "config.json").exists() or any(
        True for pattern, *_ in KINDS for _ in folder.glob(pattern)
    )


def read(folder: Path, memos: Memos) -> Checkpoint:
    """Read the checkpoint's headers.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    config = read_json(folder / "config.json", "it names the architecture and its dimensions")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{folder / 'config.json'} has no model_type, which names the architecture."
        )
    paths, notes = _weight_files(folder)
    tables = headers(paths, memos)
    stored: dict[str, Stored] = {}
    for _, tensors in tables.values():
        for tensor in tensors:
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
    wholes = {name: Whole(s.dtype, s.shape, (name,)) for name, s in stored.items()}
    stamps = {name: stamp for name, (stamp, _) in tables.items()}
    return Checkpoint(folder, "huggingface", config, files, stored, wholes, stamps, notes)


def _drop_tied_head(config: dict[str, Any], stored: dict[str, Stored]) -> None:
    """Drop a head that is the embedding by another name: torch.save keeps both, mlx-lm one."""
    head = stored.get("lm_head.weight")
    if head is None or head.offset == TORCH or config.get("tie_word_embeddings") is False:
        return
    place = head[1:]
    if any(tensor[1:] == place for name, tensor in stored.items() if name != head.name):
        del stored[head.name]


def _weight_files(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    for pattern, row, index in KINDS:
        found = sorted(folder.glob(pattern))
        if not found:
            continue
        if (folder / index).exists():
            weight_map = read_json(folder / index, "it lists the shards").get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) and Path(name).name == name for name in weight_map.values()
            ):
                raise CheckpointError(
                    f"{folder / index} has no weight_map from tensors to files. Fetch it again."
                )
            named = sorted(set(weight_map.values()))
            if missing := [name for name in named if not (folder / name).exists()]:
                raise CheckpointError(
                    f"{folder}: {missing[0]} is missing ({len(missing)} of the {len(named)} files "
                    f"that {index} names). Fetch the missing files."
                )
            extra = [path.name for path in found if path.name not in named]
            notes = (f"{', '.join(extra)} left out: not in {index}",) if extra else ()
            return [folder / name for name in named], notes
        numbered(found, row)  # only to refuse a gap
        return found, ()
    raise CheckpointError(
        f"{folder} has no *.safetensors and no pytorch_model*.bin. Fetch the weight files."
    )

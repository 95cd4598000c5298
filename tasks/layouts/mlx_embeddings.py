"""mlx_embeddings: the layout that mlx_embeddings.convert writes and mlx_embeddings.load reads.

The tokenizer's files are the author's own, as in layout mlx-lm; so are the processors', and those
that sentence-transformers reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.transformers import MODULES
from tasks.core.errors import CheckpointError
from tasks.core.spec import Target
from tasks.core.text import listed
from tasks.layouts import leftovers, mlx_lm
from tasks.layouts.libraries import MLX_EMBEDDINGS
from tasks.layouts.model import Model
from tasks.layouts.safetensors_format import SAFETENSORS

weight_format = SAFETENSORS
default_shard_bytes = 5 << 30  # the peer's own limit
loaded = "model*.safetensors"
loading = """\
from mlx_embeddings import load, generate

model, processor = load("{model}")
print(generate(model, processor, texts=["I like grapes", "I like fruits"]).text_embeds)
"""
pipeline_tag = "feature-extraction"
# What makes pictures ready, and what sentence-transformers reads.
BESIDE = ("*processor*.json", "modules.json", "sentence_*config.json", "config_sentence*.json")
NAME_NOTE = (
    "mlx_embeddings.load reads the size of pictures in the folder's name: call the target as its "
    "author calls the model, with patch…-… in it (siglip-base-patch16-224)"
)
TOWERS = ("vision_model", "vision_tower")  # what skip_vision is of


def model(checkpoint: Checkpoint, memos: Memos) -> Model:
    """Return the model by mlx-embeddings' names.

    Raises:
        CheckpointError: mlx-embeddings has no class for it, or would take one of the checkpoint's;
            or parts of it lie in folders.
    """
    if parts := leftovers.weights_in_folders(checkpoint):
        raise CheckpointError(
            f"{checkpoint.folder}: mlx_embeddings.convert reads {listed(parts)} as parts of the "
            "model, and here those are read that lie beside config.json, or one folder below where "
            f"a {MODULES} lists them. Put the others elsewhere if they are another model's."
        )
    made = mlx_lm.model(checkpoint, memos, MLX_EMBEDDINGS, BESIDE)
    notes = leftovers.of_convert(checkpoint, takes, "mlx_embeddings.convert", folders=False)
    notes += [NAME_NOTE] if _is_siglip(made.config) else []
    return structs.replace(made, notes=(*made.notes, *notes))


def _is_siglip(config: dict[str, Any]) -> bool:
    """Tell whether mlx_embeddings.load reads a model as it reads SigLIP alone."""
    return "siglip" in config["model_type"]


shard_names = mlx_lm.shard_names
tokenizer_files = mlx_lm.tokenizer_files
programs = mlx_lm.programs


def default_dtype(checkpoint: Checkpoint, model: Model) -> str:
    """Return what mlx_embeddings.convert casts to by default."""
    return "float16"


def check(target: Target, model: Model) -> None:
    """Every setting is possible in this layout."""


def config(target: Target, model: Model, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return config.json as mlx_embeddings.convert writes it.

    But for SigLIP: mlx_embeddings.load refuses the very ``skip_vision`` that convert writes there.
    Without it, what has scales is quantized, which is the same.
    """
    config = dict(model.config)
    if quantization is not None:
        config["quantization"] = quantization
        vision = config.get("vision_config")
        if isinstance(vision, dict) and not _is_siglip(config):
            ruled = [path for path in quantization if any(tower in path for tower in TOWERS)]
            config["vision_config"] = {**vision, "skip_vision": not ruled}
    return dict(sorted(config.items()))


def takes(name: str) -> bool:
    """Tell whether the layout takes over a checkpoint's small file of that name."""
    return mlx_lm.takes(name, BESIDE)


def sources(checkpoint: Checkpoint) -> list[Path]:
    """Return the checkpoint's small files that go into the built model, as they are or changed.

    Raises:
        CheckpointError: it has neither a tokenizer nor another processor, or what must not be
            copied.
    """
    return mlx_lm.sources(checkpoint, BESIDE)


def files(
    checkpoint: Checkpoint,
    memos: Memos,
    shards: Sequence[Sequence[tuple[str, int]]],
    parameters: int,
) -> dict[str, bytes]:
    """Return the files that the layout has besides config.json and the weights."""
    return mlx_lm.files(checkpoint, memos, shards, None, BESIDE)

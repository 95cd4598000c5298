"""mlx_vlm: the layout that mlx_vlm.convert writes and mlx_vlm.load reads: a model with its towers.

The tokenizer's files are the author's own, as in layout mlx-lm; so are the processors'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.spec import Target
from tasks.layouts import leftovers, mlx_lm, mlx_vlm_library
from tasks.layouts.leftovers import PROCESSORS
from tasks.layouts.libraries import MLX_VLM
from tasks.layouts.model import Model
from tasks.layouts.safetensors_format import SAFETENSORS

weight_format = SAFETENSORS
default_shard_bytes = 5 << 30  # the peer's own limit
loaded = "model*.safetensors"
loading = """\
from mlx_vlm import load, generate
from mlx_vlm.prompt_utils import apply_chat_template

model, processor = load("{model}")
prompt = apply_chat_template(processor, model.config, "Describe this image.", num_images=1)
print(generate(model, processor, prompt, image="picture.jpg").text)
"""
pipeline_tag = "image-text-to-text"


def model(checkpoint: Checkpoint, memos: Memos) -> Model:
    """Return the model by mlx-vlm's names.

    Raises:
        CheckpointError: mlx-vlm has no class for it, or would take one of the checkpoint's own.
    """
    made = mlx_lm.model(checkpoint, memos, MLX_VLM, PROCESSORS)
    notes = leftovers.of_convert(checkpoint, takes, "mlx_vlm.convert")
    return structs.replace(made, notes=(*made.notes, *notes))


default_dtype = mlx_lm.default_dtype
shard_names = mlx_lm.shard_names
tokenizer_files = mlx_lm.tokenizer_files
programs = mlx_lm.programs


def check(target: Target, model: Model) -> None:
    """Every setting is possible in this layout."""


def config(target: Target, model: Model, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return config.json as mlx_vlm.convert writes it."""
    config = mlx_vlm_library.decode_config(model.config)
    config.pop("torch_dtype", None)
    if quantization is not None:
        config.setdefault("vision_config", {})
        config["quantization"] = quantization
        config["quantization_config"] = quantization  # for Hugging Face's model tree
    return dict(sorted(config.items()))


def takes(name: str) -> bool:
    """Tell whether the layout takes over a checkpoint's small file of that name."""
    return mlx_lm.takes(name, PROCESSORS)


def sources(checkpoint: Checkpoint) -> list[Path]:
    """Return the checkpoint's small files that go into the built model, as they are or changed.

    Raises:
        CheckpointError: it has neither a tokenizer nor another processor, or what must not be
            copied.
    """
    return mlx_lm.sources(checkpoint, PROCESSORS)


def files(
    checkpoint: Checkpoint,
    memos: Memos,
    shards: Sequence[Sequence[tuple[str, int]]],
    parameters: int,
) -> dict[str, bytes]:
    """Return the files that the layout has besides config.json and the weights."""
    return mlx_lm.files(checkpoint, memos, shards, None, PROCESSORS)

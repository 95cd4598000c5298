"""mlx_examples: the layout of mlx-examples' llama: convert.py writes it, llama.py reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.small_files import check_own, read_bytes
from tasks.core.errors import CheckpointError, ConfigError
from tasks.core.quantization import RECIPES
from tasks.core.spec import Target
from tasks.layouts import card, llama_tokenizer
from tasks.layouts.llama_names import to_meta
from tasks.layouts.model import Model, Module, Parameter
from tasks.layouts.npz_format import NPZ

weight_format = NPZ
loaded = "weights*.npz"
loading = ""
pipeline_tag = ""
default_shard_bytes = 15 << 30  # the peer's own limit
# What llama.py's configuration may hold; it fails on any other key.
KEYS = (
    "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps",
    "vocab_size", "rope_theta", "rope_traditional", "multiple_of", "ffn_dim_multiplier",
)  # fmt: skip


def model(checkpoint: Checkpoint, memos: Memos) -> Model:
    """Return the model by Meta's names.

    Raises:
        CheckpointError: it is no Llama that llama.py can compute.
    """
    if checkpoint.names == "huggingface":
        checkpoint = to_meta(checkpoint)
    params = checkpoint.config
    if params.get("use_scaled_rope"):
        raise CheckpointError(
            f"{checkpoint.folder} scales its rotary embedding (use_scaled_rope), which "
            "mlx-examples' llama.py does not: the model would speak nonsense. "
            'Use layout = "mlx-lm".'
        )
    tensors = dict(checkpoint.tensors)
    if "output.weight" not in tensors:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]  # tied: llama.py has no ties
    parameters = {
        name: Parameter(name, w.dtype, w.shape, w.inputs, w.steps, castable=True)
        for name, w in tensors.items()
    }
    modules = []
    for name, parameter in parameters.items():
        matrix = len(parameter.shape) > 1  # a Linear or an Embedding, not a norm
        quantized = ("weight", "scales", "biases") if matrix else None
        path = name.removesuffix(".weight")
        modules.append(Module(path, ("weight",), quantized, True, parameter.size))
    # llama.py has a default for a key that is left out, none for null.
    config = {k: value for k, value in params.items() if k in KEYS and value is not None}
    why = "mlx-examples' llama.py quantizes all modules alike."
    recipes = dict.fromkeys(RECIPES, why)
    notes = (*checkpoint.notes, *_tokenizer_notes(checkpoint.folder))
    return Model(parameters, tuple(modules), config, dict(recipes), notes)


def default_dtype(checkpoint: Checkpoint, model: Model) -> str | None:
    """Return what convert.py casts to by default."""
    return "float16"


def check(target: Target, model: Model) -> None:
    """Refuse what llama.py could not load.

    Raises:
        ConfigError: modules would be quantized differently.
    """
    if not target.quantize:
        return
    if target.quantize.rules:
        raise ConfigError(
            "quantize.rules are not possible in layout mlx-examples: its llama.py quantizes all "
            'modules alike. Drop the rules, or use layout = "mlx-lm".'
        )


def config(target: Target, model: Model, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return config.json as convert.py writes it.

    Raises:
        ConfigError: a width is no multiple of the group size.
    """
    config = {**model.config, "model_type": "llama"}
    if quantization is None:
        return config
    quantization = {k: v for k, v in quantization.items() if (k, v) != ("mode", "affine")}
    group_size = quantization["group_size"]
    for module in model.modules:
        width = model.parameters[f"{module.path}.weight"].shape[-1]
        if module.quantized_names and width % group_size:
            raise ConfigError(
                f"{module.path}: last axis {width} is not a multiple of group_size {group_size}, "
                "and mlx-examples' llama.py quantizes all modules or none. "
                + next(
                    (f"Set group_size = {g}, or use" for g in (64, 32)
                     if g < group_size and width % g == 0), "Use"
                )
                + ' layout = "mlx-lm".'
            )  # fmt: skip
    return {**config, "quantization": quantization}


def takes(name: str) -> bool:
    """Tell whether the layout takes over a checkpoint's small file of that name."""
    return name == "tokenizer.model" or card.is_legal(name)


def sources(checkpoint: Checkpoint) -> list[Path]:
    """Return the checkpoint's small files that go into the built model.

    Raises:
        CheckpointError: it has no tokenizer.model.
    """
    path = checkpoint.folder / "tokenizer.model"
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing: mlx-examples' llama.py reads no other tokenizer. Fetch it from "
            'where the checkpoint came from, or use layout = "mlx-lm".'
        )
    check_own(path)
    return [path, *card.legal_files(checkpoint.folder)]


def tokenizer_files(checkpoint: Checkpoint, memos: Memos) -> dict[str, bytes]:
    """Return none: llama.py has no use for transformers."""
    return {}


def _tokenizer_notes(folder: Path) -> tuple[str, ...]:
    path = folder / "tokenizer.model"
    if not path.exists() or not llama_tokenizer.is_tiktoken(path):
        return ()
    return (
        "tokenizer.model is tiktoken's, as Llama 3's are; mlx-examples' llama.py reads only "
        "sentencepiece's, so the weights load there and the tokenizer does not. Layout mlx-lm "
        "has one made of it.",
    )


def files(
    checkpoint: Checkpoint,
    memos: Memos,
    shards: Sequence[Sequence[tuple[str, int]]],
    parameters: int,
) -> dict[str, bytes]:
    """Return the files that the layout has besides config.json and the weights."""
    return {path.name: read_bytes(path) for path in sources(checkpoint)}


def programs(checkpoint: Checkpoint) -> dict[str, str]:
    """Return none: no file is made."""
    return {}


def shard_names(count: int) -> list[str]:
    """Return the names of ``count`` weight files."""
    return ["weights.npz"] if count == 1 else [f"weights.{i:02d}.npz" for i in range(count)]

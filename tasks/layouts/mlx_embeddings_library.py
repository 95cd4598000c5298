"""mlx_embeddings_library: how mlx-embeddings is asked what it makes of a checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.layouts.model import Verdict

DISTRIBUTION = "mlx-embeddings"
PACKAGE = "mlx_embeddings"
BUILDS_ON: tuple[str, ...] = ("mlx_vlm", "mlx_lm")
MODULES: tuple[str, ...] = ("mlx_embeddings.convert", "mlx_embeddings.utils")
# Of what pictures and texts are made ready with: seventeen seconds of imports.
STUBS: tuple[str, ...] = (
    "transformers", "huggingface_hub", "torch", "scipy", "sentencepiece", "mlx_audio", "PIL", "cv2",
    "datasets", "requests", "llguidance", "mlx_vlm.tokenizer_utils", "mlx_vlm.trainer",
    "mlx_embeddings.tokenizer_utils",
)  # fmt: skip
MODELS: tuple[str, ...] = ("models",)
KNOWS: tuple[str, ...] = (
    "bert", "colqwen2_5", "gemma3_text", "lfm2", "llama_bidirec", "llama_nemotron_vl", "modernbert",
    "qwen3", "qwen3_vl", "siglip", "xlm_roberta",
)  # fmt: skip
EXTRA = "embeddings"
TOWERS = ""
PREDICTORS = 'layout = "mlx-vlm-mtp"'
RUNS = False
PARTS = True


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model in a folder, as ``mlx_embeddings.convert`` loads it, and its configuration.

    Of SigLIP the library reads the size of pictures in what the repository is called: it is given
    a name that says what config.json says.
    """
    utils = _utils()
    config = utils.load_config(folder)
    *_, vision = utils._get_classes(config)
    name = ""
    if vision is not None and "siglip" in config["model_type"]:
        sizes = vision(**config["vision_config"])
        name = f"patch{sizes.patch_size}-{sizes.image_size}"
    return utils.load_model(folder, lazy=True, path_to_repo=name), utils.load_config(folder)


def casts(model: Any, name: str) -> bool:
    """Tell that ``mlx_embeddings.convert`` casts every parameter."""
    return True


def quantizes(model: Any, path: str, module: Any) -> Verdict:
    """Return the word of ``mlx_embeddings.convert`` on quantizing a module, whatever its width."""
    convert = importlib.import_module("mlx_embeddings.convert")
    return bool(convert.get_class_predicate(skip_vision=True, q_group_size=1)(path, module))


def count_weights(model: Any) -> None:
    """Return nothing: mlx-embeddings counts none."""


def recipes(
    model: Any, leaves: Iterable[tuple[str, Any]]
) -> dict[str, dict[str, int | Verdict] | str]:
    """Return none: mlx-embeddings has no mixed recipe."""
    return {}


def on_text(model: Any) -> Any:
    """Return the model, which is not run."""
    return model


def prompt_cache(model: Any) -> list[Any]:
    """Return none: its models are not run."""
    return []


def encode_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON has it."""
    return config


def keeps_vision_config(model: Any) -> bool:
    """Tell that ``mlx_embeddings.convert`` leaves ``vision_config`` in config.json."""
    return True


def _utils() -> Any:
    return importlib.import_module("mlx_embeddings.utils")

"""mlx_lm_library: how mlx-lm is asked what it makes of a checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tasks.layouts import mixed_recipes
from tasks.layouts.model import Verdict

DISTRIBUTION = "mlx-lm"
PACKAGE = "mlx_lm"
BUILDS_ON: tuple[str, ...] = ()
MODULES: tuple[str, ...] = ("mlx_lm.convert", "mlx_lm.utils")
# They import transformers and torch, which takes seconds.
STUBS: tuple[str, ...] = ("mlx_lm.tokenizer_utils", "huggingface_hub")
MODELS: tuple[str, ...] = ("models",)
KNOWS: tuple[str, ...] = ()
EXTRA = ""
TOWERS = 'layout = "mlx-vlm"'
PREDICTORS = 'layout = "mlx-vlm-mtp"'
RUNS = True
PARTS = False
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model in a folder, as ``mlx_lm.convert`` loads it, and its configuration."""
    model, config = _utils().load_model(folder, lazy=True)
    return model, config


def casts(model: Any, name: str) -> bool:
    """Tell whether ``mlx_lm.convert`` casts a parameter where a dtype is asked for."""
    predicate = getattr(model, "cast_predicate", None)
    return predicate is None or bool(predicate(name))


def quantizes(model: Any, path: str, module: Any) -> Verdict:
    """Return the model's own word on quantizing a module: yes, no, or with which settings."""
    predicate = getattr(model, "quant_predicate", None)
    return predicate(path, module) if predicate else True


def count_weights(model: Any) -> int:
    """Return how many weights a model has."""
    return int(_utils().get_total_parameters(model))


def recipes(model: Any, leaves: Iterable[tuple[str, Any]]) -> mixed_recipes.Words:
    """Return each mixed recipe's bits by module path, or why it does not fit the model."""
    convert = importlib.import_module("mlx_lm.convert")

    def bits(recipe: str) -> Callable[[str, Any], Any]:
        predicate = convert.mixed_quant_predicate_builder(recipe, model, 64)
        return lambda path, module: predicate(path, module)["bits"]

    return mixed_recipes.words(RECIPES, bits, leaves)


def on_text(model: Any) -> Any:
    """Return the model: that is how it runs."""
    return model


def prompt_cache(model: Any) -> list[Any]:
    """Return an empty cache for a model to go on with a text, a part a layer."""
    return list(importlib.import_module("mlx_lm.models.cache").make_prompt_cache(model))


def encode_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON has it: infinities are tagged."""
    encode = getattr(_utils(), "_encode_tagged_floats", None)
    return dict(encode(config)) if encode else config


def keeps_vision_config(model: Any) -> bool:
    """Tell whether ``mlx_lm.convert`` leaves ``vision_config`` in config.json."""
    return "vision_tower" in getattr(model, "model", {})


def _utils() -> Any:
    return importlib.import_module("mlx_lm.utils")

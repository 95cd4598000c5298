"""mlx_vlm_library: how mlx-vlm is asked what it makes of a checkpoint."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tasks.layouts import mixed_recipes
from tasks.layouts.model import Verdict

DISTRIBUTION = "mlx-vlm"
PACKAGE = "mlx_vlm"
BUILDS_ON: tuple[str, ...] = ()
MODULES: tuple[str, ...] = ("mlx_vlm.convert", "mlx_vlm.utils", "mlx_vlm.quant_utils")
# Of what pictures, sounds and texts are made ready with: ten seconds of imports.
STUBS: tuple[str, ...] = (
    "transformers", "huggingface_hub", "torch", "scipy", "sentencepiece", "mlx_audio", "PIL", "cv2",
    "datasets", "requests", "llguidance", "mlx_vlm.tokenizer_utils", "mlx_vlm.trainer",
)  # fmt: skip
MODELS: tuple[str, ...] = ("models",)
KNOWS: tuple[str, ...] = ()
EXTRA = "vlm"
TOWERS = ""
PREDICTORS = 'layout = "mlx-vlm-mtp"'
FLOAT = "mlx-make float"  # tags what JSON has no number for
RUNS = True
PARTS = False


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the model in a folder, as ``mlx_vlm.convert`` loads it, and its configuration."""
    utils = _utils()
    # The model's loader changes the configuration that it reads: convert writes one read anew.
    return utils.load_model(folder, lazy=True), utils.load_config(folder)


def casts(model: Any, name: str) -> bool:
    """Tell whether ``mlx_vlm.convert`` casts a parameter where a dtype is asked for."""
    predicate = getattr(model, "cast_predicate", None)
    return predicate is None or bool(predicate(name))


def quantizes(model: Any, path: str, module: Any) -> Verdict:
    """Return the word of ``mlx_vlm.convert`` and of the model on quantizing a module."""
    if _utils().skip_multimodal_module(path):
        return False
    predicate = getattr(model, "quant_predicate", None)
    said: Verdict = predicate(path, module) if predicate is not None else True
    return said


def count_weights(model: Any) -> int:
    """Return how many weights a model has."""
    return int(importlib.import_module("mlx_vlm.quant_utils").get_total_parameters(model))


def recipes(model: Any, leaves: Iterable[tuple[str, Any]]) -> mixed_recipes.Words:
    """Return each mixed recipe's word by module path, or why it does not fit the model.

    Their groups are of 64 weights, whatever the target's are.
    """
    convert = importlib.import_module("mlx_vlm.convert")
    return mixed_recipes.words(
        convert.QUANT_RECIPES,
        lambda recipe: convert.mixed_quant_predicate_builder(recipe, model),
        leaves,
    )


def on_text(model: Any) -> Any:
    """Return the model such that it makes logits of tokens, by its language model alone."""
    kind = type(model)

    def call(module: Any, tokens: Any, cache: Any = None) -> Any:
        return module.language_model(tokens, cache=cache).logits

    object.__setattr__(model, "__class__", type(kind.__name__, (kind,), {"__call__": call}))
    return model


def prompt_cache(model: Any) -> list[Any]:
    """Return an empty cache for a language model to go on with a text, a part a layer."""
    cache = importlib.import_module("mlx_vlm.models.cache")
    return list(cache.make_prompt_cache(model.language_model))


def encode_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON has it: infinities are tagged, which mlx-vlm writes so."""
    return dict(_replaced(config, _tagged))


def decode_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the infinities that ``encode_config`` tagged."""
    return dict(_replaced(config, _untagged))


def _replaced(value: Any, replace: Callable[[Any], Any]) -> Any:
    value = replace(value)
    if isinstance(value, dict):
        return {key: _replaced(each, replace) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, replace) for each in value]
    return value


def _tagged(value: Any) -> Any:
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else {FLOAT: str(value)}


def _untagged(value: Any) -> Any:
    tagged = isinstance(value, dict) and value.keys() == {FLOAT}
    return float(value[FLOAT]) if tagged else value


def keeps_vision_config(model: Any) -> bool:
    """Tell that ``mlx_vlm.convert`` leaves ``vision_config`` in config.json."""
    return True


def _utils() -> Any:
    return importlib.import_module("mlx_vlm.utils")

"""vlm_checkpoints: a small random checkpoint of any architecture that mlx-vlm has.

Its configuration is made of the fields of mlx-vlm's own classes, every size a small one, and its
tensors are those that the class then has: by the names that the hub has them by where `HUB` tells
them, with convolutions as PyTorch lays them out, and else by mlx-vlm's own.
"""

import dataclasses
import importlib
import itertools
import json
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from support.checkpoints import random_array, write_tokenizer
from support.vlm_names import HUB, SETTINGS

Config = dict[str, Any]
Shape = tuple[int, ...]
PARTS = ("text", "vision", "perceiver", "projector", "audio")  # as mlx-vlm's loader has them
LAYERS, WIDTH, VOCABULARY = 4, 128, 320
MOST_WEIGHTS = 30_000_000
# A whole number by its key, at most; the first that matches.
SIZES = (
    ("vocab_size|num_embeddings|codebook_size", VOCABULARY),
    ("kv_shared_layers", LAYERS // 2),
    (r"(^|_)(n_?)?layers?$|hidden_layers|depth|num_blocks|n_block$|num_mtp", LAYERS),
    ("kv_heads|key_value_heads|head_kv|multi_query_group_num", 2),
    ("heads?$", 4),
    ("head_dim|head_size", 32),
    ("lora_rank", 64),
    ("experts_per|top_?k", 2),
    ("n_group", 1),
    ("experts", 4),
    ("intermediate|ffn|d_ff|hidden_size|embed|d_model|width|n_embd|dim$|d_inner", WIDTH),
    ("size_per_layer|state_size|output_size", WIDTH),
    ("max_position|max_seq|context_length", 512),
)  # fmt: skip
# What a class may want besides, by what most say: one after the other is tried.
ROPE = {
    "rope_theta": 10000.0,
    "rope_type": "default",
    "type": "default",
    "mrope_section": [4, 6, 6],
}
WINDOWS = ["sliding_attention"] * 3 + ["full_attention"]
MORE: tuple[Config, ...] = (
    {},
    {"layer_types": WINDOWS},
    {"layer_types": ["full_attention"] * LAYERS},
    {"rope_parameters": ROPE},
    {"rope_parameters": ROPE, "layer_types": WINDOWS},
    {"layer_types": ["conv", "full_attention"] * 2},
    {"layer_types": ["linear_attention", "full_attention"] * 2, "rope_parameters": ROPE},
    {"rope_scaling": {"factor": 1.0, **ROPE}},
)  # fmt: skip
WHERE_NONE = {"rope_theta": 10000.0, "head_dim": 32}
# What a part's own model_type may have to be.
TYPES = (
    "{arch}", "{arch}_{part}", "{arch}_{part}_model", "siglip_vision_model", "clip_vision_model",
    "pixtral", "vision", "gemma3", "qwen2_5_vl", "llama",
)  # fmt: skip


def architectures() -> list[str]:
    """Return the architectures that mlx-vlm has a loadable class for."""
    import mlx_vlm.models

    return sorted(m.name for m in pkgutil.iter_modules(mlx_vlm.models.__path__) if m.ispkg)


def make(arch: str, folder: Path, settings: Config | None = None) -> Path:
    """Write a checkpoint of an architecture into a folder, and return the folder.

    Args:
        arch: One of `architectures()`.
        folder: Made, with its parents.
        settings: Of config.json, such as other sizes.

    Raises:
        ValueError: no configuration of it was found.
    """
    config, model = _model(arch, settings)
    folder.mkdir(parents=True)
    arrays = {}
    for name, (own, dtype) in model.items():
        for hub, shape in _hub(arch, name, own).items():
            floats = mx.issubdtype(dtype, mx.floating)
            arrays[hub] = random_array(hub, shape) if floats else mx.zeros(shape, dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    write_tokenizer(folder)
    return folder


def _hub(arch: str, name: str, shape: Shape) -> dict[str, Shape]:
    """Return what the hub has of a parameter: the shape of each tensor by its name."""
    if arch not in HUB:
        return {name: shape}
    if len(shape) > 3 and name.endswith(("weight", "basis")):
        shape = (shape[0], shape[-1], *shape[1:-1])
    renamed = next((each for each in HUB[arch] if re.search(each.pattern, name)), None)
    if renamed is None:
        return {name: shape}
    if renamed.name is None:
        return {}
    name = re.sub(renamed.pattern, renamed.name, name, count=1)
    if renamed.turned:
        return {name: shape[::-1]}
    if renamed.times > 1:
        return {name: (shape[0] * renamed.times, *shape[1:])}
    if renamed.halves:
        experts, rows, columns = shape
        return {name: (experts, columns, rows * renamed.halves)}
    if "{expert}" in name:
        return {name.format(expert=i): shape[1:] for i in range(shape[0])}
    return {name: shape}


def _model(arch: str, settings: Config | None) -> tuple[Config, dict[str, tuple[Shape, Any]]]:
    """Return a configuration that the class takes, and the parameters that it then has.

    Raises:
        ValueError: none was found.
    """
    from mlx.utils import tree_flatten

    module = importlib.import_module(f"mlx_vlm.models.{arch}")
    if not hasattr(module, "Model") or not hasattr(module, "ModelConfig"):
        raise ValueError(
            "it is no model that mlx_vlm.convert loads: it has no Model, no ModelConfig"
        )
    errors = []
    for more, name in itertools.product(MORE, TYPES):
        config = _config(arch, module, lambda part, name=name: name.format(arch=arch, part=part))
        missing = {key: value for key, value in more.items() if not config.get(key)}
        text = {"text_config": missing} if "text_config" in config else {}
        config = _merged(_merged(config, {**missing, **text}), SETTINGS.get(arch, {}))
        config = _merged(config, settings or {})
        try:
            model = _made(module, config)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            continue
        flat = tree_flatten(model.parameters())
        count = sum(array.size for _, array in flat)
        if count > MOST_WEIGHTS and not settings:
            raise ValueError(f"it has {count:,} weights still")
        return config, {key: (array.shape, array.dtype) for key, array in flat}
    raise ValueError(errors[0])


def _made(module: Any, config: Config) -> Any:
    """Return the model as mlx-vlm's loader makes it."""
    from mlx_vlm import utils

    config = json.loads(json.dumps(config))
    config.setdefault("text_config", config.pop("llm_config", {}))
    for part in ("vision", "audio"):
        config.setdefault(f"{part}_config", {})
    made = module.ModelConfig.from_dict(config)
    return module.Model(utils.update_module_configs(made, module, config, list(PARTS)))


def _config(arch: str, module: Any, type_of: Callable[[str], str]) -> Config:
    """Return a configuration of small sizes: what is of text stands at the top, too."""
    own = _fields(module.ModelConfig, type_of("model"))
    parts = {}
    for part in PARTS:
        kind = getattr(module, f"{part.title()}Config", None)
        if dataclasses.is_dataclass(kind):
            parts[f"{part}_config"] = _fields(kind, type_of(part))
    config = {**parts.get("text_config", {}), **own}
    config |= {key: {**(own.get(key) or {}), **value} for key, value in parts.items()}
    return {**_plain(config), "model_type": arch}


def _fields(kind: Any, model_type: str) -> Config:
    """Return what a class of configurations holds by default, but smaller."""
    try:
        hints = typing.get_type_hints(kind)
    except Exception:  # a name that only a type checker imports
        hints = {}
    values = {}
    for field in dataclasses.fields(kind):
        if field.name.startswith("quantization"):
            continue
        hint = hints.get(field.name, field.type)
        inner = [a for a in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(a)]
        if inner:
            values[field.name] = _fields(inner[0], model_type)
        elif field.default is not dataclasses.MISSING:
            values[field.name] = _small(field.name, field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = _small(field.name, field.default_factory())
        else:
            values[field.name] = _guess(field.name, str(hint), model_type)
        if values[field.name] is None:
            values[field.name] = WHERE_NONE.get(field.name)
    return values


def _small(key: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], str) and "layer" in key:
            return list(value[-LAYERS:])
        return [_small(key, each) for each in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return next((min(value, most) for pattern, most in SIZES if re.search(pattern, key)), value)


def _guess(key: str, hint: str, model_type: str) -> Any:
    """Return a value of a key without default."""
    if re.search("[Dd]ict", hint):
        return {}
    if re.search("[Ll]ist", hint):
        return []
    if "int" in hint:
        return _small(key, 10_000) if any(re.search(p, key) for p, _ in SIZES) else 8
    if "float" in hint:
        return 10000.0 if "theta" in key else 1e-5
    if "str" in hint:
        return "silu" if "act" in key else model_type
    return False if "bool" in hint else None


def _plain(value: Any) -> Any:
    """Return JSON: what is none is left out."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool)) else None


def _merged(one: Config, other: Mapping[str, Any]) -> Config:
    merged = {**one, **other}
    for key in one.keys() & other.keys():
        if isinstance(one[key], dict) and isinstance(other[key], Mapping):
            merged[key] = _merged(one[key], other[key])
    return merged

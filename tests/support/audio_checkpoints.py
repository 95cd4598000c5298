"""audio_checkpoints: a small random checkpoint of any architecture that mlx-audio converts.

Its configuration is made of the fields of mlx-audio's own classes, every size a small one, and its
tensors are those that the class then has, by its own names: convolutions as PyTorch lays them out
where the class takes them so.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from support.audio_configs import CONFIGS, NAMES, Config
from support.audio_peer import quiet
from support.checkpoints import random_array, write_tokenizer
from support.vlm_checkpoints import _fields, _merged, _plain

Shape = tuple[int, ...]
Hub = Callable[[str], str]
MOST_WEIGHTS = 60_000_000


def architectures() -> list[str]:
    """Return the architectures that mlx-audio's convert looks for, each with its domain."""
    convert = importlib.import_module("mlx_audio.convert")
    return [
        f"{d.value}-{each}" for d in convert.Domain for each in sorted(convert.get_model_types(d))
    ]


def make(arch: str, folder: Path, settings: Config | None = None) -> Path:
    """Write a checkpoint of an architecture, `DOMAIN-NAME`, into a folder, and return the folder.

    Raises:
        ValueError: no small configuration of it was found, or it does not take its own weights.
    """
    module, config = _configured(arch, {**CONFIGS.get(arch, {}), **(settings or {})})
    model = _made(module, config, folder)
    flat = _flat(model)
    count = sum(array.size for array in flat.values())
    if count > MOST_WEIGHTS:
        raise ValueError(f"it has {count:,} weights still")
    pattern, replacement = NAMES.get(arch, ("^", ""))
    arrays = _taken(
        lambda: _made(module, config, folder), flat, lambda name: re.sub(pattern, replacement, name)
    )
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text('{"feature_size": 80}')
    write_tokenizer(folder)
    return folder


def _configured(arch: str, settings: Config) -> tuple[Any, Config]:
    domain, _, name = arch.partition("-")
    with quiet():
        module = importlib.import_module(f"mlx_audio.{domain}.models.{name}")
    kind = getattr(module, "ModelConfig", None)
    config = _plain(_fields(kind, name)) if dataclasses.is_dataclass(kind) else {}
    config = {**_merged(config, settings), "model_type": name}
    unsaid = {"model_path", *(key for key, value in settings.items() if value is None)}
    return module, {key: value for key, value in config.items() if key not in unsaid}


def _made(module: Any, config: Config, folder: Path) -> Any:
    """Return the model as mlx-audio's convert makes it."""
    config = json.loads(json.dumps(config))
    with quiet():
        if hasattr(module, "prepare_config"):
            config = module.prepare_config(config, folder)
        kind = getattr(module, "ModelConfig", None)
        made = kind.from_dict(config) if kind else config
        if hasattr(made, "model_path"):
            made.model_path = folder
        return module.Model(made)


def _taken(make: Callable[[], Any], parameters: dict[str, Any], hub: Hub) -> dict[str, Any]:
    """Return random tensors for parameters, such as the model takes.

    Convolutions are as PyTorch lays them out, transposed ones too, but for those that the class
    does not turn.

    Raises:
        ValueError: it does not take them so either.
    """
    left = {name: _turns(array.shape) for name, array in parameters.items()}
    arrays = {
        hub(name): _random(name, array, next(left[name])) for name, array in parameters.items()
    }
    while True:
        model, weights = make(), dict(arrays)
        try:
            if hasattr(model, "sanitize"):
                weights = model.sanitize(weights)
            model.load_weights(list(weights.items()))
            return arrays
        except ValueError as error:
            refused = re.search(r"for parameter (\S+?)\.?$", str(error))
            name = refused[1] if refused else ""
            shape = next(left[name], None) if name in left else None
            if shape is None:
                raise
            arrays[hub(name)] = _random(name, parameters[name], shape)


def _turns(shape: Shape) -> Iterator[Shape]:
    """Yield a tensor's shape as PyTorch's convolutions have it, then as it is."""
    if len(shape) > 2:
        yield (shape[0], shape[-1], *shape[1:-1])
        yield (shape[-1], shape[0], *shape[1:-1])
    yield shape


def _flat(model: Any) -> dict[str, Any]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


def _random(name: str, array: Any, shape: Shape) -> Any:
    floats = mx.issubdtype(array.dtype, mx.floating)
    return random_array(name, shape) if floats else mx.zeros(shape, array.dtype)

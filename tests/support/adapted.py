"""adapted: small adapters as mlx-lm and PEFT save them, and what a model is with them, in float32.

What they do is written down here once more, from the two libraries' own code, on whole matrices.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from support.checkpoints import random_array

KINDS = ("mlx-lora", "mlx-dora", "peft-lora", "peft-dora")
LAYER = "model.layers.0"
SHAPES = {f"{LAYER}.self_attn.q_proj": (64, 64), f"{LAYER}.mlp.up_proj": (64, 64),
          f"{LAYER}.self_attn.k_proj": (32, 64)}  # fmt: skip
RANK = 4
PREFIX = "base_model.model."


def weights_file(kind: str) -> str:
    return "adapters.safetensors" if kind.startswith("mlx") else "adapter_model.safetensors"


def write(kind: str, folder: Path) -> None:
    """Write an adapter of a Qwen3 of one layer, 64 wide."""
    folder.mkdir()
    dora = kind.endswith("dora")
    arrays, config = {}, {}
    for path, (rows, columns) in SHAPES.items():
        if kind.startswith("mlx"):
            shapes = {"lora_a": (columns, RANK), "lora_b": (RANK, rows)}
            shapes |= {"m": (rows,)} if dora else {}
            names = {part: f"{path}.{part}" for part in shapes}
        else:
            shapes = {"lora_A.weight": (RANK, columns), "lora_B.weight": (rows, RANK)}
            shapes |= {"lora_magnitude_vector": (rows,)} if dora else {}
            names = {part: f"{PREFIX}{path}.{part}" for part in shapes}
        for part, shape in shapes.items():
            arrays[names[part]] = random_array(names[part], shape, dtype="float32")
    if kind.startswith("mlx"):
        settings = {"rank": RANK, "scale": 7.5, "dropout": 0.0}
        config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 1}
        config["lora_parameters"] = settings
    else:
        config = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_dora": dora, "bias": "none",
            "use_rslora": False, "fan_in_fan_out": False, "modules_to_save": None,
            "target_modules": ["q_proj", "up_proj", "k_proj"], "rank_pattern": {},
            "alpha_pattern": {} if dora else {"layers.0.mlp.up_proj": 5, "k_proj": 7},
        }  # fmt: skip
    mx.save_safetensors(str(folder / weights_file(kind)), arrays, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def fused(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return the model with the adapter.

    Raises:
        Exception: it does not fit the model.
    """
    config = json.loads((folder / "adapter_config.json").read_bytes())
    model = mx.load(str(source / "model.safetensors"))
    model = {name: array.astype(mx.float32) for name, array in model.items()}
    file = next(path for kind in KINDS if (path := folder / weights_file(kind)).exists())
    fuse = _mlx_lm if file.name == "adapters.safetensors" else _peft
    fuse(config, mx.load(str(file)), model)
    return {name: torch.from_numpy(np.array(array)) for name, array in model.items()}


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError("the adapter does not fit")


def _number(value: Any) -> float:
    _check(isinstance(value, (int, float)) and not isinstance(value, bool))
    _check(math.isfinite(value))
    return float(value)


def _mlx_lm(config: dict, tensors: dict[str, mx.array], model: dict[str, mx.array]) -> None:
    """``LoRALinear.fuse`` and ``DoRALinear.fuse``; or whole weights in the place of others."""
    kind = config.get("fine_tune_type", "lora")
    left = dict(tensors)
    if kind == "full":
        for name, tensor in tensors.items():
            _check(model[name].shape == tensor.shape)
            model[name] = left.pop(name).astype(mx.float32)
    else:
        scale = _number(config["lora_parameters"]["scale"])
        for name in [name for name in tensors if name.endswith(".lora_a")]:
            path = name.removesuffix(".lora_a")
            a, b = left.pop(name), left.pop(f"{path}.lora_b")
            weight = model[f"{path}.weight"]
            _check(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0])
            product = (scale * a) @ b if "embed" in path else (scale * b.T) @ a.T
            _check(product.shape == weight.shape)
            weight = weight + product.astype(weight.dtype)
            if kind == "dora":
                magnitude = left.pop(f"{path}.m")
                _check(magnitude.shape == weight.shape[:1])
                weight = (magnitude / mx.linalg.norm(weight, axis=1))[:, None] * weight
            model[f"{path}.weight"] = weight.astype(mx.float32)
    _check(not left)


def _peft(config: dict, tensors: dict[str, mx.array], model: dict[str, mx.array]) -> None:
    """``LoraLayer.merge`` in float32, and DoRA's ``get_delta_weight`` scaled by magnitudes."""
    _check(str(config.get("peft_type", "LORA")).rpartition(".")[2] == "LORA")
    left = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    for name in [name for name in left if name.endswith(".lora_A.weight")]:
        path = name.removesuffix(".lora_A.weight")
        a, b = left.pop(name), left.pop(f"{path}.lora_B.weight")
        weight = model[f"{path}.weight"]
        rank = _by_pattern(config.get("rank_pattern"), path, config.get("r", 8))
        alpha = _number(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)))
        _check(a.ndim == b.ndim == 2 and rank == a.shape[0] == b.shape[1])
        _check((b.shape[0], a.shape[1]) == weight.shape)
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        product = (b.astype(mx.float32) @ a.astype(mx.float32)) * scale
        weight = weight + product.astype(a.dtype).astype(mx.float32)
        if config.get("use_dora"):
            name = f"{path}.lora_magnitude_vector"
            magnitude = left.pop(name if name in left else f"{name}.weight")
            _check(magnitude.shape == weight.shape[:1])
            factor = magnitude.astype(mx.float32) / mx.linalg.norm(weight, axis=1)
            weight = factor[:, None] * weight
        model[f"{path}.weight"] = weight
    for name in [*left]:  # modules_to_save
        plain = name.replace(".modules_to_save", "").replace(".base_layer", "")
        _check(model[plain].shape == left[name].shape)
        model[plain] = left.pop(name).astype(mx.float32)
    _check(not left)


def _by_pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default

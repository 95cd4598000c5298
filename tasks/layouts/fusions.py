"""fusions: which of a model's parameters an adapter changes, and by which of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tasks.checkpoints import adapter as adapters
from tasks.checkpoints.adapter import Adapter
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError
from tasks.core.text import listed, plural
from tasks.layouts.model import Model, Parameter

PREFIX = "base_model.model."
PARTS = re.compile(
    r"(?P<path>.*?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|lora_B\.bias)"
)
ROLES = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a",
         "lora_embedding_B": "b", "lora_magnitude_vector": "m",
         "lora_magnitude_vector.weight": "m"}  # fmt: skip


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """What an adapter does to a weight, or to one expert's of a stack of them.

    Attributes:
        kind: ``lora``, ``dora`` or ``replace``; with ``peft_`` before it, by PEFT's arithmetic.
        transposed: whether the factors make the transposed weight, as those of embeddings do not.
        scale: of the factors' product.
        expert: the first axis' index that it is for; None, all of the weight.
        tensors: by role (``a``, ``b``, ``m``, or ``weight``): name, dtype, shape, digest.
    """

    kind: str
    transposed: bool
    scale: float
    expert: int | None
    tensors: dict[str, tuple[str, str, tuple[int, ...], str]]


Deltas = dict[str, list[Delta]]


def deltas(adapter: Adapter, model: Model, checkpoint: Checkpoint) -> Deltas:
    """Return what an adapter does to a model, by the parameter's name.

    Raises:
        CheckpointError: some of its tensors fit nowhere, or it is of a kind that is not fused.
    """
    if adapter.file == adapters.MLX_LM:
        found = dict(_of_mlx_lm(adapter, model))
    else:
        found = _of_peft(adapter, model, checkpoint)
    used = {part[0] for each in found.values() for delta in each for part in delta.tensors.values()}
    if left := [name for name in adapter.tensors if name not in used]:
        quantized = [name for name in left if _is_packed(model, name)]
        mend = (
            "The model's own are quantized: add dequantize = true, and quantize = … for bits."
            if quantized
            else "Is it of another model, or of another version of it?"
        )
        raise CheckpointError(
            f"adapter {adapter.source.location}: {plural(len(left), 'tensor')} of it fit nowhere "
            f"in the model ({listed(left)}). {mend}"
        )
    return found


def _is_packed(model: Model, name: str) -> bool:
    path = re.sub(r"\.(lora_[abAB].*|m)$", "", name.removeprefix(PREFIX))
    return f"{path}.scales" in model.parameters


def _part(adapter: Adapter, name: str) -> tuple[str, str, tuple[int, ...], str]:
    tensor = adapter.tensors[name]
    return name, tensor.dtype, tensor.shape, adapter.digests[name]


def _of_mlx_lm(adapter: Adapter, model: Model) -> Iterator[tuple[str, list[Delta]]]:
    """Yield what ``mlx_lm.fuse`` would make of an adapter."""
    config = adapter.config
    if config.get("fine_tune_type") == "full":
        for name in adapter.tensors:
            if name in model.parameters and adapter.tensors[name].shape == _shape(model, name):
                delta = Delta("replace", False, 1.0, None, {"weight": _part(adapter, name)})
                yield name, [delta]
        return
    settings = config.get("lora_parameters")
    scale = settings.get("scale") if isinstance(settings, dict) else None
    if not isinstance(scale, (int, float)):
        raise CheckpointError(
            f"adapter {adapter.source.location}: {adapters.CONFIG} has no scale among "
            "lora_parameters, by which mlx-lm multiplies."
        )
    for path in (
        name.removesuffix(".lora_a") for name in adapter.tensors if name.endswith("lora_a")
    ):
        weight = f"{path}.weight"
        names = {role: f"{path}.{part}" for role, part in
                 (("a", "lora_a"), ("b", "lora_b"), ("m", "m"))}  # fmt: skip
        tensors = {r: _part(adapter, name) for r, name in names.items() if name in adapter.tensors}
        if weight not in model.parameters or "b" not in tensors or _is_packed(model, weight[:-7]):
            continue
        transposed = _transposed(_shape(model, weight), tensors["a"][2], tensors["b"][2])
        if transposed is None:
            continue
        kind = "dora" if config.get("fine_tune_type") == "dora" else "lora"
        if kind == "dora" and "m" not in tensors:
            raise CheckpointError(f"adapter {adapter.source.location}: {path}.m is missing.")
        yield weight, [Delta(kind, transposed, float(scale), None, tensors)]


def _shape(model: Model, name: str) -> tuple[int, ...]:
    return tuple(model.parameters[name].shape)


def _transposed(weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool | None:
    """Tell whether a · b is the transposed weight, as of a linear layer; None, it is neither."""
    if len(weight) == 3:  # experts: b · a of each
        fits = b[:2] == weight[:2] and a[-1] == weight[2] and len(a) in (2, 3)
        return False if fits else None
    if len(weight) != 2 or len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        return None
    if (b[1], a[0]) == weight:
        return True
    return False if (a[0], b[1]) == weight else None


def _of_peft(adapter: Adapter, model: Model, checkpoint: Checkpoint) -> Deltas:
    """Return what PEFT's ``merge_and_unload`` would make of an adapter.

    Raises:
        CheckpointError: it is of a kind that is not fused.
    """
    config = adapter.config
    _refuse_others(adapter)
    places = _Places(model, checkpoint)
    by_path: dict[str, dict[str, str]] = {}
    found: Deltas = {}
    for name in adapter.tensors:
        plain = name.removeprefix(PREFIX)
        if match := PARTS.fullmatch(plain):
            by_path.setdefault(match["path"], {})[match["part"]] = name
        else:  # modules_to_save, and biases that were trained
            plain = plain.replace(".modules_to_save", "").replace(".base_layer", "")
            for parameter, expert in places.of(plain):
                shape = parameter.shape if expert is None else parameter.shape[1:]
                if shape == adapter.tensors[name].shape:
                    part = {"weight": _part(adapter, name)}
                    delta = Delta("replace", False, 1.0, expert, part)
                    found.setdefault(parameter.name, []).append(delta)
    for path, parts in by_path.items():
        tensors = {
            ROLES[part]: _part(adapter, name) for part, name in parts.items() if part in ROLES
        }
        if not {"a", "b"} <= tensors.keys():
            continue
        scale = _scale(config, path, tensors["a"][2][0])
        for parameter, expert in places.of(f"{path}.weight"):
            shape = parameter.shape if expert is None else parameter.shape[1:]
            made = (tensors["b"][2][0], tensors["a"][2][1])
            embeds = "lora_embedding_A" in parts
            if (made[::-1] if embeds else made) == shape:
                kind = "peft_dora" if "m" in tensors else "peft_lora"
                delta = Delta(kind, embeds, scale, expert, tensors)
                found.setdefault(parameter.name, []).append(delta)
    return found


def _refuse_others(adapter: Adapter) -> None:
    """Refuse what PEFT has that is not fused here.

    Raises:
        CheckpointError: it is such.
    """
    config = adapter.config
    way = "Have PEFT merge it (merge_and_unload), and name the folder that this makes as source."
    kind = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if kind != "LORA":
        what = f"peft_type = {kind!r}"
    elif config.get("fan_in_fan_out"):
        what = "fan_in_fan_out = true"
    elif config.get("target_parameters"):
        what = f"target_parameters = {config['target_parameters']!r}"
    elif config.get("trainable_token_indices"):
        what = "trainable_token_indices"
    elif any(name.endswith("lora_B.bias") for name in adapter.tensors):
        what = "lora_bias = true"
    elif config.get("alora_invocation_tokens"):
        what = "alora_invocation_tokens, which no merged model has"
    else:
        return
    raise CheckpointError(
        f"adapter {adapter.source.location} has {what}, which is not fused here. {way}"
    )


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return what PEFT multiplies a module's product by."""
    alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, path: str, default: Any) -> Any:
    """Return the value of the first pattern that a path ends with (``get_pattern_key`` of PEFT)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


class _Places:
    """Finds what a checkpoint's tensors are in the model."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        self._made_of: dict[str, list[Parameter]] = {}
        for parameter in model.parameters.values():
            for key in parameter.inputs:
                self._made_of.setdefault(key, []).append(parameter)

    def of(self, name: str) -> Iterator[tuple[Parameter, int | None]]:
        """Yield the parameters that a tensor is, and as which expert's of a stack."""
        if name not in self._tensors:
            return
        key = self._tensors[name].inputs[0]
        for parameter in self._made_of.get(key, ()):
            steps = [list(step) for step in parameter.steps if step[0] != "unpack"]
            if not steps:
                yield parameter, None
            elif steps == [["stack", 0]]:
                each = len(parameter.inputs) // parameter.shape[0]
                yield parameter, parameter.inputs.index(key) // each

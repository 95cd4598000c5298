"""keeping: a model whose weights stay as many bits as its author packed them to, in MLX's packing.

The plan of the plain model says what each weight is made of. Where that is packed alike, and MLX
has a packing for the same numbers, the weight's parameters are made of these, and not of floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import structs

from tasks.core.errors import ConfigError
from tasks.core.spec import Target
from tasks.core.text import plural
from tasks.layouts.model import Model, Module, Parameter
from tasks.unpack.packed import Repacking

BY_ROWS = (["stack", 0], ["concatenate", 0])  # steps that leave rows whole, as does half_split
SIGNIFICAND_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}


class Weight(NamedTuple):
    """A weight that can be kept.

    Attributes:
        module: whose it is.
        parameter: the same, as floats.
        repacking: how MLX holds it.
    """

    module: Module
    parameter: Parameter
    repacking: Repacking


def weights(model: Model) -> list[Weight]:
    """Return the weights that MLX can hold as they are packed; of a plain model, none."""
    if model.unpacked is None:
        return []
    found = []
    for module in model.modules:
        parameter = model.parameters.get(f"{module.path}.weight")
        if parameter is None or "scales" not in (module.quantized_names or ()):
            continue
        if held := _repacking(parameter, model.unpacked.repackings):
            found.append(Weight(module, parameter, held))
    return found


def _repacking(
    parameter: Parameter, repackings: Mapping[str, Repacking | None]
) -> Repacking | None:
    """Return how MLX holds all that a parameter is made of, if that is packed alike."""
    if not parameter.steps or parameter.steps[0][0] != "unpack":
        return None
    unpack, *rest = parameter.steps
    if any(list(step) not in BY_ROWS and step[0] != "half_split" for step in rest):
        return None
    firsts = []
    at = 0
    for count, _, inputs, _ in unpack[3]:
        firsts += [parameter.inputs[at + number * inputs] for number in range(count)]
        at += count * inputs
    held = {repackings.get(key) for key in firsts}
    alike = {each and each._replace(centred=True) for each in held}
    if len(alike) != 1 or None in alike:
        return None
    (one,) = alike
    return one and one._replace(centred=all(each and each.centred for each in held))


def is_exact(model: Model, found: Sequence[Weight], dtype: str | None) -> bool:
    """Tell whether all weights that are packed can be kept without loss.

    Args:
        model: the model.
        found: those that can be kept.
        dtype: what the target casts to.
    """
    packed = [p for p in model.parameters.values() if p.steps and p.steps[0][0] == "unpack"]
    exact = all(weight.repacking.is_exact(_dtype(weight, dtype)) for weight in found)
    return bool(found) and exact and len(found) == len(packed)


def chosen(target: Target, model: Model, dtype: str | None) -> list[Weight]:
    """Return the weights that a target keeps as they are packed; none, if it is made of floats.

    Args:
        target: what is asked for.
        model: the model, as floats where it was unpacked.
        dtype: what the target casts to.

    Raises:
        ConfigError: it is to keep what cannot be kept.
    """
    if not target.keep:
        if target.quantize or target.dequantize or target.adapter or not model.unpacked:
            return []
        found = weights(model)
        return found if is_exact(model, found, dtype) else []
    for key, other in (("dequantize", target.dequantize), ("adapter", target.adapter)):
        if other:
            raise ConfigError(
                f'quantize = "keep" beside {key}, which takes floats. Drop one, or say to how many '
                "bits these are quantized: quantize = { bits = 4 }"
            )
    found = weights(model)
    if not found and "quantization" not in model.config:
        raise ConfigError(
            'quantize = "keep", but MLX has no packing for the numbers of this checkpoint, or they '
            "are not packed. Drop it for floats, or say to how many bits: quantize = { bits = 4 }"
        )
    return found


def notes(target: Target, model: Model, dtype: str | None) -> tuple[str, ...]:
    """Return what people should know of a checkpoint that was packed: what became of that."""
    if not model.unpacked:
        return model.kept
    note = model.unpacked.note
    if not (found := weights(model)) or target.dequantize or target.adapter:
        return (note,)
    kinds = ", ".join(sorted({words(weight.repacking) for weight in found}))
    exact = is_exact(model, found, dtype)
    how = "without loss" if exact else max(_rounded(weight, dtype) for weight in found)
    cost = "These are rounded again: " if target.quantize else ""
    return (f'{note}. {cost}quantize = "keep" holds their numbers ({kinds}), {how}',)


def _dtype(weight: Weight, dtype: str | None) -> str | None:
    """Return what a weight's scales are cast to, if they are."""
    return dtype if dtype in SIGNIFICAND_BITS and weight.parameter.castable else None


def kept(model: Model, found: Sequence[Weight], dtype: str | None) -> Model:
    """Return a model with these weights as they are packed.

    Args:
        model: the model, of floats.
        found: the weights.
        dtype: what the target casts to.
    """
    by_name = {weight.parameter.name: weight for weight in found}
    parameters: dict[str, Parameter] = {}
    for name, parameter in model.parameters.items():
        if weight := by_name.get(name):
            parameters |= {part.name: part for part in _parts(weight, dtype)}
        else:
            parameters[name] = parameter
    by_path = {weight.module.path: weight for weight in found}
    modules = tuple(
        _module(by_path[module.path]) if module.path in by_path else module
        for module in model.modules
    )
    settings = {path: _setting(weight.repacking) for path, weight in by_path.items()}
    config = {**model.config, "quantization": _table(settings)}
    return structs.replace(
        model,
        parameters=parameters,
        modules=modules,
        config=config,
        unpacked=None,
        kept=_kept_notes(model, found, dtype),
    )


def _setting(held: Repacking) -> tuple[int, int, str]:
    return held.group_size, held.bits, held.mode


def _table(settings: Mapping[str, tuple[int, int, str]]) -> dict[str, Any]:
    """Return what config.json says: what most have, and by path what others have."""
    (most, _), *_ = Counter(settings.values()).most_common(1)
    keys = ("group_size", "bits", "mode")
    table: dict[str, Any] = dict(zip(keys, most, strict=True))
    others = {path: setting for path, setting in settings.items() if setting != most}
    return table | {path: dict(zip(keys, each, strict=True)) for path, each in others.items()}


def _module(weight: Weight) -> Module:
    """Return a module as it is once its weight is packed."""
    module, held = weight.module, weight.repacking
    names = tuple(
        name for name in module.quantized_names or () if name != "biases" or held.mode == "affine"
    )
    return module._replace(names=names, quantized_names=None)


def _parts(weight: Weight, dtype: str | None) -> list[Parameter]:
    """Return the parameters that a weight is held in."""
    parameter, held = weight.parameter, weight.repacking
    unpack, *rest = parameter.steps
    *lead, columns = parameter.shape
    affine = held.mode == "affine"
    scales = held.scales if affine else "uint8"
    biases = _dtype(weight, dtype) or scales  # rounded once, from float32
    exact = held.is_exact(_dtype(weight, dtype))
    path = parameter.name.removesuffix("weight")
    made = []
    for part, floats, width in (
        ("weight", "", columns * held.bits // 32),
        ("scales", scales, columns // held.group_size),
        ("biases", biases, columns // held.group_size),
    )[: 3 if affine else 2]:
        step = ["repack", unpack[1], part, floats, list(_setting(held)), exact, unpack[3]]
        made.append(
            Parameter(
                path + part,
                floats or "uint32",
                (*lead, width),
                parameter.inputs,
                (step, *rest),
                parameter.castable and affine and part != "weight",
            )
        )
    return made


def _kept_notes(model: Model, found: Sequence[Weight], dtype: str | None) -> tuple[str, ...]:
    """Return what people should know of what is kept, and of what is not."""
    exact = [weight for weight in found if weight.repacking.is_exact(_dtype(weight, dtype))]
    notes = []
    for all_of, how in ((exact, "the very same values"), (found, "")):
        several = [weight for weight in all_of if how or weight not in exact]
        if several:
            kinds = sorted({words(weight.repacking) for weight in several})
            how = how or max(_rounded(weight, dtype) for weight in several)
            notes.append(
                f"{plural(len(several), 'weight')} repacked and not rounded again "
                f"({', '.join(kinds)}): {how}"
            )
    packed = [p for p in model.parameters.values() if p.steps and p.steps[0][0] == "unpack"]
    if left := len(packed) - len(found):
        notes.append(f"{plural(left, 'weight')} unpacked to floats, since MLX cannot hold them")
    return tuple(notes)


def _rounded(weight: Weight, dtype: str | None) -> str:
    held = weight.repacking
    target = _dtype(weight, dtype) or held.scales
    step = (2**held.bits - 1) / 2 ** (SIGNIFICAND_BITS[target] + 1)
    step *= 1 if target == held.scales else 2
    return (
        f"zero points times scales are rounded to {target}, by {step:.1g} at most of the distance "
        "between two numbers"
    )


def words(held: Repacking) -> str:
    """Return a packing in words."""
    mode = "" if held.mode == "affine" else f" {held.mode}"
    return f"{held.bits} bits{mode} in groups of {held.group_size}"

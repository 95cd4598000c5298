"""registry: the formats, and checkpoints without them. A new one is a module and a line here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.stored import TORCH
from tasks.core.errors import CheckpointError
from tasks.core.text import listed, plural
from tasks.tensors import rows, steps
from tasks.tensors.rows import Rows
from tasks.unpack import (
    awq,
    bitsandbytes,
    block_fp8,
    compressed_integers,
    fp4,
    gptq,
    hqq,
    mlx_packed,
    mxfp8,
    quanto,
    scaled_fp8,
    torchao,
)
from tasks.unpack.packed import Format, Found, Packed, Repacking
from tasks.unpack.whole_numbers import Affine, WholeNumbers

FORMATS: dict[str, Format] = {
    mxfp8.NAME: mxfp8,
    block_fp8.NAME: block_fp8,
    fp4.NAME: fp4,
    scaled_fp8.NAME: scaled_fp8,
    compressed_integers.NAME: compressed_integers,
    gptq.NAME: gptq,
    awq.NAME: awq,
    bitsandbytes.NAME: bitsandbytes,
    hqq.NAME: hqq,
    torchao.NAME: torchao,
    quanto.NAME: quanto,
    mlx_packed.NAME: mlx_packed,
}
STACKED = (block_fp8.NAME, scaled_fp8.NAME, mlx_packed.NAME)  # take axes before the last two
TRIED = (block_fp8.NAME,)  # formats that classes of libraries unpack by themselves
MAX_READ_BYTES = 1 << 20  # of a tensor that says how another is packed
MOST_TRIED = 4  # weights of a shape and a depth: a library may have some under other names
# What reading settings and headers of another format than they say may raise.
ODD = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
SETTINGS = "quantization_config"
SETTINGS_FILES = ("hf_quant_config.json", quanto.MAP)
ALL_SETTINGS = (SETTINGS, "compression_config", "quantization")


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint says of how it is quantized; nothing if it says nothing."""
    config = checkpoint.config
    for table in (config, config.get("text_config")):
        if isinstance(table, dict):
            for key in (SETTINGS, "compression_config"):
                if isinstance(table.get(key), dict):
                    return dict(table[key])
    for file, make in (
        ("hf_quant_config.json", lambda said: {"quant_method": "modelopt", **said}),
        (quanto.MAP, lambda said: {"quant_method": "quanto", "map": said, "config": config}),
    ):
        try:
            said = json.loads(checkpoint.files.get(file, "{}"))
        except (ValueError, RecursionError):
            continue
        if isinstance(said, dict) and said:
            return make(said)
    return {}


def found(checkpoint: Checkpoint) -> Found | None:
    """Return what a checkpoint holds in formats that can be unpacked, if it does.

    Layers may be of several: attention in FP8, say, and experts in NVFP4.

    Raises:
        CheckpointError: it is in one, of a variant that cannot.
    """
    settings = settings_of(checkpoint)
    method = settings.get("quant_method")
    all_found = []
    for module in FORMATS.values():
        if method in module.METHODS:
            try:
                if one := module.found(settings, checkpoint.tensors, partial(_read, checkpoint)):
                    all_found.append(one)
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint.folder}: {error}") from error
            except ODD as error:
                raise CheckpointError(
                    f"{checkpoint.folder}: its tensors are not as {method!r} has them "
                    f"({type(error).__name__}: {error}). Download it anew."
                ) from error
    return _together(all_found)


def _together(all_found: Sequence[Found]) -> Found | None:
    """Return as one what is of several formats; a weight is of the first that finds it."""
    if len(all_found) < 2:
        return all_found[0] if all_found else None
    packed: dict[str, Packed] = {}
    for one in all_found:
        packed = {n: each._replace(format=one.format) for n, each in one.packed.items()} | packed
    return Found(
        "+".join(one.format for one in all_found),
        packed,
        tuple(dict.fromkeys(name for one in all_found for name in one.left_out)),
        tuple(dict.fromkeys(name for one in all_found for name in one.used_up)),
        " and ".join(one.called or one.format for one in all_found),
    )


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    """Return a small tensor's bytes.

    Raises:
        CheckpointError: it is large, or no plain bytes of a file.
    """
    (key,) = checkpoint.tensors[name].inputs
    stored = checkpoint.stored[key]
    if stored.offset == TORCH or stored.nbytes > MAX_READ_BYTES:
        raise CheckpointError(f"{name} cannot be read while a build is planned.")
    return b"".join(checkpoint.source.read(stored.file, stored.offset, stored.nbytes))


def trial(found: Found) -> dict[str, Any] | None:
    """Return what to try a library by: whether it unpacks a format as we do; None if none does."""
    if found.format not in TRIED:
        return None
    weights: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for name, (shape, inputs, settings, *_) in found.packed.items():
        edges = [n % side > 0 for n, side in zip(shape[-2:], settings["block"], strict=True)]
        kind = f"{len(shape)} {edges} {list(shape[-2:]) == settings['block']}"
        alike = weights.setdefault((kind, name.rpartition(".layers.")[2].count("."), shape), [])
        if len(alike) < MOST_TRIED:
            alike.append(
                {"name": name, "kind": kind, "shape": shape, "inputs": inputs, "settings": settings}
            )
    tried = [each for alike in weights.values() for each in alike]
    return {"format": found.format, "weights": tried}


def dequantized(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """Return a checkpoint that MLX quantized, or another format, as the plain model.

    Args:
        checkpoint: the checkpoint.
        dtype: what the target casts to.

    Raises:
        CheckpointError: it is quantized in a way that is not unpacked.
    """
    settings = checkpoint.config.get("quantization")
    if isinstance(settings, dict):
        try:
            one = mlx_packed.found(settings, checkpoint.tensors, partial(_read, checkpoint))
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.folder}: {error}") from error
        except ODD as error:
            raise CheckpointError(
                f"{checkpoint.folder}: its tensors are not as MLX quantizes them "
                f"({type(error).__name__}: {error}). Download it anew."
            ) from error
        if one:
            packed = {
                name: each._replace(settings={**each.settings, "dtype": dtype})
                for name, each in one.packed.items()
            }
            return unpacked(checkpoint, one._replace(packed=packed), "")
    if one := found(checkpoint):
        return unpacked(checkpoint, one)
    if settings := settings_of(checkpoint):
        raise CheckpointError(
            f"{checkpoint.folder}: dequantize = true, but its quantization (quant_method = "
            f"{settings.get('quant_method')!r}) is none that is unpacked here. "
            "Build from the checkpoint that was not quantized."
        )
    return replace(
        checkpoint,
        notes=(*checkpoint.notes, "dequantize has nothing to do: the checkpoint is not quantized"),
    )


def unpacked(checkpoint: Checkpoint, found: Found, dtype: str = "float32") -> Checkpoint:
    """Return a checkpoint as the plain model that it stands for.

    Args:
        checkpoint: the checkpoint.
        found: what it holds.
        dtype: of the floats; "" for the format's own, which may be another for each.
    """
    gone = {*found.left_out, *found.used_up}
    gone |= {name for each in found.packed.values() for name in each.inputs}
    tensors = {name: t for name, t in checkpoint.tensors.items() if name not in gone}
    stored = checkpoint.tensors
    for name, each in found.packed.items():
        inputs = [stored[part] for part in each.inputs]
        keys: tuple[str, ...] = ()
        for part in inputs:
            keys += part.inputs
            if part.steps:
                raise CheckpointError(f"{checkpoint.folder}: {name} is both packed and sharded.")
        packing = [1, list(each.shape), len(keys), each.settings]
        name_of = each.format or found.format
        own = dtype or _dtype(name_of, each, inputs)
        step = ["unpack", name_of, own, [packing]]
        tensors[name] = LogicalTensor(own, each.shape, keys, (step,))
    config = _without_settings(checkpoint.config)
    files = {n: text for n, text in checkpoint.files.items() if n not in SETTINGS_FILES}
    files["config.json"] = json.dumps(config)
    notes = checkpoint.notes
    if found.left_out:
        notes = (
            *notes,
            f"{plural(len(found.left_out), 'tensor')} that scale activations left out, which MLX "
            f"does not quantize ({listed(found.left_out)})",
        )
    return replace(checkpoint, config=config, files=files, tensors=tensors, notes=notes)


def _dtype(name: str, each: Packed, inputs: Sequence[LogicalTensor]) -> str:
    """Return the dtype that a format itself makes of a weight."""
    headers = [rows.Header(tensor.dtype, tensor.shape) for tensor in inputs]
    return FORMATS[name].rows(headers, each.shape, each.settings).dtype


def repackings(checkpoint: Checkpoint, found: Found) -> dict[str, Repacking | None]:
    """Return how MLX holds each weight, by the key of the first tensor that it is made of."""
    return {
        checkpoint.tensors[each.inputs[0]].inputs[0]: each.repacking
        for each in found.packed.values()
    }


def _without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {
        k: v for k, v in config.items() if k not in (SETTINGS, "compression_config", "quantization")
    }
    inner = plain.get("text_config")
    return {**plain, "text_config": _without_settings(inner)} if isinstance(inner, dict) else plain


def joined(tensors: Sequence[LogicalTensor]) -> list[Any] | None:
    """Return the step that unpacks all of these tensors, of one format; None if none is packed.

    Raises:
        ValueError: it takes several, or other steps as well.
    """
    made_by = [tensor.steps for tensor in tensors]
    if not any(made_by):
        return None
    packings: list[list[Any]] = []
    for own in made_by:
        if len(own) != 1 or own[0][:3] != made_by[0][0][:3] or own[0][0] != "unpack":
            raise ValueError("tensors that are not made alike")
        for count, *packing in own[0][3]:
            if packings and packings[-1][1:] == packing:
                packings[-1][0] += count
            else:
                packings.append([count, *packing])
    return [*made_by[0][0][:3], packings]


def apply(sources: Sequence[Rows], made_by: Sequence[steps.Step]) -> Rows:
    """Return the tensor that steps make of ``sources``, unpacked first where they say so.

    Raises:
        ValueError: a library has to make it.
    """
    if made_by and isinstance(made_by[0], (steps.Unpack, steps.Repack)):
        if made_by[1:] == (steps.Stack(0),) and (stack := _unpack_stack(sources, made_by[0])):
            return stack
        sources, made_by = list(_unpack(sources, made_by[0])), made_by[1:]
    return steps.apply(sources, made_by)


def held_bytes(nbytes: Sequence[int], made_by: Sequence[steps.Step]) -> int:
    """Return the bytes that unpacking holds at once, besides blocks of rows.

    Args:
        nbytes: of each tensor that is read, in order.
        made_by: the steps.
    """
    if not (made_by and isinstance(made_by[0], (steps.Unpack, steps.Repack))):
        return 0
    module = FORMATS[made_by[0].format]
    left = iter(nbytes)
    each = [
        module.held_bytes([next(left) for _ in range(packing.inputs)])
        for packing in made_by[0].tensors
        for _ in range(packing.count)
    ]
    return sum(each) if made_by[0].format in STACKED else max(each, default=0)


def _unpack_stack(sources: Sequence[Rows], step: steps.Unpack | steps.Repack) -> Rows | None:
    """Return a stack of weights that are packed alike, unpacked in one go; None if they are not.

    A mixture of experts has hundreds in a layer: each by itself takes longer than its numbers.
    """
    if step.format not in STACKED or len(step.tensors) != 1:
        return None
    (packing,) = step.tensors
    joined: list[Rows] = []
    for number in range(packing.inputs):
        parts = sources[number :: packing.inputs]
        if len({(part.dtype, part.shape) for part in parts}) != 1:
            return None
        if not all(isinstance(part, rows.Stored) for part in parts):
            return None
        joined.append(rows.end_to_end(parts, (len(parts), *parts[0].shape)))
    return _as(step, packing, joined, (packing.count, *packing.shape))


def _as(
    step: steps.Unpack | steps.Repack,
    packing: steps.Packing,
    parts: Sequence[Rows],
    shape: tuple[int, ...],
) -> Rows:
    if isinstance(step, steps.Repack) and step.format in (fp4.NAME, mxfp8.NAME):
        return fp4.SameBytes(parts[0 if step.part == "weight" else 1], step.part)
    made = FORMATS[step.format].rows(parts, shape, packing.settings)
    if isinstance(step, steps.Repack):
        assert isinstance(made, WholeNumbers)
        return Affine(made, step.part, step.setting[0], step.dtype, step.exact)
    return made if made.dtype == step.dtype else rows.Cast(made, step.dtype)


def _unpack(sources: Sequence[Rows], step: steps.Unpack | steps.Repack) -> Iterator[Rows]:
    """Yield each weight; of several, no more than one holds what it has read of its tensors."""
    left = iter(sources)
    latest = rows.Latest()
    for packing in step.tensors:
        for _ in range(packing.count):
            parts = [next(left) for _ in range(packing.inputs)]
            make = partial(_as, step, packing, parts, packing.shape)
            yield rows.MadeWhenRead(make, latest) if len(sources) > packing.inputs else make()

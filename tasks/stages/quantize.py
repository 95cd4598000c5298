"""quantize: the modules that the target says, and mlx-lm would, as ``mx.quantize`` packs them."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from cache.records.manifests import Tensor
from tasks.config.keys import MODES
from tasks.config.reader import Quantize, Rule
from tasks.core.errors import ConfigError
from tasks.core.text import plural
from tasks.layouts.model import Model, Module
from tasks.tensors import arrays, kernels, mx, rows
from tasks.tensors.rows import Rows

if TYPE_CHECKING:
    from tasks.execution.builder import Builder, Made
    from tasks.execution.draft import Draft
    from tasks.planning.plan import Needed, Node, Plan

VERSION = 1
PARTS = ("weight", "scales", "biases")  # what mx.quantize returns, as the modules name them
# An operation costs some microseconds to begin: smaller blocks take longer, larger ones only more
# memory. A GPU pays by the call, though not for so long that Metal's watchdog minds.
BLOCK_BYTES = {"cpu": 2 << 20, "gpu": 32 << 20}
# A block, and what is made of it: on a CPU on the way to fp4, which takes the most.
IN_FLIGHT_BLOCKS = {"cpu": 10, "gpu": 8}
SLICES = 16  # MLX's own takes 40 times what it is given, for fp4 on a CPU: so 40/16 of a block


class Setting(NamedTuple):
    """How one weight is quantized: ``mx.quantize``'s arguments."""

    group_size: int
    bits: int
    mode: str


@dataclass(frozen=True)
class Scheme:
    """What is quantized, and what config.json says of it.

    Attributes:
        settings: by the module's path; modules that stay as they are have none.
        config: the table ``quantization``, None if nothing is to be quantized.
        notes: what people should know: modules that were to be quantized and cannot be.
    """

    settings: dict[str, Setting]
    config: dict[str, Any] | None
    notes: tuple[str, ...] = ()


def plan(model: Model, quantize: Quantize | None) -> Scheme:
    """Decide how each module is quantized, as ``mlx_lm.utils.quantize_model`` does.

    On top of mlx-lm's verdict (the model's own or the recipe's) the first rule that matches a
    module's path wins.

    Raises:
        ConfigError: the recipe does not fit the model, or a rule matches nothing.
    """
    given = model.config.get("quantization")
    if quantize is None:
        return Scheme({}, None)
    recipe = model.recipes.get(quantize.recipe) if quantize.recipe else None
    if isinstance(recipe, str):
        raise ConfigError(
            f"recipe {quantize.recipe!r} does not fit the model: {recipe} Use bits instead."
        )
    default = _complete(quantize.mode, quantize.group_size, quantize.bits)
    # A checkpoint that is quantized already keeps its settings; the new ones stand per module.
    config: dict[str, Any] = dict(given) if given else default._asdict()
    settings: dict[str, Setting] = {}
    narrow: dict[tuple[int, int], list[str]] = {}
    unused = set(quantize.rules)
    for module in model.modules:
        if module.quantized_names is None:
            continue
        rule = next((r for r in quantize.rules if fnmatchcase(module.path, r.match)), None)
        if rule:
            unused.discard(rule)
        if rule and rule.skip:
            continue
        verdict = module.verdict
        if recipe is not None:
            bits = recipe[module.path]
            # mlx_lm.convert writes a group size that nobody gave as null, and reads it so.
            verdict = {"group_size": quantize.group_size, "bits": bits, "mode": "affine"}
        setting = default
        if rule:
            verdict = _apply(rule, verdict, default)
        if isinstance(verdict, dict):
            setting = _complete(
                verdict.get("mode", "affine"), verdict.get("group_size"), verdict.get("bits")
            )
        width = model.parameters[weight_name(module.path)].shape[-1]
        # mlx-lm asks this of the target's own group size first, unless a rule brings another.
        group_sizes = {setting.group_size} if rule else {default.group_size, setting.group_size}
        if odd := [size for size in group_sizes if width % size]:
            narrow.setdefault((width, odd[0]), []).append(module.path)
            continue
        if not verdict:
            continue
        if isinstance(verdict, dict):
            config[module.path] = verdict
        elif given:
            config[module.path] = default._asdict()
        if not module.quantized_names:
            raise ConfigError(
                f"{module.path} is quantized by mlx-lm in a way of its own, which mlx-make does "
                f'not know. Skip it: rules = [{{ match = "{module.path}", skip = true }}]'
            )
        settings[module.path] = setting
    if unused:
        rule = min(unused, key=quantize.rules.index)
        paths = [module.path for module in model.modules if module.quantized_names]
        raise ConfigError(
            f"rule {rule.match!r} matches no module that can be quantized, or none that an "
            f"earlier rule left. There are {', '.join(paths[:3])}, … ({len(paths)} in all); "
            "'*' matches any run of characters."
        )
    notes = [
        f"{plural(len(paths), 'module')} left unquantized: a last axis of {width} is no multiple "
        f"of the group size, {size} ({', '.join(paths[:3])}{', …' if len(paths) > 3 else ''})"
        for (width, size), paths in narrow.items()
    ]
    if not settings and not notes:
        notes.append("nothing is quantized: the checkpoint has no module that can be")
    return Scheme(settings, config, tuple(notes))


def backend(device: str | None) -> str:
    """Return what computes on ``device``: ``cpu``, ``metal``, ``cuda``. They differ in the bits.

    Args:
        device: ``cpu``, ``gpu``, or None for MLX's default device.

    Raises:
        ConfigError: MLX has no GPU here.
    """
    if device == "cpu" or (device is None and mx.default_device().type == mx.cpu):
        return "cpu"
    if mx.metal.is_available():
        return "metal"
    if mx.cuda.is_available():
        return "cuda"
    raise ConfigError(
        'device = "gpu", but MLX finds no GPU on this machine. Use device = "cpu", or leave it '
        "out for MLX's own default."
    )


def device_of(backend: str) -> str:
    """Return the device, ``cpu`` or ``gpu``, of what computes."""
    return "cpu" if backend == "cpu" else "gpu"


def memory(backend: str) -> int:
    """Return the bytes that work on one weight takes: a few blocks, however large it is."""
    device = device_of(backend)
    return IN_FLIGHT_BLOCKS[device] * BLOCK_BYTES[device]


def names(module: Module, setting: Setting | None) -> tuple[str, ...]:
    """Return a module's parameters in the order of the built model, quantized or not."""
    held = module.names if setting is None else module.quantized_names or ()
    if setting is not None and setting.mode != "affine":
        held = tuple(name for name in held if name != "biases")
    return _below(module.path, held)


@cache  # all targets of a model ask for the same
def _below(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sys.intern(f"{path}.{name}") if path else name for name in names)


def make(builder: Builder, plan: Plan, node: Node, needed: Needed) -> Made:
    """Quantize a layer."""
    made: dict[str, Tensor] = {}
    notes = []
    draft = builder.drafts.begin(builder, plan) if node.params["settings"] else None
    for name in needed:
        if name not in node.params["settings"]:
            made[name] = builder.kept(plan, needed, name)
            continue
        setting = Setting(*node.params["settings"][name])
        whole = builder.rows(plan, needed, name)
        packed, finite = _quantize_rows(builder, draft, name, whole, setting, node.params["device"])
        if not finite:
            notes.append(f"{name} holds NaN or infinity, which no quantized weight can show")
        made |= packed
    return made, notes


def _quantize_rows(
    builder: Builder, draft: Draft | None, name: str, whole: Rows, setting: Setting, backend: str
) -> tuple[dict[str, Tensor], bool]:
    """Quantize the weight ``name``; return its parts, and whether all of it was finite."""
    blobs = builder.store.blobs
    device = device_of(backend)
    stream = builder.streams.get(device)
    names = parts(name, setting)
    finite = True
    packed: tuple[mx.array, ...] = ()
    with ExitStack() as stack:
        packed_bytes = prod(whole.shape) * setting.bits // 8
        writers = [
            stack.enter_context(draft.writing(part) if draft else blobs.writing(packed_bytes))
            for part in names
        ]
        for start, stop in rows.spans(whole, BLOCK_BYTES[device]):
            block = _read(builder, whole, start, stop, device)
            with mx.stream(stream):
                packed, made, all_finite = _quantize_block(block, setting, device)
            for writer, data in zip(writers, made, strict=True):
                writer.write(data)
            finite = finite and all_finite
    return {
        name: Tensor(arrays.dtype_name(part), (*whole.shape[:-1], part.shape[-1]), writer.digest)
        for name, part, writer in zip(names, packed, writers, strict=True)
    }, finite


def _quantize_block(
    block: mx.array, setting: Setting, device: str
) -> tuple[tuple[mx.array, ...], list[memoryview], bool]:
    """Quantize rows; return their parts, the bytes of these, and whether all rows were finite."""
    told = setting._asdict()
    if device == "cpu" and kernels.agrees(block.dtype, **told):
        packed, large = kernels.quantize_fast(block, **told)
        made = arrays.views(packed, large, together=False)
        if not large.item():
            return packed, made, True
    if device == "cpu":
        packed = _quantize_slices(block, setting)
    else:
        packed = kernels.quantize(block, **told)
    odd = kernels.not_finite(block)
    made = arrays.views(packed, odd, together=device == "gpu")
    return packed, made, not odd.item()


def _quantize_slices(block: mx.array, setting: Setting) -> tuple[mx.array, ...]:
    """Quantize rows as MLX's own does, so few at a time that it takes no more memory."""
    step = 2 * max(1, len(block) // (2 * SLICES))
    slices = []
    for start in range(0, len(block), step):
        some = block[start : start + step]
        parts = kernels.quantize(kernels.even_rows(some), **setting._asdict())
        slices.append([part[: len(some)] for part in parts])
        mx.eval(slices[-1])
    return tuple(mx.concatenate(list(parts)) for parts in zip(*slices, strict=True))


def _read(builder: Builder, whole: Rows, start: int, stop: int, device: str) -> mx.array:
    """Return rows of a weight, where ``device`` can read them, until the next are asked for."""
    if isinstance(whole, rows.Stored):
        with mx.stream(builder.streams.get(device)):
            return whole.read(start, stop, builder.streams.memory(BLOCK_BYTES[device]))
    block = whole.read(start, stop)  # joined or cast: the CPU's
    if device == "gpu":
        arrays.share(block)
    return block


def parts(weight: str, setting: Setting) -> list[str]:
    """Return the names of what a weight is quantized to."""
    prefix = weight.removesuffix("weight")
    return [prefix + part for part in PARTS[: 3 if setting.mode == "affine" else 2]]


def weight_name(path: str) -> str:
    """Return the name of the weight of the module at ``path``."""
    return f"{path}.weight" if path else "weight"


def _complete(mode: str, group_size: int | None, bits: int | None) -> Setting:
    group_sizes, all_bits = MODES[mode]
    return Setting(group_size or group_sizes[0], bits or all_bits[0], mode)


def _apply(rule: Rule, verdict: bool | dict[str, Any], default: Setting) -> dict[str, Any]:
    base = dict(verdict) if isinstance(verdict, dict) else default._asdict()
    mode = rule.mode or default.mode  # what the rule's numbers were checked against
    if mode != base.get("mode", "affine"):
        base = {}  # another mode's numbers mean nothing here
    return _complete(
        mode, rule.group_size or base.get("group_size"), rule.bits or base.get("bits")
    )._asdict()

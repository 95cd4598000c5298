"""quantize: the modules that the target says, and mlx-lm would, as ``mx.quantize`` packs them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from typing import Any

from cache.digest import CHUNK_BYTES, digest, digest_parts
from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import BuildError
from tasks.core.quantization import MODES
from tasks.stages import quantize_scheme
from tasks.stages.quantize_scheme import Setting
from tasks.stages.reasons import Reason, changed_values, changes, come_and_gone
from tasks.stages.stage import (
    COMPUTER,
    Context,
    Inputs,
    Keep,
    Key,
    Need,
    Origin,
    Output,
    Params,
    Planned,
    Result,
    Stage,
    TargetModel,
)  # fmt: skip
from tasks.tensors import arrays, kernels, mx, rows
from tasks.tensors.device import BLOCK_BYTES, device_of
from tasks.tensors.rows import IN_FLIGHT_BYTES, Rows

# A block, and what is made of it: on a CPU on the way to fp4, which takes the most.
IN_FLIGHT_BLOCKS = {"cpu": 10, "gpu": 8}
SLICES = 16  # MLX's own takes 40 times what it is given, for fp4 on a CPU: so 40/16 of a block


class QuantizeParams(Params, frozen=True):
    """What is quantized.

    Attributes:
        settings: how, by the weight's name; other tensors stay as they are.
        mlx: MLX's version; this and the next two are empty if nothing is computed.
        device: what computes: ``cpu``, ``metal``, ``cuda``.
        machine: the processor.
    """

    settings: dict[str, Setting]
    mlx: str = ""
    device: str = ""
    machine: str = ""


def memory(backend: str) -> int:
    """Return the bytes that work on one weight takes: a few blocks, however large it is."""
    device = device_of(backend)
    return max(IN_FLIGHT_BLOCKS[device] * BLOCK_BYTES[device], IN_FLIGHT_BYTES)


def settings_digest(settings: Mapping[str, Setting]) -> str:
    """Return a digest of how weights are quantized, of which a large model has thousands."""
    return digest(QuantizeParams({**settings}).encoded)


# Quantizes a weight; returns its parts by name, and whether all of it was finite.
Quantizer = Callable[[Key, Setting], tuple[dict[str, Tensor], bool]]


class Quantize(Stage[QuantizeParams]):
    """Quantize each layer."""

    name = "quantize"
    version = 1
    keep = Keep.ALWAYS
    params = QuantizeParams
    one_by_one = True

    def plan(self, target: TargetModel) -> Mapping[str, Planned[QuantizeParams]]:
        """Plan what the target's settings say."""
        planned = {}
        for layer, parameters in target.layers.items():
            names = [p.name for p in parameters if p.name in target.settings]
            settings = {name: target.settings[name] for name in names}
            computer = target.computer._asdict() if settings else {}
            params = QuantizeParams(settings, **computer)
            planned[layer] = Planned(params, (Need(target.roles.unquantized, layer),))
        return planned

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return a digest of the settings."""
        return settings_digest(target.settings)

    def outputs(
        self, params: QuantizeParams, inputs: Mapping[Key, TensorSpec]
    ) -> dict[str, Output]:
        """Return each weight's parts; the rest is passed on."""
        outputs = {}
        for key, spec in inputs.items():
            if setting := params.settings.get(key.name):
                for name, part in part_specs(key.name, spec, setting).items():
                    outputs[name] = Output(part, Origin.STORED, (key,))
            else:
                outputs[key.name] = Output(spec, Origin.PASSED_ON, (key,))
        return outputs

    def run(self, params: QuantizeParams, inputs: Inputs, context: Context) -> Result:
        """Quantize a layer."""
        tensors: dict[str, Tensor] = {}
        notes: list[str] = []
        quantize = self.quantizer(params, context)
        for key in inputs:
            setting = params.settings.get(key.name)
            if setting is None:
                tensors[key.name] = self.leave(key, params, context)
            else:
                made = context.made(key) or _with_notes(key, setting, *quantize(key, setting))
                tensors |= made.tensors
                notes += made.notes
        return Result(tensors, tuple(notes))

    def make(self, params: QuantizeParams, key: Key, source: Rows, context: Context) -> Result:
        """Quantize a weight."""
        setting = params.settings[key.name]
        blocks = _blocks(context, source, setting, params.device)
        return _with_notes(key, setting, *write_parts(context, key.name, source, setting, blocks))

    def leave(self, key: Key, params: QuantizeParams, context: Context) -> Tensor:
        """Return a tensor that is not quantized: as it is."""
        return context.pass_on(key)

    def quantizer(self, params: QuantizeParams, context: Context) -> Quantizer:
        """Return what quantizes one weight of a layer after another."""
        return partial(self.quantize, params=params, context=context)

    def quantize(
        self, key: Key, setting: Setting, params: QuantizeParams, context: Context
    ) -> tuple[dict[str, Tensor], bool]:
        """Quantize a weight; return its parts by name, and whether all of it was finite."""
        weight = context.rows(key)
        blocks = _blocks(context, weight, setting, params.device)
        return write_parts(context, key.name, weight, setting, blocks)

    def memory(self, params: QuantizeParams, checkpoint: Checkpoint) -> int:
        """Return the size of a few blocks."""
        return memory(params.device) if params.device else IN_FLIGHT_BYTES

    def describe(self, params: QuantizeParams) -> str:
        """Return the settings: bits, or the mode where that says them."""
        return words(params.settings)

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare settings by name, and what computes."""
        changed = setting_changes(old.get("settings") or {}, new.get("settings") or {})
        was, now = (each.get("method") or "rounding to nearest" for each in (old, new))
        if was != now:
            changed.append(Reason(f"quantize.method {was} → {now}"))
        computer = {key: new[key] for key in COMPUTER if key in new}
        return changed + changed_values(old, computer)


def _with_notes(key: Key, setting: Setting, packed: dict[str, Tensor], finite: bool) -> Result:
    """Return the parts of a weight, and what people should know of them."""
    notes = []
    if not finite:
        notes.append(f"{key.name} holds NaN or infinity, which no quantized weight can show")
    if setting.mode == "nvfp4" and _is_zero(packed[quantize_scheme.parts(key.name, setting)[1]]):
        notes.append(
            f"{key.name} is zero in nvfp4: all of its scales are, which have no number "
            'under 0.002. A rule with mode = "mxfp4" or "affine" holds small weights'
        )
    return Result(packed, tuple(notes))


def words(settings: Mapping[str, Setting]) -> str:
    """Return settings in a few words: bits, or the mode where that says them."""
    words = []
    for group_size, bits, mode in sorted({*settings.values()}):
        short = f"{bits} bit" if mode == "affine" else mode
        is_default = group_size == MODES[mode][0][0]
        words.append(short if is_default else f"{short} group {group_size}")
    return ", ".join(words) or "as it is"


def setting_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
    """Return how settings differ, by the weight's name, as records have them."""
    reasons = []
    for at, key in ((1, "bits"), (0, "group_size"), (2, "mode")):
        was = {name: setting[at] for name, setting in old.items() if name in new}
        now = {name: setting[at] for name, setting in new.items() if name in old}
        reasons += changes(f"quantize.{key}", was, now, "")
    return reasons + come_and_gone(old, new, "now quantized", "not quantized any more")


def part_specs(name: str, spec: TensorSpec, setting: Setting) -> dict[str, TensorSpec]:
    """Return the parts that a weight is quantized to, by name."""
    *lead, columns = spec.shape
    scales = (*lead, columns // setting.group_size)
    weight = TensorSpec("uint32", (*lead, columns * setting.bits // 32))
    scale = TensorSpec(spec.dtype if setting.mode == "affine" else "uint8", scales)
    names = quantize_scheme.parts(name, setting)
    return dict(zip(names, (weight, scale, scale), strict=False))


def _is_zero(tensor: Tensor) -> bool:
    """Tell by its digest whether all of a tensor is zero."""
    zeros = memoryview(bytes(min(tensor.nbytes, CHUNK_BYTES)))
    spans = range(0, tensor.nbytes, CHUNK_BYTES)
    return digest_parts(zeros[: tensor.nbytes - at] for at in spans) == tensor.digest


# Of rows: see quantize_block. In quotes, since MLX is not to be imported for this.
Quantized = tuple[tuple["mx.array", ...], list[memoryview], bool]


def write_parts(
    context: Context,
    name: str,
    weight: Rows,
    setting: Setting,
    blocks: Iterable[Quantized],
) -> tuple[dict[str, Tensor], bool]:
    """Write what a weight is quantized to; return it by name, and whether the weight was finite.

    Args:
        context: what it is written to.
        name: the weight's.
        weight: it; it may have no rows.
        setting: how it is quantized.
        blocks: of its rows, in order.
    """
    specs = part_specs(name, TensorSpec(weight.dtype, weight.shape), setting)
    finite = True
    with ExitStack() as stack:
        packed_bytes = prod(weight.shape) * setting.bits // 8
        writers = [stack.enter_context(context.writer(part, packed_bytes)) for part in specs]
        for _, pieces, all_finite in blocks:
            for writer, data in zip(writers, pieces, strict=True):
                writer.write(data)
            finite = finite and all_finite
    return {
        part: Tensor(spec.dtype, spec.shape, writer.digest)
        for (part, spec), writer in zip(specs.items(), writers, strict=True)
    }, finite


def _blocks(context: Context, weight: Rows, setting: Setting, backend: str) -> Iterator[Quantized]:
    device = device_of(backend)
    for start, stop in rows.spans(weight, BLOCK_BYTES[device]):
        block = _read(context, weight, start, stop, device)
        yield quantize_block(block, setting, device, context.streams.get(device))


def quantize_block(
    block: mx.array, setting: Setting, device: str, stream: mx.Stream | None = None
) -> Quantized:
    """Quantize rows; return their parts, the bytes of these, and whether all rows were finite.

    Args:
        block: the rows, evaluated where a GPU computes.
        setting: how.
        device: what computes: ``cpu`` or ``gpu``.
        stream: the thread's own on that.
    """
    options = setting._asdict()
    if device == "cpu" and kernels.agrees(block.dtype, **options):
        packed, large = kernels.quantize_fast(block, **options)
        pieces = arrays.views(packed, large, together=False)
        if not large.item():
            return packed, pieces, True
    if device == "cpu":
        packed = _quantize_slices(block, setting)
    else:
        if not kernels.gpu_agrees(block.dtype, **options):
            raise BuildError(
                f"MLX cannot quantize to {setting.bits} bits in mode {setting.mode}, "
                f"{setting.group_size} weights a group, on this GPU: what it makes does not stand "
                'for what it is given. Use device = "cpu".'
            )
        packed = kernels.quantize(block, **options, stream=stream)
    not_finite = kernels.not_finite(block, stream)
    pieces = arrays.views(packed, not_finite, together=device == "gpu", stream=stream)
    return packed, pieces, not not_finite.item()


def change(
    block: mx.array, packed: Sequence[mx.array], setting: Setting, stream: mx.Stream
) -> mx.array:
    """Return what quantizing changed in rows, not evaluated yet: float32, shaped as they are."""
    wide, restored = (
        each.astype(mx.float32, stream)
        for each in (block, kernels.dequantize(packed, **setting._asdict(), stream=stream))
    )
    return mx.subtract(wide, restored, stream=stream)


def _quantize_slices(block: mx.array, setting: Setting) -> tuple[mx.array, ...]:
    """Quantize rows as MLX's own does, so few at a time that it takes no more memory."""
    step = 2 * max(1, len(block) // (2 * SLICES))
    slices = []
    for start in range(0, len(block), step):
        part_of_block = block[start : start + step]
        packed = kernels.quantize(kernels.even_rows(part_of_block), **setting._asdict())
        slices.append([part[: len(part_of_block)] for part in packed])
        mx.eval(slices[-1])
    return tuple(mx.concatenate(list(parts)) for parts in zip(*slices, strict=True))


def _read(context: Context, weight: Rows, start: int, stop: int, device: str) -> mx.array:
    """Return rows of a weight, where ``device`` can read them, until the next are asked for."""
    if isinstance(weight, rows.Stored):
        block = weight.read(start, stop, context.streams.memory(BLOCK_BYTES[device]))
        if device == "gpu":  # which would wait for the CPU's stream
            mx.eval(block)
        return block
    block = weight.read(start, stop)  # joined or cast: the CPU's
    if device == "gpu":
        arrays.share(block)
    return block

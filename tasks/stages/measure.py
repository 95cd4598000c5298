"""measure: how far each quantized weight is from the weight before.

In records, and so in keys, the stage is called ``error``.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Mapping, Sequence
from math import sqrt
from typing import Any

from cache.records.manifests import Manifest, Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.stages import quantize
from tasks.stages.quantize_scheme import Setting, parts
from tasks.stages.reasons import Reason, changed_values
from tasks.stages.stage import (
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
from tasks.tensors import arrays, mx, rows
from tasks.tensors.device import BLOCK_BYTES, device_of
from tasks.tensors.rows import Rows

NORM, ERROR_NORM = "norm", "error_norm"


class MeasureParams(Params, frozen=True):
    """What is compared.

    Attributes:
        compared: how each weight was quantized, by its name.
        mlx: MLX's version.
        device: what computes: ``cpu``, ``metal``, ``cuda``.
        machine: the processor.
    """

    compared: dict[str, Setting]
    mlx: str = ""
    device: str = ""
    machine: str = ""


class Measure(Stage[MeasureParams]):
    """Measure what quantizing took from each layer.

    A layer's quantized weights, as they are packed, are compared with what they were made of. That
    makes two vectors of one number a weight, in the order of the sorted names: ``norm``, the
    Frobenius norm of the weight before, and ``error_norm``, that of the difference.
    """

    name = "error"  # in records, which keep it
    group = "measure"
    version = 1
    keep = Keep.ALWAYS
    params = MeasureParams

    def plan(self, target: TargetModel) -> Mapping[str, Planned[MeasureParams]]:
        """Plan to compare what is quantized; layers without have no node."""
        planned = {}
        for layer, parameters in target.layers.items():
            names = [p.name for p in parameters if p.name in target.settings]
            if not names:
                continue
            settings = {name: target.settings[name] for name in names}
            reads = {part for name, s in settings.items() for part in parts(name, s)}
            params = MeasureParams(settings, **target.computer._asdict())
            stages = (target.roles.unquantized, target.roles.packed)
            needs = tuple(Need(stage, layer) for stage in stages)
            planned[layer] = Planned(params, needs, frozenset(reads))
        return planned

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return a digest of the settings."""
        return quantize.settings_digest(target.settings)

    def outputs(self, params: MeasureParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the two vectors."""
        vector = TensorSpec("float32", (len(params.compared),))
        return {name: Output(vector, Origin.STORED, tuple(inputs)) for name in (NORM, ERROR_NORM)}

    def run(self, params: MeasureParams, inputs: Inputs, context: Context) -> Result:
        """Compare a layer's weights."""
        roles = context.planned.roles
        before = {key.name: key for key in inputs if key.stage == roles.unquantized}
        after = {key.name: key for key in inputs if key.stage == roles.packed}
        context.prefetch(after.values())
        context.verify(after.values())  # they may lie in a file of build/, to be altered by hand
        norms, error_norms = [], []
        for name, setting in sorted(params.compared.items()):
            original = context.rows(before[name])
            packed = [context.rows(after[part]) for part in parts(name, setting)]
            norm, error_norm = _compare(context, original, packed, setting, params.device)
            norms.append(norm)
            error_norms.append(error_norm)
        vectors = {NORM: norms, ERROR_NORM: error_norms}
        return Result({name: _vector(context, name, numbers) for name, numbers in vectors.items()})

    def memory(self, params: MeasureParams, checkpoint: Checkpoint) -> int:
        """Return what quantizing takes."""
        return quantize.memory(params.device)

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare settings by name, and what computes."""
        changed = quantize.setting_changes(old.get("compared") or {}, new.get("compared") or {})
        return changed + changed_values(old, new, but=("compared",))


def figures(manifest: Manifest, read: Mapping[str, bytes]) -> dict[str, tuple[float, float]]:
    """Return the two norms of each weight, by name.

    Args:
        manifest: what the stage made.
        read: the bytes of its tensors.
    """
    names = sorted(manifest.action.params["compared"])
    vectors = [struct.unpack(f"<{len(names)}f", read[part]) for part in (NORM, ERROR_NORM)]
    return dict(zip(names, zip(*vectors, strict=True), strict=True))


def _compare(
    context: Context, original: Rows, packed: Sequence[Rows], setting: Setting, backend: str
) -> tuple[float, float]:
    """Return the Frobenius norms of a weight, and of what quantizing changed in it."""
    device = device_of(backend)
    squares = error_squares = 0.0
    for start, stop in rows.spans(original, BLOCK_BYTES[device]):
        block = original.read(start, stop)
        quantized = [part.read(start, stop) for part in packed]
        if device == "gpu":
            for array in (block, *quantized):
                arrays.share(array)
        stream = context.streams.get(device)
        wide = block.astype(mx.float32, stream)
        change = quantize.change(block, quantized, setting, stream)
        sums = [_group_sums(array, setting, stream) for array in (wide, change)]
        mx.eval(sums)
        cpu = context.streams.get("cpu")  # the only device that has float64
        wide_sums = [each.astype(mx.float64, stream=cpu) for each in sums]
        here, error_here = (mx.sum(each, stream=cpu) for each in wide_sums)
        mx.eval(here, error_here)
        squares += float(here)
        error_squares += float(error_here)
    return sqrt(squares), sqrt(error_squares)


def _group_sums(array: mx.array, setting: Setting, stream: mx.Stream) -> mx.array:
    """Return the sum of squares of each group: so few that float32 holds it well."""
    groups = array.reshape(-1, setting.group_size, stream=stream)
    return mx.sum(mx.square(groups, stream=stream), axis=-1, stream=stream)


def _vector(context: Context, name: str, numbers: Sequence[float]) -> Tensor:
    data = memoryview(struct.pack(f"<{len(numbers)}f", *numbers))
    with context.writer(name, data.nbytes) as writer:
        writer.write(data)
    return Tensor("float32", (len(numbers),), writer.digest)

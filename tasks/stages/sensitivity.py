"""sensitivity: what each way of quantizing a module would take from what it makes.

Of a weight that is quantized in a way, it is the energy of the error in what the module makes, as
part of the energy of all that it makes: with what the module is given, on average, on calibration
text. Channels count by their mean squares, rows of an embedding by how often they are looked up. No
weight is written.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Mapping, Sequence
from math import fsum, inf, isfinite
from typing import Any, NamedTuple, cast

from cache.records.manifests import Manifest, Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.stages import quantize
from tasks.stages.activations import COUNT, LOOKUPS, MEAN_SQUARE, Activations
from tasks.stages.measure import dequantize
from tasks.stages.quantize_scheme import Setting, weight_name
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

SENSITIVITY = "sensitivity"
_TOLD = (MEAN_SQUARE, COUNT, LOOKUPS)  # of activations, what is read


class SensitivityParams(Params, frozen=True):
    """What is tried.

    Attributes:
        setting: how weights are quantized.
        weights: their names, sorted.
        mlx: MLX's version.
        device: what computes: ``cpu``, ``metal``, ``cuda``.
        machine: the processor.
    """

    setting: Setting
    weights: tuple[str, ...]
    mlx: str = ""
    device: str = ""
    machine: str = ""


class Sensitivity(Stage[SensitivityParams]):
    """Tell what each way of quantizing each module would take from what it makes.

    A node is one candidate in one layer. It makes a vector of one number a weight, in the order of
    the sorted names.
    """

    name = "sensitivity"
    version = 1
    keep = Keep.ALWAYS
    params = SensitivityParams

    def plan(self, target: TargetModel) -> Mapping[str, Planned[SensitivityParams]]:
        """Plan a node for each layer and candidate; none where the model cannot be run."""
        segments_of: dict[str, list[str]] = {}
        for segment, spec in target.planned[Activations.name].items():
            for path in {call.path for call in spec.params.calls}:
                segments_of.setdefault(path, []).append(segment)
        can = {weight_name(m.path): m.path for m in target.model.modules if m.quantized_names}
        planned = {}
        for layer, parameters in target.layers.items() if segments_of else ():
            for setting in target.candidates:
                shapes = {p.name: p.shape for p in parameters if p.name in can}
                weights = sorted(n for n, s in shapes.items() if s[-1] % setting.group_size == 0)
                if not weights:
                    continue
                paths = [can[name] for name in weights]
                segments = dict.fromkeys(s for path in paths for s in segments_of.get(path, ()))
                needs = [Need(target.roles.unquantized, layer)]
                needs += [Need(Activations.name, segment) for segment in segments]
                told = (f"{path}.{kind}" for path in paths for kind in _TOLD)
                params = SensitivityParams(setting, tuple(weights), **target.computer._asdict())
                planned[node_name(layer, setting)] = Planned(
                    params, tuple(needs), frozenset((*weights, *told))
                )
        return planned

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what is tried, and on what."""
        return target.dtype, target.quality, target.candidates

    def outputs(
        self, params: SensitivityParams, inputs: Mapping[Key, TensorSpec]
    ) -> dict[str, Output]:
        """Return the vector."""
        vector = TensorSpec("float32", (len(params.weights),))
        return {SENSITIVITY: Output(vector, Origin.STORED, tuple(inputs))}

    def run(self, params: SensitivityParams, inputs: Inputs, context: Context) -> Result:
        """Quantize each weight, and weigh the error."""
        context.prefetch(inputs)
        unquantized = context.planned.roles.unquantized
        numbers = []
        for name in params.weights:
            weight = context.rows(Key(unquantized, name))
            importances = _importances(context, inputs, name.removesuffix("weight").strip("."))
            numbers.append(_relative_error(context, weight, importances, params))
        data = memoryview(struct.pack(f"<{len(numbers)}f", *numbers))
        with context.writer(SENSITIVITY, data.nbytes) as writer:
            writer.write(data)
        return Result({SENSITIVITY: Tensor("float32", (len(numbers),), writer.digest)})

    def memory(self, params: SensitivityParams, checkpoint: Checkpoint) -> int:
        """Return what quantizing takes, and comparing."""
        return 2 * quantize.memory(params.device)

    def describe(self, params: SensitivityParams) -> str:
        """Return the candidate."""
        return quantize.words({"": params.setting})

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare one by one."""
        return changed_values(old, new)


def node_name(layer: str, setting: Setting) -> str:
    """Return what the node is called that tries a candidate in a layer."""
    mode = "" if setting.mode == "affine" else f"-{setting.mode}"
    return f"{layer}.{setting.bits}bit-{setting.group_size}{mode}"


def figures(manifest: Manifest, read: Mapping[str, bytes]) -> dict[str, float]:
    """Return the sensitivity of each weight, by name.

    Args:
        manifest: what the stage made.
        read: the bytes of its tensors.
    """
    names = manifest.action.params["weights"]
    return dict(zip(names, struct.unpack(f"<{len(names)}f", read[SENSITIVITY]), strict=True))


class _Importance(NamedTuple):
    """How much the numbers of a weight count.

    Attributes:
        channels: by input channel, (matrices, channels).
        rows: by row, (rows,): of an embedding that is looked up.
    """

    channels: mx.array | None = None
    rows: mx.array | None = None

    def weigh(self, squares: mx.array, start: int, height: int) -> mx.array:
        """Return the sums over the rows of a block, as they count: (rows,).

        Args:
            squares: (rows, channels).
            start: number of the first row.
            height: rows of each matrix.
        """
        stop = start + len(squares)
        if self.channels is not None:
            matrices = mx.arange(start, stop) // height
            by_channel = self.channels[matrices] if len(self.channels) > 1 else self.channels
            return mx.sum(squares * by_channel, axis=-1)
        sums = mx.sum(squares, axis=-1)
        return sums if self.rows is None else sums * self.rows[start:stop]


def _importances(context: Context, inputs: Inputs, path: str) -> list[_Importance]:
    """Return how a module's weight counts, in each way that it is used; if none is known, evenly."""

    def read(kind: str) -> mx.array | None:
        key = Key(Activations.name, f"{path}.{kind}")
        if key not in inputs:
            return None
        source = context.rows(key)
        return source.read(0, rows.count(source)).reshape(source.shape).astype(mx.float32)

    found = []
    mean_square, count, lookups = map(read, (MEAN_SQUARE, COUNT, LOOKUPS))
    if mean_square is not None and count is not None:
        by_matrix = mean_square.reshape(len(count), -1)
        found.append(_Importance(channels=by_matrix * count[:, None]))
    if lookups is not None:
        found.append(_Importance(rows=lookups))
    return found or [_Importance()]


def _relative_error(
    context: Context, weight: Rows, importances: Sequence[_Importance], params: SensitivityParams
) -> float:
    """Return the energy of what quantizing changes, as part of all; the sum of several uses."""
    device = device_of(params.device)
    height = weight.shape[-2]
    energies, errors = [0.0] * len(importances), [0.0] * len(importances)
    for start, stop in rows.spans(weight, BLOCK_BYTES[device]):
        block = weight.read(start, stop)
        if device == "gpu":
            arrays.share(block)
        with mx.stream(context.streams.get(device)):
            packed, _, _ = quantize.quantize_block(block, params.setting, device)
            restored = dequantize(packed, params.setting)
            wide = block.astype(mx.float32)
            squares, error_squares = mx.square(wide), mx.square(wide - restored.astype(mx.float32))
            sums = [
                [each.weigh(array, start, height) for array in (squares, error_squares)]
                for each in importances
            ]
            mx.eval(sums)
        for at, (energy, error) in enumerate(sums):
            energies[at] += _sum(energy)
            errors[at] += _sum(error)
    parts = [error / energy for error, energy in zip(errors, energies, strict=True) if energy]
    return sum(parts) if isfinite(sum(parts)) else inf


def _sum(numbers: mx.array) -> float:
    return fsum(cast("list[float]", numbers.tolist()))

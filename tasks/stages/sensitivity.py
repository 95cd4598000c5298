"""sensitivity: what each way of quantizing a module would cost: divergence, in nats by the token.

Of a weight that is quantized in a way, it is half of the sum of the squares of what that changes,
each as much as the channel matters: see ``gradients``. To the second order, and as if no other
weight changed, that is the Kullback-Leibler divergence from what the model said before. No weight
is written.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Mapping, Sequence
from math import fsum, inf, isfinite
from typing import Any, NamedTuple, cast

from cache.records.manifests import Manifest, Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.stages import quantize, quantize_scheme
from tasks.stages.activations import MEAN_SQUARE
from tasks.stages.candidates import node_name
from tasks.stages.divergence import Divergence, name_of
from tasks.stages.gradients import IMPORTANCE, ROW_IMPORTANCE, Gradients
from tasks.stages.importances import Importances
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


class SensitivityParams(Params, frozen=True):
    """What is tried.

    Attributes:
        setting: how weights are quantized.
        weights: their names, sorted.
        mlx: MLX's version.
        device: what computes: ``cpu``, ``metal``, ``cuda``.
        machine: the processor.
        relative: whether it is the part of what the module makes that is lost, by an importance
            matrix, and no divergence.
        exact: whether it was measured, by ``divergence``, and is only put together.
    """

    setting: Setting
    weights: tuple[str, ...]
    mlx: str = ""
    device: str = ""
    machine: str = ""
    relative: bool = False
    exact: bool = False


class Sensitivity(Stage[SensitivityParams]):
    """Tell what each way of quantizing each module would cost: divergence, in nats.

    By an importance matrix it is a part of what the module makes instead: see ``relative``.
    Where that is asked for, it is measured: see ``divergence``.

    A node is one candidate in one layer. It makes a vector of one number a weight, in the order of
    the sorted names.
    """

    name = "sensitivity"
    version = 1
    keep = Keep.ALWAYS
    params = SensitivityParams

    def plan(self, target: TargetModel) -> Mapping[str, Planned[SensitivityParams]]:
        """Plan a node for each layer and candidate; none where the model cannot be run.

        With an importance matrix it need not be.
        """
        if target.exact:
            return _plan_exact(target)
        segments_of: dict[str, list[Need]] = {}
        for node, read in target.planned[Importances.name].items():
            segments_of |= {path: [Need(Importances.name, node)] for path in read.params.names}
        relative = bool(segments_of)
        for segment, spec in () if relative else target.planned[Gradients.name].items():
            for path in {call.path for call in spec.params.calls}:
                segments_of.setdefault(path, []).append(Need(Gradients.name, segment))
        kinds = (MEAN_SQUARE,) if relative else (IMPORTANCE, ROW_IMPORTANCE)
        can = {weight_name(m.path): m.path for m in target.model.modules if m.quantized_names}
        planned = {}
        for layer, parameters in target.layers.items() if segments_of else ():
            for setting in target.candidates:
                shapes = {p.name: p.shape for p in parameters if p.name in can}
                weights = sorted(n for n, s in shapes.items() if s[-1] % setting.group_size == 0)
                if not weights:
                    continue
                paths = [can[name] for name in weights]
                needs = [Need(target.roles.unquantized, layer)]
                needs += dict.fromkeys(n for path in paths for n in segments_of.get(path, ()))
                told = (f"{path}.{kind}" for path in paths for kind in kinds)
                params = SensitivityParams(
                    setting, tuple(weights), **target.computer._asdict(), relative=relative
                )
                planned[node_name(layer, setting)] = Planned(
                    params, tuple(needs), frozenset((*weights, *told))
                )
        return planned

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what is tried, and on what."""
        return target.dtype, target.quality, target.candidates, target.exact

    def outputs(
        self, params: SensitivityParams, inputs: Mapping[Key, TensorSpec]
    ) -> dict[str, Output]:
        """Return the vector."""
        vector = TensorSpec("float32", (len(params.weights),))
        return {SENSITIVITY: Output(vector, Origin.STORED, tuple(inputs))}

    def run(self, params: SensitivityParams, inputs: Inputs, context: Context) -> Result:
        """Quantize each weight, and weigh the error."""
        if params.exact:
            context.prefetch(inputs)
            return _measured(params, context)
        context.prefetch(inputs)
        unquantized = context.planned.roles.unquantized
        numbers = []
        for name in params.weights:
            weight = context.rows(Key(unquantized, name))
            path = quantize_scheme.module_path(name)
            importances = _importances(context, inputs, path, relative=params.relative)
            numbers.append(_error(context, weight, importances, params))
        return _written(numbers, context)

    def memory(self, params: SensitivityParams, checkpoint: Checkpoint) -> int:
        """Return what quantizing takes, and comparing."""
        return 2 * quantize.memory(params.device)

    def describe(self, params: SensitivityParams) -> str:
        """Return the candidate."""
        return quantize.words({"": params.setting})

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare one by one."""
        return changed_values(old, new)


def _plan_exact(target: TargetModel) -> dict[str, Planned[SensitivityParams]]:
    """Plan what puts together what was measured: it quantizes nothing."""
    tried = target.planned[Divergence.name]
    measured = {weight_name(path) for path in target.exact}
    planned = {}
    for layer, parameters in target.layers.items():
        names = sorted(p.name for p in parameters if p.name in measured)
        for setting in target.candidates:
            by_node = {node_name(quantize_scheme.module_path(n), setting): n for n in names}
            weights = [name for node, name in by_node.items() if node in tried]
            if not weights:
                continue
            needs = [Need(target.roles.unquantized, layer)]
            needs += [Need(Divergence.name, node) for node in by_node if node in tried]
            reads = (*weights, *(name_of(quantize_scheme.module_path(n)) for n in weights))
            params = SensitivityParams(setting, tuple(weights), exact=True)
            planned[node_name(layer, setting)] = Planned(params, tuple(needs), frozenset(reads))
    return planned


def _measured(params: SensitivityParams, context: Context) -> Result:
    numbers = []
    for name in params.weights:
        key = Key(Divergence.name, name_of(quantize_scheme.module_path(name)))
        numbers.append(cast("float", context.rows(key).read(0, 1).item()))
    return _written(numbers, context)


def _written(numbers: Sequence[float], context: Context) -> Result:
    data = memoryview(struct.pack(f"<{len(numbers)}f", *numbers))
    with context.writer(SENSITIVITY, data.nbytes) as writer:
        writer.write(data)
    return Result({SENSITIVITY: Tensor("float32", (len(numbers),), writer.digest)})


def figures(manifest: Manifest, read: Mapping[str, bytes]) -> dict[str, float]:
    """Return the sensitivity of each weight, by name.

    Args:
        manifest: what the stage made.
        read: the bytes of its tensors.
    """
    names = manifest.action.params["weights"]
    return dict(zip(names, struct.unpack(f"<{len(names)}f", read[SENSITIVITY]), strict=True))


class _Importance(NamedTuple):
    """How much the numbers of a weight count: all the same, if neither is told.

    Attributes:
        channels: by input channel, (matrices, channels).
        rows: by row, (rows,): of an embedding that is looked up.
    """

    channels: mx.array | None = None
    rows: mx.array | None = None

    def weigh(self, squares: mx.array, start: int, height: int, stream: mx.Stream) -> mx.array:
        """Return the sums over the rows of a block, as they count: (rows,).

        Args:
            squares: (rows, channels).
            start: number of the first row.
            height: rows of each matrix.
            stream: what computes them.
        """
        numbers = mx.arange(start, start + len(squares), stream=stream)
        if self.channels is not None:
            by_channel = self.channels
            if len(by_channel) > 1:
                matrices = mx.floor_divide(numbers, height, stream=stream)
                by_channel = mx.take(by_channel, matrices, axis=0, stream=stream)
            weighed = mx.multiply(squares, by_channel, stream=stream)
            return mx.sum(weighed, axis=-1, stream=stream)
        sums = mx.sum(squares, axis=-1, stream=stream)
        if self.rows is None:
            return sums
        return mx.multiply(sums, mx.take(self.rows, numbers, stream=stream), stream=stream)


def _importances(
    context: Context, inputs: Inputs, path: str, *, relative: bool
) -> list[_Importance]:
    """Return how a module's weight counts, in each way that it is used; where it is not, none.

    Args:
        context: reads what is told.
        inputs: of the node.
        path: the module's.
        relative: whether an importance matrix tells.
    """

    def read(kind: str, stage: str = Gradients.name) -> mx.array | None:
        key = Key(stage, f"{path}.{kind}")
        if key not in inputs:
            return None
        source = context.rows(key)
        return source.read(0, rows.count(source)).reshape(-1, source.shape[-1])

    if relative:
        return [_Importance(read(MEAN_SQUARE, Importances.name))]
    channels, by_row = read(IMPORTANCE), read(ROW_IMPORTANCE)
    found = [] if channels is None else [_Importance(channels=channels)]
    if by_row is not None:
        found.append(_Importance(rows=by_row.reshape(-1)))
    return found


def _error(
    context: Context, weight: Rows, importances: Sequence[_Importance], params: SensitivityParams
) -> float:
    """Return half the sum of squares of what quantizing changes, as it counts in each use.

    Where it is relative: as a part of that of the weight itself.
    """
    device = device_of(params.device)
    error, whole = 0.0, 0.0
    for start, stop in rows.spans(weight, BLOCK_BYTES[device]):
        block = weight.read(start, stop)
        if device == "gpu":
            arrays.share(block)
        stream = context.streams.get(device)
        packed, _, _ = quantize.quantize_block(block, params.setting, device, stream)
        change = quantize.change(block, packed, params.setting, stream)
        squares = mx.square(change, stream=stream)
        sums = [each.weigh(squares, start, weight.shape[-2], stream) for each in importances]
        wholes: list[mx.array] = []
        if params.relative:
            of_it = mx.square(block.astype(mx.float32, stream=stream), stream=stream)
            wholes = [each.weigh(of_it, start, weight.shape[-2], stream) for each in importances]
        mx.eval(sums, wholes)
        error += sum(map(_sum, sums))
        whole += sum(map(_sum, wholes))
    if params.relative:
        error /= whole or 1.0
    return error / 2 if isfinite(error) else inf


def _sum(numbers: mx.array) -> float:
    return fsum(cast("list[float]", numbers.tolist()))

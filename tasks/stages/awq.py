"""awq: the scales and clips by which a block's weights lose least when they are rounded.

It looks for modules that are given channels which others can scale, tries on the block itself that
it stays as it is, and chooses by the Hessians. ``awq_quantize`` rounds by what is found here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from msgspec import structs

from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.quality.calls import Seen
from tasks.quality.folds import Fold, folds
from tasks.quality.segments import weight_of
from tasks.stages import quantize
from tasks.stages.forward_params import ForwardParams, skeleton_of, state_of
from tasks.stages.hessians import Hessians, by_weight
from tasks.stages.quantize_scheme import Setting
from tasks.stages.reasons import Reason, changed_values
from tasks.stages.running import plan_segments, stored
from tasks.stages.segment_runner import SegmentRunner
from tasks.stages.stage import (
    Context,
    Inputs,
    Keep,
    Key,
    Need,
    Output,
    Planned,
    Result,
    Stage,
    TargetModel,
)
from tasks.tensors import arrays, blas, mx
from tasks.tensors.device import device_of

if TYPE_CHECKING:
    import numpy as np

    from tasks.quality.awq import Array, Columns, Rounding
    from tasks.quality.fold_trials import Made, Proven

INPUT_SCALE, OUTPUT_SCALE, CLIP = "input_scale", "output_scale", "clip"
TRIAL_TOKENS = 32  # of a sequence, that folds are tried on


class AwqParams(ForwardParams, frozen=True, kw_only=True):
    """What is looked for.

    Attributes:
        rounded: how each weight of the segment will be rounded whose Hessian there is, by name.
        hessians: the name of each of theirs.
        folds: which channels may be scaled.
        vectors: names of norms and biases that are, with them.
    """

    rounded: dict[str, Setting]
    hessians: dict[str, str]
    folds: tuple[Fold, ...]
    vectors: tuple[str, ...]

    @property
    def scaled(self) -> dict[str, list[str]]:
        """What is told of each matrix, by its name: the kinds."""
        kinds: dict[str, list[str]] = {}
        for fold in self.folds:
            for name in (*map(weight_of, fold.inputs), *fold.others):
                kinds.setdefault(name, []).append(INPUT_SCALE)
            for name in set(fold.scaled) - set(self.vectors):
                kinds.setdefault(name, []).append(OUTPUT_SCALE)
        for name in self.rounded:
            kinds.setdefault(name, []).append(CLIP)
        return {name: [*dict.fromkeys(each)] for name, each in kinds.items()}


_UNQUANTIZED = Hessians()  # runs the model as it is before it is quantized, on the same text


class Awq(Stage[AwqParams]):
    """Find scales and clips by which weights lose least when they are rounded."""

    name = "awq"
    version = 4
    keep = Keep.ALWAYS
    params = AwqParams

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what is run, on what, and how weights are quantized."""
        return target.dtype, tuple(target.settings.items()), target.quality

    def plan(self, target: TargetModel) -> Mapping[str, Planned[AwqParams]]:
        """Plan the segments that have Hessians."""
        specs = target.planned[Hessians.name]
        if not specs:
            return {}
        planned = plan_segments(_UNQUANTIZED, target, before=Hessians.name, name_of=state_of)
        length = target.quality.sequence_length - 1
        candidates = folds(target.memos, skeleton_of(target, {}), length)
        of_weight = by_weight({name: spec.params for name, spec in specs.items()})
        return {
            name: self._of_segment(planned[name], target, name, candidates[name], of_weight)
            for name in specs
            if any(segment == name for segment, _ in of_weight.values())
        }

    def _of_segment(
        self,
        planned: Planned[ForwardParams],
        target: TargetModel,
        segment: str,
        candidates: Iterable[Fold],
        of_weight: Mapping[str, tuple[str, str]],
    ) -> Planned[AwqParams]:
        hessians = {w: name for w, (where, name) in of_weight.items() if where == segment}
        useful = tuple(
            fold for fold in candidates if any(weight_of(p) in hessians for p in fold.inputs)
        )
        versions = planned.params.versions | {"numpy": blas.version()}
        common = structs.asdict(structs.replace(planned.params, top_logits=0, versions=versions))
        params = AwqParams(
            **common,
            rounded={name: target.settings[name] for name in hessians},
            hessians=hessians,
            folds=useful,
            vectors=tuple(dict.fromkeys(n for fold in useful for n in fold.vectors)),
        )
        needs = (*planned.needs, Need(Hessians.name, segment))
        reads = (planned.reads or frozenset()).union(hessians.values())
        return Planned(params, needs, reads)

    def outputs(self, params: AwqParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return scales and clips by weight, and norms as they are once they are scaled.

        ``input_scale``, float32, of columns: as the weight, without its rows. ``output_scale``,
        float32, by which rows are divided: without its columns. ``clip``, uint8: (…, rows, groups).
        """
        specs = {key.name: spec for key, spec in inputs.items()}
        made = {}
        for name, kinds in params.scaled.items():
            *lead, count, columns = specs[name].shape
            shapes = {INPUT_SCALE: (*lead, columns), OUTPUT_SCALE: (*lead, count)}
            for kind in kinds:
                if kind == CLIP:
                    groups = columns // params.rounded[name].group_size
                    made[f"{name}.{kind}"] = TensorSpec("uint8", (*lead, count, groups))
                else:
                    made[f"{name}.{kind}"] = TensorSpec("float32", shapes[kind])
        return stored(made | {name: specs[name] for name in params.vectors}, inputs)

    def run(self, params: AwqParams, inputs: Inputs, context: Context) -> Result:
        """Try folds, choose scales, then clips."""
        search = _Search(params, inputs, context)
        specs = {key: tensor.spec for key, tensor in inputs.items()}
        tensors = {}
        for name, output in self.outputs(params, specs).items():
            with context.writer(name, output.spec.nbytes) as writer:
                for piece in search.made(name):
                    writer.write(piece)
            tensors[name] = Tensor(*output.spec, writer.digest)
        return Result(tensors, search.notes)

    def memory(self, params: AwqParams, checkpoint: Checkpoint) -> int:
        """Return the size of the weights, in float32 too; of one of them and its Hessian."""
        return _UNQUANTIZED.memory(params, checkpoint) + 2 * params.nbytes

    def runs_alone(self, params: AwqParams) -> bool:
        """Tell whether a GPU computes, as of other stages that run a model."""
        return _UNQUANTIZED.runs_alone(params)

    def describe(self, params: AwqParams) -> str:
        """Return how weights will be rounded."""
        return f"for {quantize.words(params.rounded)}"

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare settings by name, and all else one by one."""
        settings = (each.get("rounded") or {} for each in (old, new))
        changed = quantize.setting_changes(*settings)
        return changed + changed_values(old, new, but=("rounded",))


class _Search:
    """Finds what is told of a segment."""

    def __init__(self, params: AwqParams, inputs: Inputs, context: Context) -> None:
        from tasks.quality.fold_trials import Trials

        self._params = params
        self._context = context
        self._runner = SegmentRunner(_UNQUANTIZED, params, inputs, context)
        self._stored = self._runner.weights()
        self._scales: dict[str, np.ndarray] = {}
        self._vectors: dict[str, mx.array] = {}
        scaled: set[str] = set()
        with self._runner.stream():
            self._weights = {name: array.astype(mx.float32) for name, array in self._stored.items()}
            trials = Trials(self._weights, self._try)
            for fold in params.folds:
                if scaled.isdisjoint(fold.inputs) and (proven := trials.prove(fold)):
                    scaled.update(fold.inputs)
                    self._scale(proven)
        left = [w for w in params.rounded if not scaled.intersection([w.rpartition(".")[0]])]
        note = "{} is not scaled: nothing that makes what it is given can undo it"
        self.notes = (*self._runner.notes, *map(note.format, left))

    def _try(self, replaced: Mapping[str, mx.array]) -> Made:
        from tasks.quality.fold_trials import Made

        given = {}

        def see(seen: Seen) -> None:
            given[seen.call.path] = seen

        result = self._runner.trial({**self._weights, **replaced}, TRIAL_TOKENS, see)
        mx.eval(result, [each.inputs for each in given.values()])
        return Made(result, given)

    def _scale(self, proven: Proven) -> None:
        """Choose a fold's scales, and note what they make of its tensors."""
        import numpy as np

        from tasks.quality.awq import best_scale

        given = [weight_of(path) for path in proven.fold.inputs]
        rounded = [name for name in given if name in self._params.rounded]
        made = []
        for expert in range(proven.lead[0]) if proven.lead else [None]:
            columns = [
                each for name in rounded for each in self._columns(name, proven.rows[name], expert)
            ]
            made.append(best_scale(columns, proven.made))
        scale = np.stack(made) if proven.lead else made[0]
        for name, of_column in proven.rows.items():
            self._note(name, INPUT_SCALE, scale[..., of_column])
        source = proven.fold
        for name in source.scaled:
            if name not in source.vectors:
                self._note(name, OUTPUT_SCALE, scale)
                continue
            added = proven.added if name == source.scaled[0] else 0.0
            vector = self._vectors.get(name, self._weights[name])
            self._vectors[name] = (vector + added) / mx.array(scale) - added

    def _note(self, name: str, kind: str, scale: np.ndarray) -> None:
        import numpy as np

        shape = self._weights[name].shape
        shape = (*shape[:-2], shape[-1] if kind == INPUT_SCALE else shape[-2])
        self._scales[f"{name}.{kind}"] = np.broadcast_to(scale, shape)

    def _columns(
        self, name: str, of_column: np.ndarray, expert: int | None
    ) -> list[Callable[[], Columns]]:
        """Return what reads a weight, or one expert's part of it, or each of all of them."""
        from tasks.quality.awq import Columns

        def read(matrix: int) -> Columns:
            return Columns(*self._matrix(name, matrix), self._rounding(name), of_column)

        count = prod(self._weights[name].shape[:-2])
        return [partial(read, matrix) for matrix in (range(count) if expert is None else [expert])]

    def _matrix(self, name: str, number: int) -> tuple[Array, Array]:
        """Return one of a weight's matrices, and its Hessian, as they are before scaling."""
        import numpy as np

        weight = self._weights[name]
        matrix = weight.reshape(-1, *weight.shape[-2:])[number]
        source = self._context.rows(Key(Hessians.name, self._params.hessians[name]))
        columns = matrix.shape[-1]
        hessian = source.read(number * columns, (number + 1) * columns)
        if device_of(self._params.device) == "gpu":
            return matrix, hessian
        return np.array(matrix, copy=False), np.array(hessian, copy=False)

    def _rounding(self, name: str) -> Rounding:
        from tasks.quality.awq import Rounding

        return Rounding(*self._params.rounded[name], arrays.dtype_name(self._stored[name]))

    def made(self, name: str) -> Iterator[memoryview]:
        """Yield an output's bytes."""
        import numpy as np

        weight, _, kind = name.rpartition(".")
        if name in self._params.vectors:
            with self._runner.stream():
                vector = self._vectors.get(name, self._weights[name])
                yield arrays.view(vector.astype(self._stored[name].dtype))
        elif kind == CLIP:
            for matrix in range(prod(self._weights[weight].shape[:-2])):
                yield self._clips(weight, matrix).data.cast("B")
        else:
            shape = self._weights[weight].shape
            shape = (*shape[:-2], shape[-1] if kind == INPUT_SCALE else shape[-2])
            scale = self._scales.get(name, np.ones(shape, np.float32))
            yield np.ascontiguousarray(scale, np.float32).data.cast("B")

    def _clips(self, name: str, number: int) -> np.ndarray:
        import numpy as np

        from tasks.quality import awq

        with self._runner.stream():
            weight, hessian = self._matrix(name, number)
            array = np.array if isinstance(weight, np.ndarray) else mx.array
            rounding, of_columns = self._rounding(name), None
            if (scale := self._scales.get(f"{name}.{INPUT_SCALE}")) is not None:
                of_columns = array(scale.reshape(-1, scale.shape[-1])[number])
                weight = weight * of_columns
            blocks = awq.own_blocks(hessian, rounding.group_size, of_columns)
            del hessian  # large, and no more of it is needed
            if (scale := self._scales.get(f"{name}.{OUTPUT_SCALE}")) is not None:
                weight = weight / array(scale.reshape(-1, scale.shape[-1])[number])[:, None]
            return awq.best_clips(weight, blocks, rounding)

"""hessians: the sum of the products of the input channels of each linear layer, for GPTQ.

As the model before quantizing runs on calibration text. Layers that are given the very same have
one together; an expert has one by itself. The states between segments are kept, too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from msgspec import structs

from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.quality.calls import Call, Seen
from tasks.quality.segments import LOGITS, weight_of
from tasks.stages.forward_params import ForwardParams, state_of
from tasks.stages.running import (
    UnquantizedStage,
    by_numpy,
    calls_of,
    of_all_samples,
    plan_segments,
    specs_of,
    stored,
)
from tasks.stages.segment_runner import SegmentRunner
from tasks.stages.stage import Context, Inputs, Key, Output, Planned, Result, TargetModel
from tasks.stages.tokens import CALIBRATION_TEXT
from tasks.tensors import arrays, blas, mx

if TYPE_CHECKING:
    import numpy as np

HESSIAN = "hessian"


def names(calls: Iterable[Call]) -> dict[int, str]:
    """Return the name of the Hessian that each call of a segment adds to, by the call's number.

    It goes by the first of the modules that are given the same, each called once.
    """
    paths: dict[str, list[int]] = {}
    for call in calls:
        paths.setdefault(call.path, []).append(call.number)
    once = {numbers[0]: path for path, numbers in paths.items() if len(numbers) == 1}
    first = {
        call.number: call.number if call.same_as is None else call.same_as
        for call in calls
        if call.number in once
    }
    return {
        call.number: f"{once.get(first.get(call.number, -1), call.path)}.{HESSIAN}"
        for call in calls
    }


def by_weight(planned: Mapping[str, ForwardParams]) -> dict[str, tuple[str, str]]:
    """Return the segment and the name of each weight's Hessian, by the weight's name.

    Of a weight that several segments use there is none.

    Args:
        planned: what the stage is asked to do, by segment.
    """
    found: dict[str, set[tuple[str, str]]] = {}
    for segment, params in planned.items():
        name_of = names(params.calls)
        for call in params.calls:
            found.setdefault(weight_of(call.path), set()).add((segment, name_of[call.number]))
    return {weight: next(iter(each)) for weight, each in found.items() if len(each) == 1}


class Hessians(UnquantizedStage):
    """Tell how the input channels of each linear layer go together."""

    name = "hessians"
    version = 4
    text = CALIBRATION_TEXT

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what is run, on what, and which weights matter."""
        return target.dtype, tuple(target.settings), target.quality

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ForwardParams]]:
        """Plan the segments that weights to be quantized are used in."""
        planned = plan_segments(self, target, before=self.name, name_of=state_of)
        calls = calls_of(target) if planned else {}
        looked_up = {call.path for each in calls.values() for call in each if call.is_lookup}
        wanted = {
            name: tuple(
                call
                for call in each
                if weight_of(call.path) in target.settings and call.path not in looked_up
            )
            for name, each in calls.items()
        }
        last = max((i for i, name in enumerate(planned) if wanted[name]), default=-1)
        return {
            name: structs.replace(
                each,
                params=structs.replace(by_numpy(each.params), top_logits=0, calls=wanted[name]),
            )
            for name, each in list(planned.items())[: last + 1]
        }

    def outputs(self, params: ForwardParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the state, but of the last segment, and the Hessians.

        Those are (channels, channels), of experts (experts, channels, channels).
        """
        specs = {}
        if params.segment != LOGITS:
            specs[state_of(params.segment)] = of_all_samples(params.spec, inputs)
        return stored({**specs, **_specs(params)}, inputs)

    def run(self, params: ForwardParams, inputs: Inputs, context: Context) -> Result:
        """Run a segment on one sequence after another, and add up."""
        runner = SegmentRunner(self, params, inputs, context)
        outputs = self.outputs(params, specs_of(inputs))
        specs = _specs(params)
        sums = _Products(params.calls, specs, by_numpy=params.device == "cpu")

        def look(index: int) -> list[mx.array]:
            state = runner.look(index, sums.see)
            sums.add()
            return state

        states = {name: each for name, each in outputs.items() if name not in specs}
        tensors = runner.write(states, look)
        for name, spec in specs.items():
            with context.writer(name, spec.nbytes) as writer, runner.stream():
                for matrix in sums.take(name):
                    writer.write(matrix)
            tensors[name] = Tensor(*spec, writer.digest)
        return Result({name: tensors[name] for name in outputs}, runner.notes)

    def memory(self, params: ForwardParams, checkpoint: Checkpoint) -> int:
        """Return the size of the segment's weights, of states, of the Hessians and of a product."""
        specs = _specs(params).values()
        if params.device == "cpu":
            product = max((blas.gram_memory(spec.shape[-1]) for spec in specs), default=0)
        else:
            product = sum(spec.nbytes for spec in specs)
        return super().memory(params, checkpoint) + sum(s.nbytes for s in specs) + product


def _specs(params: ForwardParams) -> dict[str, TensorSpec]:
    name_of = names(params.calls)
    return {
        name_of[call.number]: TensorSpec("float32", (*call.shape, call.shape[-1]))
        for call in params.calls
    }


class _Products:
    """Adds up products of channels, in float32, a sequence at a time."""

    def __init__(
        self, calls: Iterable[Call], specs: Mapping[str, TensorSpec], *, by_numpy: bool
    ) -> None:
        self._by_numpy = by_numpy
        self._names = names(calls)
        self._once = {call.number for call in calls if self._own(call)}
        self._specs = specs
        self._ahead: list[Seen] = []
        self._totals: dict[str, list[mx.array | np.ndarray | None]] = {
            name: [None] * (spec.shape[0] if len(spec.shape) > 2 else 1)
            for name, spec in specs.items()
        }

    def _own(self, call: Call) -> bool:
        return self._names[call.number] == f"{call.path}.{HESSIAN}"

    def see(self, seen: Seen) -> list[mx.array]:
        """Take note of a call, but of one that is given what another was."""
        if seen.call.number not in self._once:
            return []
        self._ahead.append(seen)
        return [seen.inputs] if seen.experts is None else [seen.inputs, seen.experts]

    def add(self) -> None:
        """Add the calls of one sequence, which are evaluated, to those of others."""
        import numpy as np

        for call, inputs, experts in self._ahead:
            totals = self._totals[self._names[call.number]]
            if experts is not None:
                chosen: np.ndarray = np.array(experts)
                given = {
                    int(e): inputs[mx.array(np.flatnonzero(chosen == e))] for e in np.unique(chosen)
                }
            elif inputs.ndim > 2:
                given = dict(enumerate(inputs))
            else:
                given = {0: inputs}
            for number, rows in given.items():
                totals[number] = self._added(totals[number], rows.astype(mx.float32))
        self._ahead.clear()

    def take(self, name: str) -> Iterator[memoryview]:
        """Yield the matrices of a total, which is forgotten."""
        import numpy as np

        shape = self._specs[name].shape[-2:]
        for total in self._totals.pop(name):
            if isinstance(total, mx.array):
                yield arrays.view(total)
            else:
                yield (np.zeros(shape, np.float32) if total is None else total).data.cast("B")

    def _added(self, total: mx.array | np.ndarray | None, rows: mx.array) -> mx.array | np.ndarray:
        """Return a total, to which the products of columns are added."""
        import numpy as np

        if not self._by_numpy:
            product = rows.T @ rows if total is None else total + rows.T @ rows
            mx.eval(product)
            return product
        if total is None:
            total = np.zeros((rows.shape[-1], rows.shape[-1]), np.float32)
        assert isinstance(total, np.ndarray)
        blas.add_gram(total, np.array(rows, copy=False))
        return total

"""activations: what each module is given, as the model before quantizing runs on calibration text.

An importance matrix: the mean square of each input channel of each linear layer, of each expert by
itself, and how often each row of an embedding is looked up. It is what llama.cpp's ``imatrix``
counts. The states between segments are kept, too: who wants more than means runs a segment again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs

from cache.records.manifests import Tensor, TensorSpec
from tasks.quality.calls import Call, Seen
from tasks.quality.segments import LOGITS
from tasks.stages.forward_params import STATE, ForwardParams
from tasks.stages.running import (
    UnquantizedStage,
    by_numpy,
    calls_of,
    plan_segments,
    specs_of,
    stored,
)
from tasks.stages.segment_runner import SegmentRunner
from tasks.stages.stage import Context, Inputs, Key, Output, Planned, Result, TargetModel
from tasks.stages.tokens import CALIBRATION_TEXT
from tasks.tensors import mx

if TYPE_CHECKING:
    import numpy as np

MEAN_SQUARE, COUNT, LOOKUPS = "mean_square", "count", "lookups"


def output_specs(calls: Iterable[Call]) -> dict[str, TensorSpec]:
    """Return what is told of modules, by name: the module's path and what it is.

    ``mean_square``, float32, of each input channel: (…, channels), as the weight is (…, rows,
    channels). ``count``, uint32, of how many tokens: (matrices,), experts by themselves.
    ``lookups``, uint32, how often each row of an embedding is: (rows,).
    """
    specs = {}
    for call in calls:
        if call.is_lookup:
            specs[f"{call.path}.{LOOKUPS}"] = TensorSpec("uint32", call.shape)
        else:
            specs[f"{call.path}.{MEAN_SQUARE}"] = TensorSpec("float32", call.shape)
            specs[f"{call.path}.{COUNT}"] = TensorSpec("uint32", (call.matrices,))
    return specs


class Activations(UnquantizedStage):
    """Tell what each module is given: mean squares by input channel."""

    name = "activations"
    text = CALIBRATION_TEXT

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ForwardParams]]:
        """Plan all segments; none where the model cannot be run."""
        planned = plan_segments(self, target, before=self.name)
        calls = calls_of(target) if planned else {}
        return {
            name: structs.replace(
                each,
                params=structs.replace(by_numpy(each.params), top_logits=0, calls=calls[name]),
            )
            for name, each in planned.items()
        }

    def outputs(self, params: ForwardParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the state, but of the last segment, and what is told of modules."""
        state = {} if params.segment == LOGITS else super().outputs(params, inputs)
        return {**state, **stored(output_specs(params.calls), inputs)}

    def run(self, params: ForwardParams, inputs: Inputs, context: Context) -> Result:
        """Run a segment on one sequence after another, and add up what modules are given."""
        runner = SegmentRunner(self, params, inputs, context)
        outputs = self.outputs(params, specs_of(inputs))
        sums = _Sums()

        def look(index: int) -> list[mx.array]:
            state = runner.look(index, sums.see)
            sums.add()
            return state

        tensors = runner.write({n: each for n, each in outputs.items() if n == STATE}, look)
        for name, array in sums.results().items():
            with context.writer(name, array.nbytes) as writer:
                writer.write(memoryview(array.tobytes()))
            tensors[name] = Tensor(str(array.dtype), array.shape, writer.digest)
        return Result({name: tensors[name] for name in outputs}, runner.notes)


class _Sum(NamedTuple):
    """Of one call and one sequence.

    Attributes:
        call: the call.
        squares: the sum over tokens of each channel's squares, float32; None of a lookup.
        tokens: how many, by matrix; of a lookup, the rows' numbers.
    """

    call: Call
    squares: mx.array | None
    tokens: mx.array


class _Sums:
    """Adds up what modules are given: within a sequence in float32, of all of them in float64."""

    def __init__(self) -> None:
        self._ahead: list[_Sum] = []
        self._totals: dict[str, np.ndarray] = {}

    def see(self, seen: Seen) -> list[mx.array]:
        """Take note of a call; return what is to be evaluated."""
        found = _Sum(seen.call, *_add_tokens(seen))
        self._ahead.append(found)
        return [found.tokens] if found.squares is None else [found.squares, found.tokens]

    def add(self) -> None:
        """Add the calls of one sequence, which are evaluated, to those of others."""
        import numpy as np

        for call, squares, tokens in self._ahead:
            if squares is None:
                lookups = np.bincount(np.array(tokens), minlength=call.shape[0])
                self._add(f"{call.path}.{LOOKUPS}", lookups)
            else:
                self._add(f"{call.path}.{MEAN_SQUARE}", np.array(squares))
                self._add(f"{call.path}.{COUNT}", np.array(tokens))
        self._ahead.clear()

    def results(self) -> dict[str, np.ndarray]:
        """Return what ``output_specs`` says."""
        import numpy as np

        results = {}
        for name, total in self._totals.items():
            path, _, kind = name.rpartition(".")
            if kind == MEAN_SQUARE:
                count = self._totals[f"{path}.{COUNT}"].reshape(*total.shape[:-1], 1)
                results[name] = (total / np.maximum(count, 1)).astype(np.float32)
            else:
                results[name] = total.astype(np.uint32)
        return results

    def _add(self, name: str, array: np.ndarray) -> None:
        total = self._totals.get(name)
        self._totals[name] = array.astype("float64") if total is None else total + array


def _add_tokens(seen: Seen) -> tuple[mx.array | None, mx.array]:
    """Return the sum of squares by channel, and what else there is of one call: see ``_Sum``.

    Of experts, by a product: a GPU that scatters adds up in another order each time.
    """
    shape, inputs = seen.call.shape, seen.inputs
    if seen.call.is_lookup:
        return None, inputs
    squares = mx.square(inputs.astype(mx.float32))
    if seen.experts is None:
        count = mx.full((seen.call.matrices,), inputs.shape[-2], mx.uint32)
        return squares.sum(axis=-2), count
    chosen = seen.experts[:, None] == mx.arange(shape[0], dtype=seen.experts.dtype)
    return chosen.astype(mx.float32).T @ squares, chosen.astype(mx.uint32).sum(axis=0)

"""gradients: how much each channel that a module is given matters to what the model says.

The model before it is quantized is run backwards, segment by segment, from tokens that are drawn as
it predicts them itself. The mean of the squares of such gradients is the curvature of the
Kullback-Leibler divergence from what it says (the Fisher information). Where a change of a weight
changes what a module makes of each token by the change times what it is given, the divergence is
half of the sum of the squares of these changes, each times the square of the gradient there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import structs

from cache.records.manifests import Tensor, TensorSpec
from tasks.quality.calls import Call, Seen
from tasks.quality.segments import LOGITS
from tasks.stages.activations import Activations
from tasks.stages.forward_params import GRADIENT, STATE, ForwardParams
from tasks.stages.running import (
    UnquantizedStage,
    by_numpy,
    calls_of,
    plan_segments,
    specs_of,
    stored,
)
from tasks.stages.segment_runner import SegmentRunner
from tasks.stages.stage import Context, Inputs, Key, Need, Output, Planned, Result, TargetModel
from tasks.stages.tokens import CALIBRATION_TEXT
from tasks.tensors import mx

if TYPE_CHECKING:
    import numpy as np

IMPORTANCE, ROW_IMPORTANCE = "importance", "row_importance"


def name_of(call: Call) -> str:
    """Return what is called so that is told of a module: of channels, or of an embedding's rows."""
    return f"{call.path}.{ROW_IMPORTANCE if call.is_lookup else IMPORTANCE}"


class Gradients(UnquantizedStage):
    """Tell how much each channel that a module is given matters to what the model says.

    ``importance``, float32, as the weight without its rows: (…, channels). Of an embedding that is
    looked up, ``row_importance``: (rows,). Both are sums of what tokens have, by the token.
    """

    name = "gradients"
    text = CALIBRATION_TEXT

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ForwardParams]]:
        """Plan all segments, the last first; none where the model cannot be run."""
        forward = plan_segments(self, target, before=Activations.name)
        calls = calls_of(target) if forward else {}
        planned: dict[str, Planned[ForwardParams]] = {}
        for name in reversed(forward):
            each = forward[name]
            after = [Need(self.name, next(reversed(planned)))] if planned else []
            planned[name] = Planned(
                structs.replace(by_numpy(each.params), top_logits=0, calls=calls[name]),
                (*each.needs, *after),
                (each.reads or frozenset()) | {GRADIENT},
            )
        return planned

    def outputs(self, params: ForwardParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the gradient by the state before, if there is one, and what is told of modules."""
        specs: dict[str, TensorSpec] = {}
        for spec in (spec for key, spec in inputs.items() if key.name == STATE):
            specs[GRADIENT] = TensorSpec("float32", spec.shape)
        specs |= {name_of(call): TensorSpec("float32", call.shape) for call in params.calls}
        return stored(specs, inputs)

    def run(self, params: ForwardParams, inputs: Inputs, context: Context) -> Result:
        """Run a segment backwards on one sequence after another."""
        import numpy as np

        runner = SegmentRunner(self, params, inputs, context)
        outputs = self.outputs(params, specs_of(inputs))
        totals = {name_of(c): np.zeros(c.shape, np.float64) for c in params.calls}
        after = Key(self.name, GRADIENT)

        def look(index: int) -> list[mx.array]:
            found: list[tuple[Seen, mx.array]] = []

            def see(seen: Seen, gradient: mx.array) -> list[mx.array]:
                found.append((seen, _weighted(seen, gradient)))
                return [found[-1][1], *([seen.inputs] if seen.call.is_lookup else [])]

            toward = None if params.segment == LOGITS else runner.read(after, index)
            before = runner.differentiate(index, toward, see)
            for seen, weights in found:
                totals[name_of(seen.call)] += _by_row(seen, np.array(weights))
            return [] if before is None else [before]

        states = {name: output for name, output in outputs.items() if name == GRADIENT}
        tensors = runner.write(states, look)
        tokens = runner.samples * params.shape[1]
        for name, total in totals.items():
            data = (total / tokens).astype(np.float32)
            with context.writer(name, data.nbytes) as writer:
                writer.write(memoryview(data.tobytes()))
            tensors[name] = Tensor("float32", data.shape, writer.digest)
        return Result({name: tensors[name] for name in outputs}, runner.notes)


def _weighted(seen: Seen, gradient: mx.array) -> mx.array:
    """Return the sum of tokens' squares, by channel, times the gradient's; of a lookup, the latter.

    Args:
        seen: what a module is given.
        gradient: by what it makes, whose mean square over the width counts.
    """
    squares = mx.square(seen.aligned(gradient).astype(mx.float32)).mean(axis=-1)
    if seen.call.is_lookup:
        return squares
    weighted = mx.square(seen.inputs.astype(mx.float32)) * squares[..., None]
    if seen.experts is None:
        return weighted.sum(axis=-2)
    chosen = seen.experts[:, None] == mx.arange(seen.call.shape[0], dtype=seen.experts.dtype)
    return chosen.astype(mx.float32).T @ weighted


def _by_row(seen: Seen, weights: np.ndarray) -> np.ndarray:
    """Return what there is of a call; of a lookup, by row."""
    import numpy as np

    if not seen.call.is_lookup:
        return weights
    return np.bincount(np.array(seen.inputs), weights, minlength=seen.call.shape[0])

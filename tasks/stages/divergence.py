"""divergence: what quantizing one module in one way costs, as the whole model is run with it.

Exact, and expensive: a run of all that comes from the module on, for each module and candidate. The
states before it are those of ``activations``, the same in each; what the model says before it is
quantized is kept once, by ``baseline``. Segments are run one after another on all sequences, so
weights are in memory of one at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from math import fsum, inf, isfinite
from typing import Any, cast

from msgspec import structs

from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.quality import divergence
from tasks.quality.divergence import TopPredictions
from tasks.quality.segments import LOGITS, weight_of
from tasks.stages import quantize
from tasks.stages.activations import Activations
from tasks.stages.candidates import node_name
from tasks.stages.forward import TOP_PREDICTIONS, Teacher
from tasks.stages.forward_params import ForwardParams, skeleton_of
from tasks.stages.quantize_scheme import Setting, module_path
from tasks.stages.reasons import Reason
from tasks.stages.running import by_numpy, plan_segments, stored
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
)  # fmt: skip
from tasks.stages.tokens import CALIBRATION_TEXT
from tasks.tensors import arrays, kernels, mx, rows
from tasks.tensors.device import BLOCK_BYTES, device_of

DIVERGENCE = "divergence"


class Baseline(Teacher):
    """Keep what each model says of the text to calibrate on before it is quantized."""

    name = "baseline"
    text = CALIBRATION_TEXT

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what is run, and whether it is asked for."""
        return super().plan_key(target), bool(target.exact)

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ForwardParams]]:
        """Plan the last segment, where that is asked for."""
        if not target.exact:
            return {}
        planned = plan_segments(self, target, before=Activations.name)
        return {
            name: structs.replace(each, params=by_numpy(each.params))
            for name, each in planned.items()
            if each.params.top_logits
        }


class DivergenceParams(ForwardParams, frozen=True, kw_only=True):
    """What is run: from a segment on, ``settings`` being that of the one weight.

    Attributes:
        state_nbytes: of the states of all sequences between two segments, at most.
        weight_nbytes: of the weight, rounded, which is there from the first segment to the last.
    """

    state_nbytes: int
    weight_nbytes: int


_UNQUANTIZED = Baseline()  # runs the model as it is before it is quantized, on the same text


class Divergence(Stage[DivergenceParams]):
    """Run each model with one module alone quantized, and compare.

    A node is one candidate of one module. It makes one number: the mean Kullback-Leibler divergence
    from what ``Baseline`` says, nats by the token.
    """

    name = DIVERGENCE
    version = 1
    keep = Keep.ALWAYS
    params = DivergenceParams

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what is run, and what is tried."""
        return _UNQUANTIZED.plan_key(target), target.candidates, target.exact

    def plan(self, target: TargetModel) -> Mapping[str, Planned[DivergenceParams]]:
        """Plan a node for each module and candidate, where that is asked for."""
        if not target.exact:
            return {}
        segments = list(plan_segments(_UNQUANTIZED, target, before=Activations.name).values())
        tensors = skeleton_of(target, {}).tensors
        planned = {}
        for path in sorted(target.exact):
            weight = weight_of(path)
            reading = (i for i, each in enumerate(segments) if weight in (each.reads or ()))
            run = segments[next(reading, len(segments)) :]
            spec = tensors[weight]
            fitting = (each for each in target.candidates if not spec.shape[-1] % each.group_size)
            for setting in fitting if run else ():
                made = _planned(run, target, weight, setting, spec.nbytes)
                planned[node_name(path, setting)] = made
        return planned

    def outputs(
        self, params: DivergenceParams, inputs: Mapping[Key, TensorSpec]
    ) -> dict[str, Output]:
        """Return the number."""
        return stored({_name(params): TensorSpec("float32", (1,))}, inputs)

    def run(self, params: DivergenceParams, inputs: Inputs, context: Context) -> Result:
        """Run all segments from the module's on, each on one sequence after another."""
        (weight, setting), *_ = params.settings.items()
        rounded = {weight: _rounded(context, weight, setting, params.device)}
        runner = SegmentRunner(_UNQUANTIZED, params, inputs, context, replaced=rounded)
        nats = (nats for each in _compared(runner) for nats in each)
        mean = mean_of(nats, runner.samples * params.shape[1])
        data = memoryview(struct.pack("<f", mean))
        with context.writer(_name(params), data.nbytes) as writer:
            writer.write(data)
        tensor = Tensor("float32", (1,), writer.digest)
        return Result({_name(params): tensor}, runner.notes)

    def memory(self, params: DivergenceParams, checkpoint: Checkpoint) -> int:
        """Return the size of a segment's weights, of all states, before and after it, and of one.

        As that is put together of blocks, it is there twice; but then no segment is, of which the
        first is at least as large.
        """
        states = 2 * params.state_nbytes
        return _UNQUANTIZED.memory(params, checkpoint) + states + params.weight_nbytes

    def runs_alone(self, params: DivergenceParams) -> bool:
        """Tell whether a GPU computes, as of other stages that run a model."""
        return _UNQUANTIZED.runs_alone(params)

    def describe(self, params: DivergenceParams) -> str:
        """Return the candidate."""
        return quantize.words(params.settings)

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare one by one."""
        return _UNQUANTIZED.explain(old, new)


def _planned(
    run: Sequence[Planned[ForwardParams]],
    target: TargetModel,
    weight: str,
    setting: Setting,
    nbytes: int,
) -> Planned[DivergenceParams]:
    """Plan to run segments, the last of which makes logits."""
    states = [each.params.spec.nbytes for each in run[:-1]]
    params = structs.replace(
        by_numpy(run[-1].params),
        segment=run[0].params.segment,
        nbytes=max(each.params.nbytes for each in run),
        settings={weight: setting},
    )
    within = {Need(Activations.name, each.params.segment) for each in run}
    needs = dict.fromkeys(need for each in run for need in each.needs if need not in within)
    return Planned(
        DivergenceParams(
            **structs.asdict(params),
            state_nbytes=max(states, default=0) * target.quality.samples,
            weight_nbytes=nbytes,
        ),
        (*needs, Need(Baseline.name, LOGITS)),
        frozenset(TOP_PREDICTIONS).union(*(each.reads or () for each in run)),
    )


def _name(params: DivergenceParams) -> str:
    (weight,) = params.settings
    return name_of(module_path(weight))


def name_of(path: str) -> str:
    """Return what is called so that is told of a module."""
    return f"{path}.{DIVERGENCE}"


def mean_of(nats: Iterable[float], tokens: int) -> float:
    """Return the mean divergence; infinity where a model says what is no number."""
    mean = fsum(nats) / tokens
    return max(0.0, mean) if isfinite(mean) else inf  # of NaN, max would make 0


def _compared(runner: SegmentRunner) -> Iterator[list[float]]:
    """Yield the divergence of each token, sequence by sequence."""
    states: list[mx.array | None] = [None] * runner.samples
    for segment in runner.remaining():
        for index, state in enumerate(states):
            with runner.stream():
                made = runner.run(index, state)
                if segment.name != LOGITS:
                    states[index] = made
                    continue
                states[index] = None
                nats = _nats(runner, index, made[0])
            yield nats


def _nats(runner: SegmentRunner, index: int, logits: mx.array) -> list[float]:
    teacher = TopPredictions(
        *(runner.read(Key(Baseline.name, name), index) for name in TOP_PREDICTIONS)
    )
    compared = divergence.compare(logits, runner.following(index), teacher)
    return cast("list[float]", compared.divergence.tolist())


def _rounded(context: Context, name: str, setting: Setting, backend: str) -> mx.array:
    """Return a weight as it is once it is quantized, in its own dtype."""
    weight = context.rows(Key(context.planned.roles.unquantized, name))
    device = device_of(backend)
    blocks = []
    for start, stop in rows.spans(weight, BLOCK_BYTES[device]):
        block = weight.read(start, stop)
        if device == "gpu":
            arrays.share(block)
        stream = context.streams.get(device)
        packed, _, _ = quantize.quantize_block(block, setting, device, stream)
        wide = kernels.dequantize(packed, **setting._asdict(), stream=stream)
        blocks.append(wide.astype(block.dtype, stream=stream))
        mx.eval(blocks[-1])
    made = mx.concatenate(blocks, stream=context.streams.get(device)).reshape(weight.shape)
    mx.eval(made)
    return made

"""running: what stages have in common that run a model, segment by segment.

Each segment is a node. It reads the tensors that it needs and the state that the one before left,
for all sequences, and leaves the next state: weights are in memory of one segment at a time, and of
states one sequence's. A stage that looks into a segment asks ``SegmentRunner`` for what its modules
are given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from msgspec import structs

from cache.digest import digest_record
from cache.records.manifests import TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.layouts.asking import versions
from tasks.quality import segments
from tasks.quality.calls import Call
from tasks.quality.segments import Segment, Skeleton, Split
from tasks.stages import quantize
from tasks.stages.forward_params import STATE, ForwardParams, skeleton_of
from tasks.stages.quantize_scheme import Setting, parts
from tasks.stages.reasons import Reason, changed_values
from tasks.stages.segment_runner import SegmentRunner
from tasks.stages.stage import (
    Context,
    Inputs,
    Keep,
    Key,
    Need,
    Origin,
    Output,
    Planned,
    Result,
    Stage,
    TargetModel,
)  # fmt: skip
from tasks.stages.tokens import EVALUATION_TEXT, TOKENS, Tokens
from tasks.tensors import blas
from tasks.tensors.device import device_of
from tasks.tensors.rows import IN_FLIGHT_BYTES

STATES_AT_ONCE = 8  # states, or logits, of one sequence that a segment holds at once


class ModelStage(Stage[ForwardParams]):
    """A stage that runs a model.

    Attributes:
        text: the node of the text that it runs it on.
    """

    text = EVALUATION_TEXT
    version = 1
    keep = Keep.ALWAYS
    params = ForwardParams

    def settings(self, target: TargetModel) -> Mapping[str, Setting]:
        """Return how the weights of the model that is run are quantized."""
        return target.settings

    def maker(self, target: TargetModel) -> str:
        """Return the stage that makes these weights."""
        return target.roles.packed

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what is run, and on what."""
        return target.dtype, tuple(self.settings(target).items()), target.quality

    def outputs(self, params: ForwardParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the state: (samples, tokens, width)."""
        return stored({STATE: of_all_samples(params.spec, inputs)}, inputs)

    def run(self, params: ForwardParams, inputs: Inputs, context: Context) -> Result:
        """Run a segment on one sequence after another."""
        runner = SegmentRunner(self, params, inputs, context)
        outputs = self.outputs(params, specs_of(inputs))
        return Result(runner.write(outputs, lambda index: [runner.run(index)]))

    def memory(self, params: ForwardParams, checkpoint: Checkpoint) -> int:
        """Return the size of the weights, where a CPU multiplies in float32 too; of states."""
        widens = "numpy" in params.versions or params.dtype != "float32"
        wide = 2 * params.nbytes if params.device == "cpu" and widens else 0  # at most
        return params.nbytes + wide + STATES_AT_ONCE * params.spec.nbytes + IN_FLIGHT_BYTES

    def runs_alone(self, params: ForwardParams) -> bool:
        """Tell whether a GPU computes: models name no stream.

        Besides, MLX's CUDA backend returns wrong numbers where several threads multiply matrices.
        """
        return device_of(params.device) == "gpu"

    def describe(self, params: ForwardParams) -> str:
        """Return how what is run is quantized."""
        return quantize.words(params.settings)

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare settings by name, and all else one by one."""
        changed = quantize.setting_changes(old.get("settings") or {}, new.get("settings") or {})
        return changed + changed_values(old, new, but=("settings",))


class UnquantizedStage(ModelStage):
    """A stage that runs the model as it is before it is quantized."""

    def settings(self, target: TargetModel) -> Mapping[str, Setting]:
        """Return none."""
        return {}

    def maker(self, target: TargetModel) -> str:
        """Return the stage that makes what is quantized."""
        return target.roles.unquantized


def plan_segments(
    stage: ModelStage,
    target: TargetModel,
    *,
    before: str,
    name_of: Callable[[str], str] = lambda segment: STATE,
) -> dict[str, Planned[ForwardParams]]:
    """Return the segments of a model by name, in order; none where it cannot be run.

    Args:
        stage: whose they are.
        target: the target.
        before: the stage whose states they begin with.
        name_of: returns what that calls the state that a segment leads to.
    """
    if not target.model.runs:
        return {}
    settings, maker = stage.settings(target), stage.maker(target)
    skeleton = skeleton_of(target, settings)
    # Of the last token there is none to predict.
    split = segments.split(target.memos, skeleton, target.quality.sequence_length - 1)
    weight_of = {part: name for name, s in settings.items() for part in parts(name, s)}
    layer_of = {p.name: layer for layer, parameters in target.layers.items() for p in parameters}
    planned = {}
    for segment in split.segments:
        weights = dict.fromkeys(weight_of.get(name, name) for name in segment.reads)
        quantized = {name: settings[name] for name in weights if name in settings}
        params = structs.replace(_params(target, skeleton, split, segment), settings=quantized)
        needs = [Need(maker, layer) for layer in dict.fromkeys(layer_of[n] for n in weights)]
        needs.append(Need(Tokens.name, stage.text))
        state = STATE
        if segment.number:
            previous = split.segments[segment.number - 1].name
            needs.append(Need(before, previous))
            state = name_of(previous)
        reads = frozenset((*segment.reads, TOKENS, state))
        planned[segment.name] = Planned(params, tuple(needs), reads)
    return planned


def by_numpy(params: ForwardParams) -> ForwardParams:
    """Return the same, linear layers computed by NumPy on a CPU, whose BLAS is the faster one.

    What MLX would make differs in the last bits: it is for what looks into a model, not for what it
    says.
    """
    if params.device != "cpu":
        return params
    return structs.replace(params, versions=params.versions | {"numpy": blas.version()})


def calls_of(target: TargetModel) -> dict[str, tuple[Call, ...]]:
    """Return the calls of modules in each segment of the model before it is quantized, by name."""
    length = target.quality.sequence_length - 1
    split = segments.split(target.memos, skeleton_of(target, {}), length)
    return {segment.name: segment.calls for segment in split.segments}


def _params(
    target: TargetModel, skeleton: Skeleton, split: Split, segment: Segment
) -> ForwardParams:
    config = {k: v for k, v in target.model.config.items() if not k.startswith("quantization")}
    top_logits = target.quality.top_logits if segment is split.segments[-1] else 0
    return ForwardParams(
        segment=segment.name,
        whole=bool(split.whole),
        config=digest_record(config),
        settings={},
        dtype=segment.dtype,
        shape=segment.shape,
        nbytes=sum(skeleton.tensors[name].nbytes for name in segment.reads),
        top_logits=min(top_logits, segment.shape[-1]),
        versions=versions(target.model.library),
        device=target.computer.device,
        machine=target.computer.machine,
    )


def specs_of(inputs: Inputs) -> dict[Key, TensorSpec]:
    """Return the dtypes and shapes of inputs."""
    return {key: tensor.spec for key, tensor in inputs.items()}


def of_all_samples(spec: TensorSpec, inputs: Mapping[Key, TensorSpec]) -> TensorSpec:
    """Return what there is of one sequence, for all of them."""
    samples = inputs[Key(Tokens.name, TOKENS)].shape[0]
    return TensorSpec(spec.dtype, (samples, *spec.shape[1:]))


def stored(specs: Mapping[str, TensorSpec], inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
    """Return outputs that are made of all inputs."""
    return {name: Output(spec, Origin.STORED, tuple(inputs)) for name, spec in specs.items()}

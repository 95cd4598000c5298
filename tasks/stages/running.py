"""running: what stages have in common that run a model, segment by segment.

Each segment is a node. It reads the tensors that it needs and the state that the one before left,
for all sequences, and leaves the next state: weights are in memory of one segment at a time, and of
states one sequence's. A stage that looks into a segment asks ``SegmentRunner`` for what its modules
are given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from msgspec import structs

from cache.digest import digest_record
from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import BuildError
from tasks.layouts.asking import versions
from tasks.quality import segments
from tasks.quality.calls import Call, Seen, Watch
from tasks.quality.segments import LOGITS, Run, Segment, Skeleton, Split
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
from tasks.stages.tokens import EVALUATION_TEXT, TOKENS, Tokens
from tasks.tensors import arrays, blas, mx, rows
from tasks.tensors.device import device_of
from tasks.tensors.rows import IN_FLIGHT_BYTES, Rows

STATE = "state"
STATES_AT_ONCE = 8  # states, or logits, of one sequence that a segment holds at once


class ForwardParams(Params, frozen=True):
    """What is run.

    Attributes:
        segment: its name.
        whole: whether the model runs as one segment.
        config: digest of config.json, but for what it says of quantizing.
        settings: how each weight that it reads is quantized, by name.
        dtype: of what it leads to, for one sequence.
        shape: of the same.
        nbytes: of the tensors that it reads.
        top_logits: how many of the teacher's are kept; 0 where none are.
        versions: of MLX and of the library.
        device: what computes: ``cpu``, ``metal``, ``cuda``.
        machine: the processor.
        calls: of modules, those that are looked at.
    """

    segment: str
    whole: bool
    config: str
    settings: dict[str, Setting]
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    top_logits: int
    versions: dict[str, str]
    device: str
    machine: str
    calls: tuple[Call, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape of what it leads to, for one sequence."""
        return TensorSpec(self.dtype, self.shape)


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
        """Return the size of the weights, where NumPy multiplies in float32 too; of states."""
        wide = 2 * params.nbytes if "numpy" in params.versions else 0  # at most: see blas.linear
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


def _check_tokens(tokens: Rows, vocabulary: int) -> None:
    """Refuse tokens that the model has no rows for: MLX would read beyond its arrays.

    Raises:
        BuildError: there is one.
    """
    ids = tokens.read(0, rows.count(tokens))
    most = int(mx.max(ids).item()) if ids.size else 0  # type: ignore[arg-type]
    if most >= vocabulary:
        raise BuildError(
            f"the checkpoint's tokenizer makes token {most} of the text of [quality], and the "
            f"model has {vocabulary}. Is it the tokenizer of another model?"
        )


class SegmentRunner:
    """Runs a segment, on one sequence after another."""

    def __init__(
        self, stage: ModelStage, params: ForwardParams, inputs: Inputs, context: Context
    ) -> None:
        self._context = context
        self._device = device_of(params.device)
        self._params = params
        maker = stage.maker(context.planned)
        weights = {key.name: key for key in inputs if key.stage == maker}
        self._reads = [*weights]
        self._rows = {key: context.rows(key) for key in inputs if key.stage != maker}
        own = state_of(params.segment)  # what it leads to itself, where a stage reads that, too
        self._state = next(
            (k for k in self._rows if f".{k.name}".endswith(f".{STATE}") and k.name != own), None
        )
        self._tokens = next(key for key in inputs if key.name == TOKENS)
        self.is_last = params.segment == LOGITS
        context.prefetch(inputs)
        skeleton = skeleton_of(context.planned, stage.settings(context.planned))
        split = segments.split(context.planned.memos, skeleton, params.shape[1])
        self.notes = _notes(split)
        linear = blas.linear if "numpy" in params.versions else None
        _check_tokens(self._rows[self._tokens], split.segments[-1].shape[-1])
        with self.stream():
            if params.whole:
                every = [weights[name] for name in skeleton.tensors]
                self._model = skeleton.load(lambda file, start: self._fill(file, start, every))
                mx.eval(self._model.parameters())
                self._watch = Watch(self._model, linear)
                return
            self._model = skeleton.load()
            self._watch = Watch(self._model, linear)
        loaded = [(name, self._weight(key)) for name, key in weights.items()]
        self._model.load_weights(loaded, strict=False)
        self._number = [segment.name for segment in split.segments].index(params.segment)
        self._run = Run(self._model, split.segments)

    @property
    def samples(self) -> int:
        """How many sequences there are."""
        return self._rows[self._tokens].shape[0]

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Compute on the stream that it runs on."""
        with mx.stream(self._context.streams.get(self._device)):
            yield

    def write(
        self, outputs: Mapping[str, Output], make: Callable[[int], Iterable[mx.array]]
    ) -> dict[str, Tensor]:
        """Write what ``make`` returns for each sequence, an array an output."""
        with ExitStack() as stack:
            writers = [
                stack.enter_context(self._context.writer(name, output.spec.nbytes))
                for name, output in outputs.items()
            ]
            for index in range(self.samples):
                with self.stream():
                    arrays_made = [*make(index)]
                    for output, array in zip(outputs.values(), arrays_made, strict=True):
                        if arrays.dtype_name(array) != output.spec.dtype:
                            raise BuildError(
                                f"{self._params.segment} makes {arrays.dtype_name(array)}, where "
                                f"{output.spec.dtype} was planned."
                            )
                    for writer, array in zip(writers, arrays_made, strict=True):
                        writer.write(arrays.view(array))
        return {
            name: Tensor(*output.spec, writer.digest)
            for (name, output), writer in zip(outputs.items(), writers, strict=True)
        }

    def run(self, index: int) -> mx.array:
        """Return the state, or the logits, that the segment leads to: (1, tokens, …)."""
        with self._computing():
            result = self._begin(index, self._state_of(index))
            mx.eval(result)
        return result

    def look(self, index: int, see: Callable[[Seen], Iterable[mx.array]]) -> mx.array:
        """Return the same, and have ``see`` called with what modules are given on the way there.

        What it returns is evaluated with the state; logits, which are large, are not.

        Args:
            index: of the sequence.
            see: called for each of the segment's calls, in order; see ``quality.calls``.
        """
        calls = {call.number for call in self._params.calls}
        wanted: list[mx.array] = []

        def seen(each: Seen) -> None:
            if each.call.number in calls:
                wanted.extend(see(each))

        with self._computing():
            with self._watch.seeing(seen):
                result = self._begin(index, self._state_of(index))
            mx.eval(wanted if self.is_last else [*wanted, result])
        return result

    def weights(self) -> dict[str, mx.array]:
        """Return the weights that the segment reads, by name."""
        from mlx.utils import tree_flatten

        parameters = dict(
            cast("list[tuple[str, mx.array]]", tree_flatten(self._model.parameters()))
        )
        return {name: parameters[name] for name in self._reads}

    def trial(
        self, weights: Mapping[str, mx.array], tokens: int, see: Callable[[Seen], None]
    ) -> mx.array:
        """Run the segment on the first sequence's first tokens, in float32, with other weights.

        Args:
            weights: all that the segment reads.
            tokens: how many.
            see: called with what each module is given.
        """
        self._model.load_weights([*weights.items()], strict=False)
        state = self._state_of(0)
        if state is not None:
            state = state[:, :tokens].astype(mx.float32)
        with self._computing(), self._watch.seeing(see):
            return self._begin(0, state, tokens)

    def differentiate(
        self,
        index: int,
        after: mx.array | None,
        see: Callable[[Seen, mx.array], Iterable[mx.array]],
    ) -> mx.array | None:
        """Return the gradient by the state that the segment begins with, None of the first.

        Args:
            index: of the sequence.
            after: the gradient by the state that it leads to, (tokens, …); None of the last, which
                begins: with the likelihood of tokens that are drawn as the model itself says.
            see: called for each of the segment's calls with what the module is given, and the
                gradient by what it makes; what it returns is evaluated.
        """
        self._model.train()  # some have kernels that have no gradient, and use others then
        calls = {call.number for call in self._params.calls}
        state = self._state_of(index)
        zeros: dict[int, mx.array] = {}
        given: list[Seen] = []

        def note(number: int, made: mx.array) -> mx.array:
            if number in calls:
                zeros[number] = mx.zeros(made.shape, made.dtype)
            return made

        def run(*primals: mx.array) -> mx.array:
            given.clear()
            added = dict(zip(zeros, primals, strict=False))
            before = None if state is None else primals[-1]
            with self._watch.seeing(given.append, lambda n, y: y + added[n] if n in added else y):
                result = self._begin(index, before)
            return result if after is not None else _surprise(result, index)

        with self._computing():
            with self._watch.seeing(given.append, note):
                result = self._begin(index, state)
            toward = mx.array(1.0) if after is None else after[None].astype(result.dtype)
            primals = [*zeros.values(), *([] if state is None else [state])]
            _, gradients = mx.vjp(run, primals, [toward])
            seen = {each.call.number: each for each in given}
            wanted = [
                array
                for number, gradient in zip(zeros, gradients, strict=False)
                for array in see(seen[number], gradient)
            ]
            before = None if state is None else gradients[-1][0].astype(mx.float32)
            mx.eval(wanted, *([] if before is None else [before]))
        return before

    def _state_of(self, index: int) -> mx.array | None:
        return None if self._state is None else self.read(self._state, index)[None]

    def _begin(self, index: int, state: mx.array | None, first: int | None = None) -> mx.array:
        tokens = self.read(self._tokens, index)[None, :-1][:, :first]
        if self._params.whole:
            logits: mx.array = self._model(tokens)
            return logits
        return self._run.segment(self._number, tokens, state)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:  # what MLX and models raise
            raise BuildError(
                f"MLX cannot run {self._params.segment} of the model on {self._params.device}: "
                f"{error} Not all kernels that a GPU has are there for a CPU, nor for each dtype: "
                'dtype = "float32" may do, or device = "gpu".'
            ) from error

    def following(self, index: int) -> mx.array:
        """Return the tokens that are to be predicted: (tokens,)."""
        return self.read(self._tokens, index)[1:]

    def read(self, key: Key, index: int) -> mx.array:
        """Return what an input holds of one sequence."""
        source = self._rows[key]
        count = rows.count(source) // source.shape[0]
        with mx.stream(self._context.streams.get("cpu")):
            array = source.read(index * count, (index + 1) * count).reshape(source.shape[1:])
            return self._shared(array)

    def _weight(self, key: Key) -> mx.array:
        source = self._context.rows(key)
        return self._shared(source.read(0, rows.count(source)).reshape(source.shape))

    def _shared(self, array: mx.array) -> mx.array:
        if self._device == "gpu":
            arrays.share(array)
        mx.eval(array)
        return array

    def _fill(self, path: Path, start: int, weights: Iterable[Key]) -> None:
        with path.open("r+b") as file, mx.stream(self._context.streams.get("cpu")):
            file.seek(start)
            for key in weights:
                for block in rows.blocks(self._context.rows(key)):
                    file.write(arrays.view(block))


def state_of(segment: str) -> str:
    """Return a name for a segment's state, where those of several segments are read."""
    return f"{segment}.{STATE}"


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


def skeleton_of(target: TargetModel, settings: Mapping[str, Setting]) -> Skeleton:
    """Return the model as it is quantized by the target's settings, or by none."""
    tensors: dict[str, TensorSpec] = {}
    for parameter in (each for parameters in target.layers.values() for each in parameters):
        dtype = target.fused.get(parameter.name) or target.dtype_after_cast(parameter)
        spec = TensorSpec(dtype, parameter.shape)
        if setting := settings.get(parameter.name):
            tensors |= quantize.part_specs(parameter.name, spec, setting)
        else:
            tensors[parameter.name] = spec
    config = target.config if settings else target.model.config
    return Skeleton(target.model.library, config, tensors)


def _surprise(logits: mx.array, index: int) -> mx.array:
    """Return how unlikely tokens are that are drawn by logits.

    The squares of its gradients are, on average, the curvature of the divergence from the logits.

    Args:
        logits: (1, tokens, vocabulary).
        index: of the sequence, for which the same tokens are drawn each time.
    """
    wide = logits.astype(mx.float32)
    drawn = mx.random.categorical(mx.stop_gradient(wide), key=mx.random.key(index))
    scores = mx.take_along_axis(wide, drawn[..., None], -1).squeeze(-1)
    return mx.sum(mx.logsumexp(wide, axis=-1) - scores)


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


def _notes(split: Split) -> tuple[str, ...]:
    return (f"the model runs whole, not block by block: {split.whole}",) if split.whole else ()

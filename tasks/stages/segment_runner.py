"""segment_runner: runs a segment of a model, on one sequence after another."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, cast

from cache.records.manifests import Tensor
from tasks.core.errors import BuildError
from tasks.quality import products, segments
from tasks.quality.calls import Seen, Watch
from tasks.quality.segments import LOGITS, Run, Segment, Split
from tasks.stages.forward_params import STATE, ForwardParams, skeleton_of, state_of
from tasks.stages.quantize_scheme import Setting
from tasks.stages.stage import Context, Inputs, Key, Output, TargetModel
from tasks.stages.tokens import TOKENS
from tasks.tensors import arrays, mx, rows
from tasks.tensors.device import device_of
from tasks.tensors.rows import Rows

_NOTHING: Mapping[str, mx.array] = {}


class Runs(Protocol):
    """A stage that runs a model."""

    def settings(self, target: TargetModel) -> Mapping[str, Setting]:
        """Return how the weights of the model that is run are quantized."""

    def maker(self, target: TargetModel) -> str:
        """Return the stage that makes these weights."""


class _Seen(Exception):
    """All is seen that was to be."""


class SegmentRunner:
    """Runs a segment, on one sequence after another."""

    def __init__(
        self,
        stage: Runs,
        params: ForwardParams,
        inputs: Inputs,
        context: Context,
        replaced: Mapping[str, mx.array] = _NOTHING,
    ) -> None:
        """Have a segment's weights in memory.

        Args:
            stage: whose model it is.
            params: what is run.
            inputs: of the node.
            context: of the same.
            replaced: weights that others stand for, by name.
        """
        self._context = context
        self._device = device_of(params.device)
        self._params = params
        self._replaced = replaced
        self._made: dict[int, tuple[tuple[int, ...], mx.Dtype]] = {}  # by the call's number
        self._result_dtype = mx.float32
        maker = stage.maker(context.planned)
        self._weights = {key.name: key for key in inputs if key.stage == maker}
        self._rows = {key: context.rows(key) for key in inputs if key.stage != maker}
        own = state_of(params.segment)  # what it leads to itself, where a stage reads that, too
        self._state = next(
            (k for k in self._rows if f".{k.name}".endswith(f".{STATE}") and k.name != own), None
        )
        self._tokens = next(key for key in inputs if key.name == TOKENS)
        self.is_last = params.segment == LOGITS
        context.prefetch(inputs)
        skeleton = skeleton_of(context.planned, stage.settings(context.planned))
        self._split = segments.split(context.planned.memos, skeleton, params.shape[1])
        self.notes = _notes(self._split)
        _check_tokens(self._rows[self._tokens], self._split.segments[-1].shape[-1])
        with self.stream():
            if params.whole:
                self._model = skeleton.load(
                    lambda file, start: self._fill(file, start, skeleton.tensors)
                )
                mx.eval(self._model.parameters())
                self._watch = self._watched()
                return
            self._model = skeleton.load()
            self._watch = self._watched()
        self._not_loaded = self._parameters()
        names = [segment.name for segment in self._split.segments]
        self._number = names.index(params.segment)
        self._run = Run(self._model, self._split.segments)
        self._load(self._reads)

    @property
    def _reads(self) -> list[str]:
        """The weights that the segment reads, in order."""
        reads = {*self._split.segments[self._number].reads}
        return [name for name in self._weights if name in reads]

    def _load(self, names: Iterable[str]) -> None:
        """Have weights in memory."""
        loaded = [(name, self._weight(name)) for name in names]
        self._model.load_weights(loaded, strict=False)

    def remaining(self) -> Iterator[Segment]:
        """Yield the segment, and all after it, each with its weights alone in memory."""
        if self._params.whole:
            yield from self._split.segments
            return
        while True:
            yield self._split.segments[self._number]
            if self._number + 1 == len(self._split.segments):
                return
            before = {name: self._not_loaded[name] for name in self._reads}
            self._number += 1
            kept = {*self._reads}
            left = [each for each in before.items() if each[0] not in kept]
            self._model.load_weights(left, strict=False)
            self._load(name for name in self._reads if name not in before)

    def _watched(self) -> Watch:
        # What watches a model refers to it and back: its weights would stay for long.
        weakref.finalize(self, _let_go, self._model).atexit = False
        if self._device == "gpu":
            return Watch(self._model)
        by_numpy = "numpy" in self._params.versions
        return Watch(self._model, products.BY_NUMPY if by_numpy else products.ON_CPU)

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

    def run(self, index: int, state: mx.array | None = None) -> mx.array:
        """Return the state, or the logits, that the segment leads to: (1, tokens, …).

        Args:
            index: of the sequence.
            state: that it begins with, if it is not the one that the node is given.
        """
        with self._computing():
            result = self._begin(index, self._state_of(index) if state is None else state)
            mx.eval(result)
        return result

    def look(self, index: int, see: Callable[[Seen], Iterable[mx.array]]) -> list[mx.array]:
        """Have ``see`` called with what modules are given; return the state, if there is one.

        What it returns is evaluated with the state. Logits are not: the last segment is left once
        all is seen that is looked for, since where NumPy computes them they take the longest.

        Args:
            index: of the sequence.
            see: called for each of the segment's calls, in order; see ``quality.calls``.
        """
        calls = {call.number for call in self._params.calls}
        wanted: list[mx.array] = []
        result: list[mx.array] = []

        def seen(each: Seen) -> None:
            if each.call.number in calls:
                wanted.extend(see(each))
            if self.is_last and each.call.number >= max(calls, default=0):
                raise _Seen

        with self._computing():
            with self._watch.seeing(seen), suppress(_Seen):
                result = [self._begin(index, self._state_of(index))][: not self.is_last]
            mx.eval(wanted, result)
        return result

    def weights(self) -> dict[str, mx.array]:
        """Return the weights that the segment reads, by name."""
        parameters = self._parameters()
        return {name: parameters[name] for name in self._reads}

    def _parameters(self) -> dict[str, mx.array]:
        from mlx.utils import tree_flatten

        return dict(cast("list[tuple[str, mx.array]]", tree_flatten(self._model.parameters())))

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
        given: list[Seen] = []

        def note(number: int, made: mx.array) -> mx.array:
            if number in calls:
                self._made[number] = made.shape, made.dtype
            return made

        def run(*primals: mx.array) -> mx.array:
            given.clear()
            added = dict(zip(self._made, primals, strict=False))
            before = None if state is None else primals[-1]
            with self._watch.seeing(given.append, lambda n, y: y + added[n] if n in added else y):
                result = self._begin(index, before)
            return result if after is not None else _surprise(result, index)

        with self._computing():
            if not self._made:  # of each sequence the same
                with self._watch.seeing(given.append, note):
                    self._result_dtype = self._begin(index, state).dtype
            toward = mx.array(1.0) if after is None else after[None].astype(self._result_dtype)
            zeros = (mx.zeros(shape, of) for shape, of in self._made.values())
            primals = [*zeros, *([] if state is None else [state])]
            _, gradients = mx.vjp(run, primals, [toward])
            seen = {each.call.number: each for each in given}
            wanted = [
                array
                for number, gradient in zip(self._made, gradients, strict=False)
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

    def _weight(self, name: str) -> mx.array:
        if name in self._replaced:
            return self._replaced[name]
        source = self._context.rows(self._weights[name])
        return self._shared(source.read(0, rows.count(source)).reshape(source.shape))

    def _shared(self, array: mx.array) -> mx.array:
        if self._device == "gpu":
            arrays.share(array)
        mx.eval(array)
        return array

    def _fill(self, path: Path, start: int, names: Iterable[str]) -> None:
        with path.open("r+b") as file, mx.stream(self._context.streams.get("cpu")):
            file.seek(start)
            for name in names:
                if name in self._replaced:
                    file.write(arrays.view(self._replaced[name]))
                    continue
                for block in rows.blocks(self._context.rows(self._weights[name])):
                    file.write(arrays.view(block))


def _check_tokens(tokens: Rows, vocabulary: int) -> None:
    """Refuse tokens that the model has no rows for: MLX would read beyond its arrays.

    Raises:
        BuildError: there is one.
    """
    ids = tokens.read(0, rows.count(tokens))
    each = [int(f(ids).item()) for f in (mx.min, mx.max)] if ids.size else []  # type: ignore[arg-type]
    if wrong := [number for number in each if not 0 <= number < vocabulary]:
        raise BuildError(
            f"the checkpoint's tokenizer makes token {wrong[-1]} of the text of [quality], and the "
            f"model has {vocabulary}. Is it the tokenizer of another model?"
        )


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


def _notes(split: Split) -> tuple[str, ...]:
    return (f"the model runs whole, not block by block: {split.whole}",) if split.whole else ()


def _let_go(model: Any) -> None:
    """Take a model's weights from it, whoever still has it."""
    for module in model.modules():
        module.clear()

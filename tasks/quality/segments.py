"""segments: a library's own model, run block by block, with the weights of one block at a time.

The library loads the model from a folder with its config.json and a weight file of holes: MLX
reads a tensor when it is evaluated, and those of other blocks never are. Then its own ``__call__``
runs, in which each block before the wanted one hands back a placeholder, so that the model's own
code makes masks and whatever else a block is given. What a block is given is what it would be
given in the whole model, and so are its results, to the bit.

A *segment* leads from one state to the next: from the tokens to what the first block is given, from
there to what the second is given, and so on; from the last block's result to the logits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from cache.digest import digest_record
from cache.records.manifests import TensorSpec
from cache.records.memos import Memos
from tasks.core.errors import ArchitectureError
from tasks.layouts import asking
from tasks.layouts.array_graph import ArrayGraph, hollow
from tasks.layouts.importing import importing
from tasks.layouts.libraries import LIBRARIES
from tasks.layouts.model import layer_names
from tasks.layouts.probe import inputs_reached
from tasks.layouts.safetensors_format import DTYPES
from tasks.quality.calls import Call, Seen, Watch
from tasks.tensors import arrays, mx

SCHEMA = 3  # of what is remembered of a model's segments
EMBEDDINGS, LOGITS = "embeddings", "logits"  # the names of the first segment and the last
STATE, PLACEHOLDER = "<state>", "<placeholder>"  # no parameter is called so


class CannotSplit(Exception):
    """A model whose blocks cannot be run one by one; it says why."""


class Segment(msgspec.Struct, frozen=True):
    """A part of a model that is run by itself.

    Attributes:
        name: the layer's, or ``embeddings`` or ``logits``.
        number: its place, from 0.
        reads: names of the tensors that it is made with.
        dtype: of the state that it leads to, for one sequence.
        shape: of the same: (1, tokens, width), of the last (1, tokens, vocabulary).
        calls: of modules, those that belong to it: each is seen in one segment, but for modules
            that several run.
    """

    name: str
    number: int
    reads: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    calls: tuple[Call, ...] = ()


class Split(msgspec.Struct, frozen=True):
    """A model's segments.

    Attributes:
        segments: in order; one, ``logits``, where the model can only run whole.
        whole: why it can only run whole; empty if it is split.
    """

    segments: tuple[Segment, ...]
    whole: str = ""


class Skeleton(NamedTuple):
    """What a model is loaded from.

    Attributes:
        library: whose class it is.
        config: config.json.
        tensors: dtype and shape of each tensor in the weight file, by name.
    """

    library: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]

    def load(self, fill: Callable[[Path, int], None] = lambda path, start: None) -> Any:
        """Return the library's model; its parameters are read when they are evaluated.

        Args:
            fill: writes the tensors' bytes, in order, into the weight file: its path, and where
                they begin. Without it, they are zero.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(self.config))
            start = _write_holes(folder / "model.safetensors", self.tensors)
            fill(folder / "model.safetensors", start)
            library = LIBRARIES[self.library]
            with importing(), _said_of(self.library, "be loaded"):
                model, _ = library.load(folder)
        return library.on_text(model)


@contextmanager
def _said_of(library: str, what: str) -> Iterator[None]:
    """Say what a library's model raises, which may be anything: its settings are a checkpoint's.

    Raises:
        ArchitectureError: it raises something.
    """
    try:
        yield
    except Exception as error:
        raise ArchitectureError(
            f"{library}'s model cannot {what} as config.json has it ({type(error).__name__}: "
            f"{error}). Take the checkpoint's own config.json, or leave out what wants the model "
            "to be run: a budget, a method, its quality."
        ) from error


class Run:
    """A model of which one segment is run.

    Attributes:
        model: the library's.
        inside: whether what runs is the segment's own: for others, what it is given is hollow.
    """

    def __init__(self, model: Any, segments: Sequence[Segment]) -> None:
        """Watch the blocks of a model.

        Args:
            model: the library's.
            segments: those that are known, in order: what lies before a block is made up of them.

        Raises:
            CannotSplit: it has no list of blocks, or one of them twice.
        """
        self.model = model
        self._segments = segments  # those that are known so far, while they are traced
        blocks = getattr(model, "layers", None)
        if not isinstance(blocks, list) or not blocks or not all(map(callable, blocks)):
            raise CannotSplit("it has no list of blocks")
        if len(set(map(id, blocks))) < len(blocks):
            raise CannotSplit("one of its blocks stands in several places")
        self.blocks = len(blocks)
        self._called = 0
        self._number = 0
        self._state: mx.array | None = None
        self.inside = True
        self.placeholders: list[mx.array] = []
        for index, block in enumerate(blocks):
            self._watch(block, index)

    def _watch(self, block: Any, index: int) -> None:
        kind = type(block)

        def call(module: Any, state: Any, *args: Any, **named: Any) -> Any:
            return self._block(lambda x: kind.__call__(module, x, *args, **named), index, state)

        object.__setattr__(block, "__class__", type(kind.__name__, (kind,), {"__call__": call}))

    def segment(self, number: int, tokens: mx.array, state: mx.array | None) -> mx.array:
        """Return the state that a segment leads to, not evaluated yet.

        Args:
            number: of the segment.
            tokens: (1, tokens).
            state: that it begins with; None for the first.

        Raises:
            CannotSplit: the model does not call its blocks one after another with one array.
        """
        self._called, self._number, self._state = 0, number, state
        self.inside = number == 0
        self.placeholders = []
        try:
            result = self.model(tokens)
        except _Reached as reached:
            result = reached.state
        else:
            if self._called != self.blocks:
                raise CannotSplit("it does not call each of its blocks")
        if not isinstance(result, mx.array):
            raise CannotSplit(f"what it hands on is no array, but {type(result).__name__}")
        return result

    def _block(self, run: Callable[[Any], Any], index: int, state: Any) -> Any:
        """Stand in for a block that the model calls with ``state``."""
        if index != self._called:
            raise CannotSplit("it calls its blocks in another order")
        self._called += 1
        if index == self._number:
            raise _Reached(state)
        if self._number == self.blocks + 1 and index == self.blocks - 1:
            self.inside = True
            return self._state
        if index < self._number - 1:
            segment = self._segments[index + 1]
            self.placeholders.append(hollow(mx, segment.dtype, segment.shape))
            return self.placeholders[-1]
        self.inside = True
        result = run(self._state)
        self.inside = False
        if index == self.blocks - 1:
            raise _Reached(result)
        return result


class _Reached(Exception):
    """The wanted state is there."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state


def split(memos: Memos, skeleton: Skeleton, length: int) -> Split:
    """Return the segments of a model that is run on sequences of ``length`` tokens.

    It is traced once: ``memos`` keeps the answer.

    Raises:
        ArchitectureError: its class cannot be run.
    """
    question = [
        SCHEMA,
        asking.versions(skeleton.library),
        digest_record(skeleton.config),
        digest_record([[n, s.dtype, list(s.shape)] for n, s in skeleton.tensors.items()]),
        length,
    ]
    answer = memos.get("segments", question, Split)
    if answer is None:
        with mx.stream(mx.cpu):
            answer = _split(skeleton, length)
        memos.put("segments", question, msgspec.to_builtins(answer))
    return answer


def _split(skeleton: Skeleton, length: int) -> Split:
    model = skeleton.load()
    tokens = mx.zeros((1, length), mx.int32)
    try:
        _check_is_as_stored(model, skeleton.tensors)
        return Split(tuple(_trace(model, tokens)))
    except Exception as error:  # whatever a model raises where it is run in parts
        cause = str(error) if isinstance(error, CannotSplit) else f"{type(error).__name__}: {error}"
    model = skeleton.load()
    seen: list[Seen] = []
    with _said_of(skeleton.library, f"be run on {length} tokens"), Watch(model).seeing(seen.append):
        logits = model(tokens)
    shape, dtype = tuple(logits.shape), arrays.dtype_name(logits)
    calls = tuple(each.call for each in seen)
    return Split((Segment(LOGITS, 0, tuple(skeleton.tensors), dtype, shape, calls),), cause)


def _trace(model: Any, tokens: mx.array) -> Iterator[Segment]:
    """Yield a model's segments, of which nothing is evaluated.

    Raises:
        CannotSplit: a segment is made of more than weights, tokens and the state before.
    """
    names = [name for name, _ in _parameters(model)]
    weights = {n: hollow(mx, arrays.dtype_name(a), a.shape) for n, a in _parameters(model)}
    model.load_weights(list(weights.items()), strict=False)
    segments: list[Segment] = []
    run, watch = Run(model, segments), Watch(model)
    layers = _block_names(model, names)
    known: set[tuple[str, bool]] = set()
    for number in range(len(layers) + 2):
        state = hollow(mx, segments[-1].dtype, segments[-1].shape) if segments else None
        seen: list[tuple[Seen, bool]] = []
        with watch.seeing(lambda each, seen=seen: seen.append((each, run.inside))):  # type: ignore[misc]
            result = run.segment(number, tokens, state)
        inputs = {**weights, **({} if state is None else {STATE: state})}
        inputs |= {f"{PLACEHOLDER}.{i}": each for i, each in enumerate(run.placeholders)}
        name = [EMBEDDINGS, *(name for _, name in layers), LOGITS][number]
        label = f"{layers[number - 1][0]}.result" if 0 < number <= len(layers) else "result"
        given = {f"{label}{each.call.number}": each.inputs for each, _ in seen}
        made_of = inputs_reached(mx, inputs, {**given, label: result})[0]
        reached = made_of.pop(label)
        if crossed := [each for each in reached if each.startswith(PLACEHOLDER)]:
            before = layers[int(crossed[0].rpartition(".")[2])][1]
            raise CannotSplit(f"{name} is given more than the block before makes, of {before}")
        reads = tuple(each for each in reached if each in weights)
        calls = _own_calls(seen, [*made_of.values()], {*reads, STATE}, known)
        segments.append(
            Segment(name, number, reads, arrays.dtype_name(result), tuple(result.shape), calls)
        )
        yield segments[-1]


def _own_calls(
    seen: Iterable[tuple[Seen, bool]],
    made_of: Iterable[Iterable[str]],
    here: Container[str],
    known: set[tuple[str, bool]],
) -> tuple[Call, ...]:
    """Return the calls that belong to a segment: given what is made of what it reads.

    Models do some work for all blocks at once, before the first. What a block reads of that is its
    own the first time.

    Args:
        seen: all calls while it ran, and whether each was inside of it.
        made_of: what each was given is made of.
        here: what the segment reads.
        known: what is called in the segments before, and whether to look up; extended.
    """
    own = [
        each.call
        for (each, inside), names in zip(seen, made_of, strict=True)
        if all(name in here for name in names)
        and weight_of(each.call.path) in here
        and (inside or (each.call.path, each.call.is_lookup) not in known)
    ]
    known.update((call.path, call.is_lookup) for call in own)
    return tuple(own)


def weight_of(path: str) -> str:
    """Return the name of a module's weight."""
    return f"{path}.weight" if path else "weight"


def _block_names(model: Any, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the path of each block, and the name of its layer."""
    layer_of = layer_names(list(names))
    path_of = {id(module): path for path, module in model.named_modules()}
    blocks = []
    for block in model.layers:
        path = path_of[id(block)]
        inside = next((name for name in names if name.startswith(f"{path}.")), None)
        if inside is None:
            raise CannotSplit(f"its block {path} has no weights")
        blocks.append((path, layer_of[inside]))
    if len({layer for _, layer in blocks}) < len(blocks):
        raise CannotSplit("several of its blocks are one layer")
    return blocks


def _check_is_as_stored(model: Any, tensors: Mapping[str, TensorSpec]) -> None:
    """Refuse a model whose parameters are not the very tensors of its weight file.

    Raises:
        CannotSplit: some are made of them as it is loaded.
    """
    parameters = dict(_parameters(model))
    if parameters.keys() != tensors.keys():
        raise CannotSplit("its parameters have other names than its weight file's tensors")
    graph = ArrayGraph(mx, parameters.values())
    for name, node in zip(parameters, graph.nodes, strict=True):
        if graph.operation(node) != "Load":
            raise CannotSplit(f"{name} is made of what its weight file holds as it is loaded")


def _parameters(model: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return list(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))


def _write_holes(path: Path, tensors: Mapping[str, TensorSpec]) -> int:
    """Write a safetensors file whose tensors are holes; return where the first begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for name, spec in tensors.items():
        header[name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    data = json.dumps(header, ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + at)
    return 8 + len(data)

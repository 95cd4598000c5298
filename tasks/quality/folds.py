"""folds: which modules' channels can be scaled, since those that make them can undo it.

A norm, or a linear layer, makes channels; other linear layers are given them. Where each of these
multiplies its columns by what the one's rows are divided by, the model is the same. Candidates are
told by the graph that MLX makes of a segment, whatever the architecture calls its modules: back
from what a module is given, over what neither adds to it nor bends it, to a parameter by which it
is multiplied, or to another module. Whether a candidate is one is tried before it is used: see
``fold_trials``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from cache.digest import digest_record
from cache.records.memos import Memos
from tasks.layouts import asking
from tasks.layouts.array_graph import SAME_NUMBERS, ArrayGraph, hollow
from tasks.quality import segments
from tasks.quality.calls import Seen, Watch
from tasks.quality.segments import STATE, Run, Segment, Skeleton, weight_of
from tasks.tensors import mx

SCHEMA = 1  # of what is remembered of a model's folds
# Operations of MLX by which channels stay in proportion to each source by itself; those that are
# compiled into one say only what they are made of.
_IN_PROPORTION = frozenset((
    *SAME_NUMBERS, "AsStrided", "BroadcastAxes", "Gather", "GatherAxis", "GatherMM",
    "Matmul", "Multiply",
))  # fmt: skip


class Fold(msgspec.Struct, frozen=True):
    """Channels that may be scaled.

    Attributes:
        source: what makes them: a module that is called, or a norm's parameter.
        scaled: names of the parameters whose rows are to be divided: the weight, the bias.
        inputs: paths of the modules that are given the channels, in the order of their calls.
        others: names of further parameters that may be, as they are of as many columns.
    """

    source: str
    scaled: tuple[str, ...]
    inputs: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def vectors(self) -> tuple[str, ...]:
        """Those of ``scaled`` that have one number a row: all but a module's weight."""
        return self.scaled[self.source != self.scaled[0] :]


class _Traced(NamedTuple):
    """A segment that was traced.

    Attributes:
        weights: the hollow parameters that it reads, by name.
        seen: what its modules are given.
        made: what they make, by the call's number.
        state: what the segment begins with; None of the first.
    """

    state: mx.array | None
    weights: Mapping[str, mx.array]
    seen: list[Seen]
    made: Mapping[int, mx.array]


def folds(memos: Memos, skeleton: Skeleton, length: int) -> dict[str, tuple[Fold, ...]]:
    """Return the candidates of each segment, by its name, for sequences of ``length`` tokens.

    It is traced once: ``memos`` keeps the answer.
    """
    question = [
        SCHEMA,
        segments.SCHEMA,
        asking.versions(skeleton.library),
        digest_record(skeleton.config),
        digest_record([[n, s.dtype, list(s.shape)] for n, s in skeleton.tensors.items()]),
        length,
    ]
    answer = memos.get("folds", question, dict[str, tuple[Fold, ...]])
    if answer is None:
        split = segments.split(memos, skeleton, length)
        with mx.stream(mx.cpu):  # where norms are products, not operations of their own
            traced = _trace(skeleton, split, length)
            answer = {s.name: tuple(_of_segment(s, t, split.segments)) for s, t in traced}
        memos.put("folds", question, msgspec.to_builtins(answer))
    return answer


def _trace(
    skeleton: Skeleton, split: segments.Split, length: int
) -> Iterator[tuple[Segment, _Traced]]:
    """Yield a model's segments, of which nothing is evaluated."""
    model = skeleton.load()
    weights = {name: hollow(mx, spec.dtype, spec.shape) for name, spec in skeleton.tensors.items()}
    model.load_weights(list(weights.items()), strict=False)
    tokens = mx.zeros((1, length), mx.int32)
    watch = Watch(model)
    run = None if split.whole else Run(model, split.segments)
    before: Segment | None = None
    for segment in split.segments:
        seen: list[Seen] = []
        made: dict[int, mx.array] = {}
        state = hollow(mx, before.dtype, before.shape) if before else None
        with watch.seeing(seen.append, _keep(made)):
            if run:
                run.segment(segment.number, tokens, state)
            else:
                model(tokens)
        own = {call.number for call in segment.calls}
        reads = {name: weights[name] for name in segment.reads}
        yield (
            segment,
            _Traced(state, reads, [each for each in seen if each.call.number in own], made),
        )
        before = segment


def _keep(made: dict[int, mx.array]) -> Callable[[int, mx.array], mx.array]:
    def keep(number: int, array: mx.array) -> mx.array:
        made[number] = array
        return array

    return keep


def _of_segment(segment: Segment, traced: _Traced, every: Iterable[Segment]) -> Iterator[Fold]:
    """Yield the candidates of a segment: norms first, each in the order of what is given it."""
    given = {} if traced.state is None else {STATE: traced.state}
    given.update(traced.weights)
    names, numbers = list(given), [each.call.number for each in traced.seen]
    count = len(names)
    graph = ArrayGraph(
        mx,
        [
            *given.values(),
            *(traced.made[number] for number in numbers),
            *(each.inputs for each in traced.seen),
        ],
    )
    parameter_of = dict(zip(graph.nodes, names, strict=False))
    path_of = {
        node: each.call.path for node, each in zip(graph.nodes[count:], traced.seen, strict=False)
    }
    sources: dict[str, dict[str, None]] = {}
    for each, node in zip(traced.seen, graph.nodes[count + len(numbers) :], strict=True):
        if not each.call.is_lookup:
            for source in _sources(graph, node, {**parameter_of, **path_of}):
                if source == STATE:
                    continue
                sources.setdefault(source, {})[each.call.path] = None
    called = {path for other in every for call in other.calls for path in [call.path]}
    once = _called_once(segment, every)
    parameters = _own_parameters(segment, every)
    for source, inputs in sorted(sources.items(), key=lambda item: item[0] in called):
        scaled = _scaled(source, traced.weights, source in called)
        consumed = {weight_of(path) for path in inputs}
        fine = once.issuperset(inputs) and parameters.issuperset((*scaled, *consumed))
        if scaled and fine and (source not in called or source in once) and source not in inputs:
            columns = {traced.weights[name].shape[-1] for name in consumed}
            others = tuple(
                name
                for name, array in traced.weights.items()
                if array.ndim > 1
                and array.shape[-1] in columns
                and name in parameters
                and name.rpartition(".")[0] not in called
            )
            yield Fold(source, scaled, tuple(inputs), others)


def _sources(graph: ArrayGraph, node: str, known: Mapping[str, str]) -> list[str]:
    """Return parameters and modules that an array's channels are in proportion to."""
    stack, seen = [node], {node}
    found: dict[str, None] = {}
    while stack:
        node = stack.pop()
        if node in known:
            found[known[node]] = None
            continue
        operation = graph.operation(node)
        if operation is None:
            continue
        given = graph.sources[graph.sources[node][0]]
        if operation == "Add":  # a bias, or the one that is added to a norm's weight
            variable = [each for each in given if not _is_parameter(graph, each, known)]
            given = given if len(variable) < len(given) else []
        elif operation not in _IN_PROPORTION and not operation.startswith("Compiled"):
            continue
        new = [each for each in given if each not in seen]
        seen.update(new)
        stack += reversed(new)
    return list(found)


def _is_parameter(graph: ArrayGraph, node: str, known: Mapping[str, str]) -> bool:
    """Tell whether an array is a parameter, or a number, moved at most, and made by no module."""
    while True:
        operation = graph.operation(node)
        if operation is None or operation == "StopGradient":  # as hollow ones are made
            return known.get(node) != STATE
        if node in known or operation not in SAME_NUMBERS:
            return False
        node = graph.sources[graph.sources[node][0]][0]


def _scaled(source: str, weights: Mapping[str, mx.array], is_called: bool) -> tuple[str, ...]:
    """Return the parameters of what makes channels, by row: a weight, and its bias if it has one.

    None if it is no such thing.
    """
    path, _, last = source.rpartition(".")
    if is_called:
        path, names = source, [weight_of(source)]
    elif weights[source].ndim == 1:
        names = [source]
    else:
        return ()
    bias = f"{path}.bias"
    if last == "bias" and weight_of(path) in weights and not is_called:
        return ()  # it goes with the weight
    if bias in weights and (is_called or last == "weight"):
        names.append(bias)
    return tuple(names)


def _called_once(segment: Segment, every: Iterable[Segment]) -> set[str]:
    calls = [call.path for other in every for call in other.calls]
    own = [call.path for call in segment.calls]
    return {path for path in own if calls.count(path) == 1}


def _own_parameters(segment: Segment, every: Iterable[Segment]) -> set[str]:
    """Return the parameters that no other segment reads."""
    others = {name for other in every if other.name != segment.name for name in other.reads}
    return set(segment.reads) - others

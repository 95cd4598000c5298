"""verify: makes layers of a built model anew from its source, and compares them to the byte.

What was built, by whom and how ever, says what it is in config.json: how each module is quantized.
With that and the source, mlx-make makes the same layers, and each tensor gets a verdict.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from blake3 import blake3
from msgspec import Struct

from cache.records.memos import Memos
from cache.store import Store
from tasks.checkpoints import adapter, sources
from tasks.checkpoints.adapter import Adapter
from tasks.checkpoints.source import Opening, ReadableSource
from tasks.checkpoints.stored import Stored
from tasks.core.spec import Target
from tasks.core.workspace import Workspace
from tasks.execution.builder import Builder
from tasks.execution.claim import Claim, Making, target_of
from tasks.execution.filling.draft import Drafts
from tasks.execution.log import Log
from tasks.execution.resources import DiskBudget, MemoryBudget, machine_memory
from tasks.execution.streaming.read_groups import needs_first
from tasks.execution.streaming.streaming import Streaming
from tasks.layouts.registry import is_read
from tasks.planning.node import Inputs, Node
from tasks.planning.plan import Plan, Planner
from tasks.stages import quantize_scheme, registry
from tasks.stages.stage import Key
from tasks.tensors import mx, rounding, rows

Word = Literal["equal", "rounding", "different"]
EQUAL, ROUNDING, DIFFERENT = get_args(Word)
SOME = 3  # layers that are made where not all are


class Verdict(Struct, frozen=True):
    """What a tensor is found to be.

    Attributes:
        tensor: its name.
        layer: the layer's name; "" of one that is of none.
        verdict: equal to the byte, equal but for rounding, or different.
        detail: how far, or how else it is different.
    """

    tensor: str
    layer: str
    verdict: Word
    detail: str = ""


class Verification(Struct, frozen=True):
    """The work of comparing a model with what its source makes.

    Attributes:
        claim: the model.
        plan: how it is made.
        layers: those that are made anew.
        folder: to work in.
    """

    claim: Claim
    plan: Plan
    layers: tuple[str, ...]
    folder: Path

    @classmethod
    def of(cls, claim: Claim, making: Making, folder: Path, *, whole: bool) -> Verification:
        """Plan it.

        Args:
            claim: the model.
            making: how it is said to be made.
            folder: to work in.
            whole: whether all layers are made.

        Raises:
            BuildError: it is no model that could be made of the source.
        """
        opening = Opening(is_read, Memos(folder / "memos"), str(folder))

        def open_source(target: Target) -> ReadableSource:
            return sources.open_source(target.source, opening)

        def read_adapter(target: Target) -> Adapter:
            assert target.adapter is not None
            opened = sources.open_source(target.adapter, opening)
            return adapter.read(opened, Store.at(folder / "adapter"), target.adapter_name or "")

        planner = Planner(
            opening.memos, open_source, lambda target, opened: None, making.quality,
            read_adapter=read_adapter,
        )  # fmt: skip
        plan = planner.plan(target_of(claim, making, planner))
        layers = [node.layer for node in plan.last]
        if not whole and len(layers) > SOME:
            held = plan.shared.layers
            small = [layer for layer in layers if layer not in plan.shared.large]
            small = [layer for layer in small if len(held[layer]) > 1] or small  # no lone norm
            layers = [small[i * (len(small) - 1) // (SOME - 1)] for i in range(SOME)]
        return cls(claim, plan, tuple(layers), folder)

    @property
    def all_layers(self) -> int:
        """How many layers the model has."""
        return len(self.plan.last)

    def verdicts(self) -> Iterator[Verdict]:
        """Yield a verdict on each tensor that is looked at; first on those that are amiss."""
        specs = {
            name: spec for node in self.plan.last for name, spec in node.output_specs().items()
        }
        claimed = self.claim.checkpoint.stored
        for name in sorted(specs.keys() | claimed.keys()):
            if name not in claimed:
                yield Verdict(name, "", DIFFERENT, "it is missing")
            elif name not in specs:
                yield Verdict(name, "", DIFFERENT, "nothing of the source becomes it")
            elif (spec := (claimed[name].dtype, claimed[name].shape)) != tuple(specs[name]):
                detail = f"it is {_spec(*spec)}, and {_spec(*specs[name])} of the source"
                yield Verdict(name, "", DIFFERENT, detail)
        with ExitStack() as stack:
            made: set[Node] = set()
            # What a layer is rounded by comes of all those before it: that stays meanwhile.
            together = stack.enter_context(_building(self.folder)) if self.runs else None
            for node in self.plan.last:
                if node.layer not in self.layers:
                    continue
                if together:
                    _make(together, self.plan, node, made)
                    yield from self._layer(node, together)
                    continue
                with _building(self.folder) as builder:
                    _make(builder, self.plan, node, set())
                    yield from self._layer(node, builder)

    @property
    def runs(self) -> bool:
        """Whether the model is run for it, on the text that its weights were rounded on."""
        quantize = self.plan.target.quantize
        return bool(quantize and quantize.method)

    def _layer(self, node: Node, builder: Builder) -> Iterator[Verdict]:
        """Yield a verdict on each tensor of a layer that is made."""
        tensors = builder.manifest(self.plan, node).tensors
        outputs = node.as_inputs(tensors)
        equal = {
            key.name: self._is_equal(builder, outputs, key)
            for key in outputs
            if self._is_comparable(key.name, outputs)
        }
        settings = self.plan.model.settings
        parts = {p: w for w, s in settings.items() for p in quantize_scheme.parts(w, s)}
        details: dict[str, tuple[Word, str]] = {}
        for tensor, is_equal in equal.items():
            if is_equal:
                yield Verdict(tensor, node.layer, EQUAL)
                continue
            weight = parts.get(tensor)
            if weight is None or not all(
                part in equal for part in quantize_scheme.parts(weight, settings[weight])
            ):
                verdict, detail = self._bytes(builder, outputs, tensor)
            else:
                if weight not in details:
                    details[weight] = self._weight(builder, node, outputs, weight)
                verdict, detail = details[weight]
            yield Verdict(tensor, node.layer, verdict, detail)

    def _is_comparable(self, name: str, outputs: Inputs) -> bool:
        stored = self.claim.checkpoint.stored.get(name)
        ours = next(tensor for key, (_, tensor) in outputs.items() if key.name == name)
        return stored is not None and (stored.dtype, stored.shape) == (ours.dtype, ours.shape)

    def _is_equal(self, builder: Builder, outputs: Inputs, key: Key) -> bool:
        # By a digest for which nobody can make other bytes.
        parts = builder.locate(self.plan, outputs, key)
        ours = _blake3(builder.store.blobs.chunks(parts))
        return ours == _blake3(self._read(key.name))

    def _read(self, name: str) -> Iterator[bytes]:
        checkpoint = self.claim.checkpoint
        stored = checkpoint.stored[name]
        return checkpoint.source.read(stored.file, stored.offset, stored.nbytes)

    def _claimed(self, name: str) -> _Claimed:
        stored = self.claim.checkpoint.stored[name]
        return _Claimed(stored, b"".join(map(bytes, self._read(name))))

    def _bytes(self, builder: Builder, outputs: Inputs, name: str) -> tuple[Word, str]:
        """Say how far a tensor is that is not quantized."""
        key = next(key for key in outputs if key.name == name)
        ours, theirs = builder.rows(self.plan, outputs, key), self._claimed(name)
        count, first, most = 0, None, 0.0
        columns = ours.shape[-1] if ours.shape else 1
        for start, stop in rows.spans(ours, rows.BLOCK_BYTES):
            one, other = (each.read(start, stop) for each in (ours, theirs))
            where = (one != other) & ~(mx.isnan(one) & mx.isnan(other))
            differing = int(mx.sum(where))
            if differing and first is None:
                first = start * columns + int(mx.argmax(where.reshape(-1)))
            count += differing
            apart = mx.abs(one.astype(mx.float32) - other.astype(mx.float32))
            most = max(most, float(mx.max(mx.where(where, apart, 0)))) if differing else most
        if first is None:
            return DIFFERENT, "in bits that are no matter, such as a zero's sign"
        at = _place(first, ours.shape)
        of = f"{count:,} of {prod(ours.shape):,} numbers"
        return DIFFERENT, f"{of}, the first at {at}, by at most {most:.3g}"

    def _weight(
        self, builder: Builder, node: Node, outputs: Inputs, weight: str
    ) -> tuple[Word, str]:
        """Say how far a quantized weight is, and whether it is as near to the original as ours."""
        setting = self.plan.model.settings[weight]
        names = quantize_scheme.parts(weight, setting)
        keys = {key.name: key for key in outputs}
        inputs = builder.inputs(self.plan, node)
        original = next(
            builder.rows(self.plan, inputs, key) for key in inputs if key.name == weight
        )
        ours = [builder.rows(self.plan, outputs, keys[name]) for name in names]
        theirs = [self._claimed(name) for name in names]
        count, first, most, is_tie = 0, None, 0.0, True
        columns = original.shape[-1]
        for start, stop in rows.spans(original, rows.BLOCK_BYTES):
            block = rounding.compare(
                original.read(start, stop),
                [part.read(start, stop) for part in ours],
                [part.read(start, stop) for part in theirs],
                setting._asdict(),
            )
            if block.count and first is None:
                first = start * columns + block.first
            count, most = count + block.count, max(most, block.most)
            is_tie = is_tie and block.is_tie
        if first is None:
            return ROUNDING, "in scales or biases, and no weight is another for it"
        of = f"{count:,} of {prod(original.shape):,} weights"
        at = _place(first, original.shape)
        if is_tie and not self.runs:  # which does not round to what is nearest
            return ROUNDING, f"{of}, each as near to the original as ours, by at most {most:.3g}"
        return DIFFERENT, f"{of}, the first at {at}, by at most {most:.3g}"


class _Claimed(Struct, frozen=True):
    """A tensor of the model that is verified, as ``rows.Rows``."""

    stored: Stored
    data: bytes
    unit: int = 1

    @property
    def dtype(self) -> str:
        """As MLX spells it."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.stored.shape

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``: (stop - start, columns)."""
        columns = self.shape[-1] if self.shape else 1
        row = len(self.data) // max(1, rows.count(self))
        data = np.frombuffer(self.data, np.uint8)[start * row : stop * row]
        return mx.array(data).view(getattr(mx, self.dtype)).reshape(stop - start, columns)


def _blake3(pieces: Iterable[bytes | memoryview]) -> bytes:
    state = blake3()
    for piece in pieces:
        state.update(piece)
    return bytes(state.digest())


def worst(verdicts: Iterable[Verdict]) -> Word:
    """Return what is to be said of all together."""
    words = {verdict.verdict for verdict in verdicts}
    return next(word for word in (DIFFERENT, ROUNDING, EQUAL) if word in words or word == EQUAL)


def _place(index: int, shape: Sequence[int]) -> list[int]:
    """Return where in an array an element is, that is counted through it."""
    at: list[int] = []
    for length in reversed(shape):
        index, rest = divmod(index, length)
        at.insert(0, rest)
    return at


def _spec(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {'×'.join(map(str, shape)) or 'scalar'}"


@contextmanager
def _building(folder: Path) -> Iterator[Builder]:
    """Give what makes layers, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield _builder(Path(name))


def _builder(folder: Path) -> Builder:
    store = Store.at(folder / "cache")
    return Builder(
        store,
        Workspace(folder),
        Log(folder / "log.jsonl"),
        uuid.uuid4().hex[:8],
        # What is read again while it is compared; all goes with the folder.
        frozenset({*registry.leaves(), registry.roles().unquantized}),
        MemoryBudget(machine_memory() // 2),
        Drafts(store.blobs, lambda target: False, folder / "drafts"),
        Streaming(store, DiskBudget(), drops=False),
    )


def _make(builder: Builder, plan: Plan, node: Node, made: set[Node]) -> None:
    """Run a node, and before it what it needs, but for what is ``made``: each once."""
    for each in needs_first([node]):
        if each not in made:
            builder.run(plan, each, "it is verified")
            made.add(each)

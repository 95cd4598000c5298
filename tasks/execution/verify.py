"""verify: makes layers of a built model anew from its source, and compares them to the byte.

What was built, by whom and how ever, says what it is in config.json: how each module is quantized.
With that and the source, mlx-make makes the same layers, and each tensor gets a verdict.
"""

from __future__ import annotations

import glob
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from blake3 import blake3
from msgspec import Struct, structs

from cache.records.memos import Memos
from cache.store import Store
from tasks.checkpoints import loaders, sources
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.source import Opening, ReadableSource
from tasks.checkpoints.stored import Stored
from tasks.core.errors import ArchitectureError, ConfigError
from tasks.core.spec import (
    Dtype,
    LayoutName,
    Mode,
    Quality,
    Quantize,
    Rule,
    Size,
    SourceName,
    SourceSpec,
    Target,
)
from tasks.core.workspace import Workspace
from tasks.execution.builder import Builder
from tasks.execution.filling.draft import Drafts
from tasks.execution.log import Log
from tasks.execution.resources import DiskBudget, MemoryBudget, machine_memory
from tasks.execution.streaming.streaming import Streaming
from tasks.layouts.libraries import LIBRARIES
from tasks.layouts.model import Model
from tasks.layouts.registry import LAYOUTS, is_read
from tasks.planning.node import Inputs, Node
from tasks.planning.plan import Plan, Planner
from tasks.stages import quantize_scheme, registry
from tasks.stages.rules import holder_of
from tasks.stages.stage import FLOATING, Key
from tasks.tensors import mx, rounding, rows

Word = Literal["equal", "rounding", "different"]
EQUAL, ROUNDING, DIFFERENT = get_args(Word)
# Whose models say in config.json how each module is quantized; files of all have the same names.
LAYOUT, *OTHERS = map(LayoutName, LIBRARIES)
TARGET = "model"  # in a folder of its own
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


class Claim(Struct, frozen=True):
    """A built model, which says of itself how it is quantized.

    Attributes:
        name: of the built model, for people.
        checkpoint: the built model, as a checkpoint.
    """

    name: str
    checkpoint: Checkpoint

    @classmethod
    def open(cls, spec: SourceSpec, name: str, folder: Path) -> Claim:
        """Open a built model.

        Args:
            spec: where it is.
            name: for people.
            folder: to work in.

        Raises:
            BuildError: there is none.
        """
        memos = Memos(folder / "memos")
        opened = sources.open_source(spec, Opening(is_read, memos, str(folder)))
        if not opened.names(LAYOUTS[LAYOUT].loaded):
            for other, layout in LAYOUTS.items():
                if opened.names(layout.loaded):
                    raise ConfigError(
                        f"{name} is of layout {other}, which does not say how each module is "
                        f"quantized: only a model of layout {' or '.join((LAYOUT, *OTHERS))} can "
                        "be verified. Build it anew of its source, and compare the files."
                    )
        return cls(name, loaders.read(opened, None, memos, named=name))


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
    def of(
        cls, claim: Claim, source: SourceSpec, source_name: str, folder: Path, *, whole: bool
    ) -> Verification:
        """Plan it.

        Args:
            claim: the model.
            source: what it is said to be made from.
            source_name: the same, for people.
            folder: to work in.
            whole: whether all layers are made.

        Raises:
            BuildError: it is no model that could be made of the source.
        """
        memos = Memos(folder / "memos")

        def open_source(target: Target) -> ReadableSource:
            return sources.open_source(target.source, Opening(is_read, memos, str(folder)))

        planner = Planner(memos, open_source, lambda target, opened: None, Quality())
        plan = planner.plan(_target(claim, source, source_name, planner))
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
        for node in self.plan.last:
            if node.layer in self.layers:
                yield from self._layer(node)

    def _layer(self, node: Node) -> Iterator[Verdict]:
        """Make a layer, in a folder that goes with it, and yield a verdict on each tensor."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            builder = _builder(Path(name))
            _make(builder, self.plan, node)
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
        if is_tie:
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


def _target(claim: Claim, source: SourceSpec, source_name: str, planner: Planner) -> Target:
    """Return the target that makes the model, by what it says of itself.

    Raises:
        BuildError: it says nothing that could be made.
    """
    checkpoint = claim.checkpoint
    said = checkpoint.config.get("quantization")
    shard_bytes = Size(LAYOUTS[LAYOUT].default_shard_bytes)
    asked = Target(
        name=TARGET,
        source=source,
        source_name=SourceName(source_name),
        max_shard_bytes=shard_bytes,
        dtype=_dtype(checkpoint),
        where=claim.name,
    )
    target = structs.replace(asked, layout=_layout(claim, asked, planner))
    if said is None:
        return target
    rules = _rules(planner.share(target).model, checkpoint, said, target.dtype)
    mode = said.get("mode", "affine")
    _check_mode(claim, mode)
    quantize = Quantize(said.get("bits"), said.get("group_size"), mode, rules=tuple(rules))
    return structs.replace(target, quantize=quantize)


def _layout(claim: Claim, target: Target, planner: Planner) -> LayoutName:
    """Return the layout that has the model's tensors, or the one of which it has the fewest others.

    Raises:
        BuildError: nothing is made of the source in any.
    """
    stored = claim.checkpoint.stored
    names = {name for name in stored if not name.endswith((".scales", ".biases"))}
    unlike: dict[LayoutName, int] = {}
    errors = []
    for layout in (LAYOUT, *OTHERS):
        try:
            model = planner.share(structs.replace(target, layout=layout)).model
        except ArchitectureError as error:
            errors.append(error)
            continue
        unlike[layout] = len(names ^ model.parameters.keys())
        if not unlike[layout]:
            break
    if not unlike:
        raise errors[0]
    return min(unlike, key=lambda layout: unlike[layout])


def _rules(
    model: Model, checkpoint: Checkpoint, said: Mapping[str, Any], usual: Dtype | None
) -> Iterator[Rule]:
    """Yield a rule for each module that could be quantized, or is of another dtype than usual."""
    dtypes: dict[str, set[str]] = {m.path: set() for m in model.modules if m.quantized_names}
    can = {*dtypes}
    for parameter in (each for each in model.parameters.values() if each.castable):
        path = holder_of(parameter.name)
        found = (checkpoint.stored.get(name) for name in (parameter.name, f"{path}.scales"))
        dtypes.setdefault(path, set()).update(each.dtype for each in found if each is not None)
    for path, kinds in dtypes.items():
        rule = _rule(path, checkpoint, said) if path in can else None
        floats = [dtype for dtype in get_args(Dtype) if dtype in kinds]
        if len(floats) == 1 and floats != [usual]:
            (dtype,) = floats
            rule = (
                structs.replace(rule, dtype=dtype) if rule else Rule(glob.escape(path), dtype=dtype)
            )
        if rule:
            yield rule


def _rule(path: str, checkpoint: Checkpoint, said: Mapping[str, Any]) -> Rule:
    """Return the rule that quantizes a module as the model has it."""
    match = glob.escape(path)
    own = said.get(path)
    if f"{path}.scales" not in checkpoint.stored:
        return Rule(match, skip=True)
    setting = own if isinstance(own, Mapping) else said
    mode = setting.get("mode", said.get("mode", "affine"))
    return Rule(match, setting.get("bits"), setting.get("group_size"), mode)


def _check_mode(claim: Claim, mode: object) -> None:
    if mode not in get_args(Mode):
        raise ConfigError(
            f"{claim.name} is quantized in mode {mode!r}, which is none that mlx-make makes: "
            f"{', '.join(get_args(Mode))}."
        )


def _dtype(checkpoint: Checkpoint) -> Dtype | None:
    """Return what most of a model's tensors that are not quantized were cast to."""
    dtypes = [t.dtype for t in checkpoint.stored.values() if t.dtype in FLOATING]
    if not dtypes:
        return None
    (most, _), *_ = Counter(dtypes).most_common(1)
    return most if most in get_args(Dtype) else None  # type: ignore[return-value]


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


def _make(builder: Builder, plan: Plan, node: Node) -> None:
    for need in node.needs:
        _make(builder, plan, need)
    builder.run(plan, node, "it is verified")

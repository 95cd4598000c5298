"""node_context: what a stage may do while one node runs, by what the builder is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

from cache.blobs import Blobs, Part, Writer
from cache.digest import digest_parts
from cache.errors import BlobLost
from cache.records.manifests import Tensor
from cache.records.memos import Memos
from cache.store import Store
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.spec import Target
from tasks.execution.filling.draft import WeightFileDraft
from tasks.execution.read_ahead import Made, ReadAhead, Reading
from tasks.execution.streaming.streaming import Streaming
from tasks.layouts.model import Model
from tasks.planning.node import Inputs, Known, Node
from tasks.planning.plan import Plan
from tasks.stages.stage import Key, Result, Stage, TargetModel
from tasks.tensors import arrays, rows
from tasks.tensors.rows import Rows

T = TypeVar("T")


class Maker(Protocol):
    """What a node's context asks of the builder that runs the node: see ``Builder``."""

    store: Store
    streaming: Streaming
    ahead: ReadAhead
    streams: arrays.Streams
    answers: dict[Hashable, Any]
    once_lock: threading.Lock

    def keeps(self, plan: Plan, stage: Stage[Any]) -> bool:
        """Tell whether a stage's results are kept; what is not is made again as it is read."""

    def passes(self, plan: Plan) -> bool:
        """Tell whether what a target is made of comes from elsewhere, and is then dropped."""

    def begin_draft(self, plan: Plan) -> WeightFileDraft | None:
        """Return the draft of a target's weight files, begun unless it is already."""

    def rows(
        self, plan: Plan, inputs: Inputs, key: Key, makers: dict[Node, NodeContext] | None = None
    ) -> Rows:
        """Return a tensor to read: from the store, or made again from what it was made of."""

    def locate(self, plan: Plan, inputs: Inputs, key: Key) -> list[Part]:
        """Return where the bytes of a tensor lie that is kept, made again if they are lost."""

    def fetch(self, plan: Plan, inputs: Inputs, keys: Iterable[Key]) -> None:
        """Fetch the blobs of inputs that only a remote has, all at once."""


class NodeContext:
    """What a stage may do while one node runs: see ``stages.stage.Context``."""

    def __init__(
        self,
        builder: Maker,
        plan: Plan,
        node: Node,
        inputs: Inputs,
        makers: dict[Node, NodeContext] | None = None,
        made: Made | None = None,
    ) -> None:
        """Return the context of a node.

        Args:
            builder: runs it.
            plan: the target.
            node: the node.
            inputs: what it reads.
            makers: see ``Builder.rows``.
            made: what was made for it before; None, nothing is to be made for others meanwhile.
        """
        self._made = made
        self._known: Known = {}
        self._builder = builder
        self._plan = plan
        self._node = node
        self._inputs = inputs
        self._makers = {} if makers is None else makers
        self.target: Target = plan.target
        self.checkpoint: Checkpoint = plan.checkpoint
        self.model: Model = plan.shared.model
        self.planned: TargetModel = plan.model
        self.blobs: Blobs = builder.store.blobs
        self.memos: Memos = builder.store.memos
        self.streams: arrays.Streams = builder.streams
        self.keeps: bool = builder.keeps(plan, node.stage)

    @cached_property
    def tensors(self) -> dict[Key, Tensor]:
        """What the node reads."""
        return {key: tensor for key, (_, tensor) in self._inputs.items()}

    def rows(self, key: Key) -> Rows:
        """Return an input to read."""
        return self._builder.rows(self._plan, self._inputs, key, self._makers)

    def parts(self, key: Key) -> list[Part]:
        """Return where the bytes of an input lie, checked; it is made again first if it is lost.

        Raises:
            BlobLost: they are not those of its digest.
        """
        parts = self._builder.locate(self._plan, self._inputs, key)
        digest = self._inputs[key].tensor.digest
        if digest_parts(self.blobs.chunks(parts)) != digest:
            raise BlobLost(digest, "its bytes are others")
        return parts

    def fetch(
        self, keys: Sequence[str], known: Mapping[str, str], *, reread: bool
    ) -> dict[str, str]:
        """Have the cache hold stored tensors whose bytes come from elsewhere."""
        if not keys and not known:
            return {}
        return self._builder.streaming.fetch(self.checkpoint, keys, known, reread=reread)

    def pass_on(self, key: Key) -> Tensor:
        """Return an input as it is; from now on the cache has its bytes.

        Of a checkpoint that only passes, in their place in a weight file, where there is a draft.
        """
        _, tensor = self._inputs[key]
        packed = self._node in self._plan.packed and self._builder.passes(self._plan)
        if packed and (moved := self._move(key, tensor)):
            return moved
        if self.blobs.has(tensor.digest, tensor.nbytes):
            return tensor
        return rows.digest(self.blobs, self.rows(key), keep=True)

    def made(self, key: Key) -> Result | None:
        """Return what was made of an input while it was read before, if anything was."""
        digest, result = self._made.results.get(key, ("", None)) if self._made else ("", None)
        return result if digest == self._inputs[key].tensor.digest else None

    def read(self, name: str, view: Rows) -> Tensor:
        """Read all of an output that is made as it is read."""
        if isinstance(view, rows.Stored):
            return rows.digest(self.blobs, view, keep=self.keeps)
        tensor = Tensor(view.dtype, view.shape, "")
        writing = self.blobs.writing(tensor.nbytes) if self.keeps else nullcontext(Writer(None))
        with writing as writer:
            reading = Reading(view, writer.write, self._builder.ahead.watch)
            note = self._make_ahead(name, reading)
            reading.finish()
        if note:
            note(writer.digest)
        return replace(tensor, digest=writer.digest)

    def _make_ahead(self, name: str, reading: Reading) -> Callable[[str], None] | None:
        """Have others make what they make of an output; return what takes note of that."""
        ahead = self._builder.ahead
        if self._made is None:
            return None
        reader = ahead.reader(self._plan, self._node, name, self._known)
        if reader is None:
            return None
        node, key = reader
        context = NodeContext(self._builder, self._plan, node, {}, made=Made())
        return ahead.make(node, key, reading, context)

    def writer(self, name: str, nbytes: int) -> AbstractContextManager[Writer]:
        """Give a writer for an output: into its place in a weight file, where there is a draft."""
        draft = None
        if self._node in self._plan.packed:
            draft = self._builder.begin_draft(self._plan)
        return draft.writing(name) if draft else self.blobs.writing(nbytes)

    def _move(self, key: Key, tensor: Tensor) -> Tensor | None:
        """Have an input's bytes in their place in a weight file; None if there is no such place."""
        draft = self._builder.begin_draft(self._plan)
        if draft is None:
            return None
        source, there = self.rows(key), draft.place(key.name).part
        if not isinstance(source, rows.Stored) or source.parts != [there]:
            with draft.writing(key.name) as writer:
                for data in rows.pieces(source):
                    writer.write(data)
            if writer.digest != tensor.digest:
                raise BlobLost(tensor.digest, "its bytes are others")
            self.blobs.refer(tensor.digest, [there])
        return tensor

    def prefetch(self, keys: Iterable[Key]) -> None:
        """Fetch inputs that only a remote store has, all at once."""
        self._builder.fetch(self._plan, self._inputs, keys)

    def verify(self, keys: Iterable[Key]) -> None:
        """Forget where inputs lie whose bytes no longer match their digests."""
        for key in keys:
            self.blobs.drop_if_wrong(self._inputs[key].tensor.digest)

    def once(self, question: Hashable, work: Callable[[], T]) -> T:
        """Return what ``work`` returns for a question; it is called once in a run of the build."""
        with self._builder.once_lock:
            if question not in self._builder.answers:
                self._builder.answers[question] = work()
            answer: T = self._builder.answers[question]
            return answer

"""builder: runs one node: looks its action up, or computes it, and publishes what it made.

Leaves first: blobs, then the action cache's entry, then the manifest that the build tool sees,
so that whoever finds a record finds what it speaks of.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cache.blobs import Part
from cache.errors import BlobLost, FileChanged
from cache.records.actions import Corrupt, Hit, Miss
from cache.records.manifests import Action, Manifest, ManifestError, Tensor, TensorSpec
from cache.store import Store
from tasks.checkpoints import headers
from tasks.checkpoints.source import is_pinned
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.workspace import Workspace
from tasks.execution.contents import Contents
from tasks.execution.crew import Crew, Locate
from tasks.execution.filling.draft import Drafts, WeightFileDraft
from tasks.execution.log import Entry, Log, Trace
from tasks.execution.manifest_files import ManifestFiles
from tasks.execution.node_context import NodeContext
from tasks.execution.read_ahead import Made, ReadAhead
from tasks.execution.resources import MemoryBudget
from tasks.execution.streaming.hashed_files import HashedFiles
from tasks.execution.streaming.streaming import Streaming
from tasks.planning import bundle, sizes
from tasks.planning.node import Inputs, Node
from tasks.planning.plan import Plan
from tasks.stages import reasons
from tasks.stages.stage import Keep, Key, LeafStage, Stage
from tasks.tensors import arrays, mx, rows
from tasks.tensors.device import default_to_cpu
from tasks.tensors.rows import Rows

MOST_LOST = 100  # inputs of one action that are found to be wrong, one at a time


def _not_kept(builder: Builder, plan: Plan, node: Node) -> Iterator[Node]:
    """Yield the nodes that are made again whenever ``node`` reads them."""
    for need in node.needs:
        if not builder.keeps(plan, need.stage):
            yield need
            yield from _not_kept(builder, plan, need)


@dataclass
class Builder:
    """Runs nodes. One for each invocation; safe in threads.

    Attributes:
        store: the cache.
        workspace: where things lie beside models.toml.
        log: the build log.
        run_id: of this invocation.
        keep: stages whose results are kept, besides those that always are; None, by default.
        memory: the limit on what actions hold at once.
        drafts: weight files of what is to be packed.
        streaming: fetches what comes from elsewhere, and drops it.
        crew: other machines that make what is not on record, if there are any.
        hashed: holds files that a hub's client has here against what the hub says.
        streams: MLX's, of each thread.
        computed: keys of the actions that were run.
        answers: what stages worked out once, by the question.
        once_lock: held while they do.
        lists: targets whose results a remote was asked for, all at once.
        lists_lock: held while it is.
        ahead: what was made for nodes that have not run.
        threads: numbers of those that actions ran in, as the system has them.
        files: manifests of the workspace.
    """

    store: Store
    workspace: Workspace
    log: Log
    run_id: str
    keep: frozenset[str] | None
    memory: MemoryBudget
    drafts: Drafts
    streaming: Streaming
    crew: Crew | None = None
    hashed: HashedFiles = field(default_factory=HashedFiles)
    streams: arrays.Streams = field(default_factory=arrays.Streams)
    computed: set[str] = field(default_factory=set)
    answers: dict[Hashable, Any] = field(default_factory=dict)
    once_lock: threading.Lock = field(default_factory=threading.Lock)
    lists: set[str] = field(default_factory=set)
    lists_lock: threading.Lock = field(default_factory=threading.Lock)
    threads: set[int] = field(default_factory=set)
    files: ManifestFiles = field(default_factory=ManifestFiles)
    ahead: ReadAhead = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing made ahead."""
        self.ahead = ReadAhead(self.workspace, self.drafts.packs, self.store.blobs.meter)

    def context(self, plan: Plan, node: Node, inputs: Inputs) -> NodeContext:
        """Return what the node's stage may do."""
        return NodeContext(self, plan, node, inputs)

    def run(self, plan: Plan, node: Node, why: str) -> Manifest:
        """Bring a node's manifest up to date, and return it.

        Raises:
            BuildError: it cannot be made.
        """
        path = Path(node.manifest_path(self.workspace))
        with self.logged(node.name, why) as record:
            record["made"] = self.ahead.take(node)
            manifest, record["outcome"] = self._run(plan, node, record)
            old = Manifest.at(path)
            explain = node.stage.explain
            if old and (changes := reasons.between(old.action, manifest.action, explain)):
                first = [why] if node.is_leaf else []  # which file changed
                record["why"] = "; ".join([*first, reasons.joined(changes)])
            self.files.write(path, manifest)
        return manifest

    @contextmanager
    def logged(self, task: str, why: str) -> Iterator[dict[str, Any]]:
        """Add a line to the build log for what the block does.

        It sets ``outcome``; and ``trace``, if another machine did it; and ``made``, what was made
        for it before.
        """
        record: dict[str, Any] = {"outcome": "failed", "why": why}
        start, meter = time.time(), self.store.blobs.meter
        read = meter.read
        spent = self.ahead.watch()
        try:
            yield record
        except BaseException:
            record["outcome"] = "failed"
            raise
        finally:
            made: Made = record.get("made") or Made()
            own = spent().plus(made.spent)
            trace = record.get("trace") or Trace(
                "",
                threading.current_thread().name,
                start,
                own.seconds,
                meter.read - read,
                own.written,
            )
            self._log(Entry.of(self.run_id, task, record["outcome"], record["why"], trace))

    def _log(self, entry: Entry) -> None:
        try:
            self.log.add(entry)
        except OSError as error:  # no build fails for its log
            print(f"warning: {self.log.path} is not written: {error.strerror}", file=sys.stderr)

    def manifest(self, plan: Plan, node: Node) -> Manifest:
        """Return what a node made; it is made again if its record is lost or damaged."""
        wanted = (node.stage.name, node.stage.version, node.params.record)
        try:
            manifest = self.files.read(node.manifest_path(self.workspace))
            action = manifest.action
            if (action.stage, action.version, action.params) == wanted:
                return manifest
            why = "its manifest is of other settings"
        except (FileNotFoundError, ManifestError) as error:
            why = f"its manifest is damaged: {error}"
        return self.run(plan, node, why)

    def inputs(self, plan: Plan, node: Node) -> Inputs:
        """Return the tensors that a node reads, and the nodes that made them."""
        return node.inputs({need: self.manifest(plan, need) for need in node.needs})

    def _run(self, plan: Plan, node: Node, record: dict[str, Any]) -> tuple[Manifest, str]:
        if self.crew and (brought := self.crew.delivered(node)):
            record["trace"] = brought.trace
            return brought.manifest, brought.outcome
        if node.is_leaf:
            return self._run_leaf(plan, node, record)
        inputs = self.inputs(plan, node)
        action = node.action(inputs)
        entry, outcome = self.find(plan, action, node.output_specs())
        if isinstance(entry, Hit):
            return entry.manifest, outcome
        made = self._made_elsewhere(plan, node, record)
        if made and made[0].action == action:
            return made
        ahead: Made | None = None if self.crew else record["made"]
        nodes = [node] if ahead is None else [node, *self.ahead.nodes(plan, node)]
        with self._working(plan, nodes, action.key):
            meanwhile = self.store.actions.get(action)
            if isinstance(meanwhile, Hit):
                return meanwhile.manifest, "reused"
            self.fetch(plan, inputs, sizes.reads(node, self.kept(plan)))
            manifest = self._make(plan, node, inputs, ahead)
            if isinstance(entry, Corrupt):
                note = f"{entry.path} was corrupt ({entry.cause}); it is made again"
                manifest = replace(manifest, notes=(*manifest.notes, note))
            self.store.actions.put(manifest)
        if self.store.sharing:
            self.store.sharing.push(manifest, self.shared(plan, node))
        return manifest, "computed"

    def _run_leaf(self, plan: Plan, node: Node, record: dict[str, Any]) -> tuple[Manifest, str]:
        """Find out what a leaf reads, which is what it makes: the digests of its tensors."""
        if self.crew:
            if known := self.recall(plan, node):
                return known, "reused"
            pinned = is_pinned(plan.checkpoint.source)
            if pinned and (made := self._made_elsewhere(plan, node, record)):
                return made  # else only what is read here says which bytes are asked for
        self.hashed.begin(plan.checkpoint, node.outputs(), self.store.memos)
        with self._working(plan, [node], node.spec.digest):
            manifest = self._scan(plan, node, reread=False)
            is_known = isinstance(self.store.actions.get(manifest.action), Hit)
            if is_known or not plan.checkpoint.source.available:
                return manifest, "reused"
            self.store.actions.put(manifest)
            return manifest, "computed"

    def _made_elsewhere(
        self, plan: Plan, node: Node, record: dict[str, Any]
    ) -> tuple[Manifest, str] | None:
        """Have a node made by the crew; None if it is to be made here."""
        if not self.crew:
            return None
        if made := self.crew.make(self, plan, node):
            record["trace"] = made.trace
            return made.manifest, made.outcome
        self.streaming.enter(node.name)  # which it passed by: holding no lock, nor memory
        return None

    def take(self, plan: Plan, node: Node, manifest: Manifest) -> None:
        """Put on record what another machine made; its bytes are here, as far as they are wanted.

        Raises:
            CheckpointError: as of reading a leaf's files.
        """
        if node.is_leaf:
            _leaf(node).note(*self._asked(plan, node), manifest.tensors)
        self.store.actions.put(manifest)

    @contextmanager
    def _working(self, plan: Plan, nodes: Iterable[Node], key: str) -> Iterator[None]:
        """Hold the memory that the actions of nodes take, one inside the other, then one action.

        In this order: an action that finds a result lost has its maker run within its own memory,
        and so must never be waited for by who has that maker's action and waits for memory.
        """
        memory = max(self._memory(plan, node) for node in nodes)
        with self.memory.reserve(memory), self.store.actions.running(key):
            yield

    def find(
        self, plan: Plan, action: Action, outputs: Mapping[str, TensorSpec]
    ) -> tuple[Hit | Miss | Corrupt, str]:
        """Look an action up, here and then in the remote; return what came of it for the log.

        Args:
            plan: the target, whose other results are asked for with it.
            action: the action.
            outputs: what it makes, whatever the digests: a remote's word on that is not taken.
        """
        entry = self.store.actions.get(action)
        if not isinstance(entry, Hit) and self.store.sharing:
            self.read_list(plan)
            manifest = self.store.sharing.find(action, outputs)
            if manifest is not None:
                return Hit(manifest), "fetched"
        return entry, "reused" if isinstance(entry, Hit) else "computed"

    def make_again(self, plan: Plan, why: str) -> None:
        """Make all results of a target that this run did not make, whatever is on record.

        Raises:
            BuildError: what they are made of is not here.
        """
        for node in (node for nodes in plan.stages.values() for node in nodes if not node.is_leaf):
            inputs = self.inputs(plan, node)
            action = node.action(inputs)
            key = action.key
            if key in self.computed:  # for another target, of which only that one's manifest tells
                if isinstance(entry := self.store.actions.get(action), Hit):
                    self.files.write(Path(node.manifest_path(self.workspace)), entry.manifest)
                continue
            with self.logged(node.name, why) as record, self._working(plan, [node], key):
                manifest = self._make(plan, node, inputs)
                self.store.actions.put(manifest)
                record["outcome"] = "computed"
            self.files.write(Path(node.manifest_path(self.workspace)), manifest)
            if self.store.sharing and not self.store.sharing.agrees(manifest):
                self.store.sharing.push(manifest, self.shared(plan, node))

    def shared(self, plan: Plan, node: Node) -> Locate | None:
        """Return what locates a node's tensors, or None if their bytes are not shared.

        Shared is what a model is packed of, and what takes longer to make than to fetch. What is
        kept here by default, since it is read again soon, is not: where the checkpoint is, casting
        it anew is faster than a network. ``[cache] keep`` names what is shared as well.
        """
        asked = node.stage.keep is Keep.ALWAYS or node.stage.name in (self.keep or ())
        packed = node in plan.packed and self.keeps(plan, node.stage)
        if node.is_leaf or not (asked or packed):
            return None
        return lambda _, tensor: self.store.blobs.locate(tensor.digest, tensor.nbytes)

    def read_list(self, plan: Plan) -> None:
        """Have what a remote has on record of a target at hand, by one request for all of it."""
        target, sharing = plan.target.name, self.store.sharing
        if not sharing:
            return
        with self.lists_lock:
            if target not in self.lists and (key := self._list_key(plan)):
                sharing.read_list(key)
            self.lists.add(target)

    def push_list(self, plan: Plan, packed: Manifest) -> None:
        """Have that uploaded, by and by, once the target is packed."""
        sharing = self.store.sharing
        if sharing and (key := self._list_key(plan)):
            nodes = (node for stage in plan.stages.values() for node in stage if not node.is_leaf)
            made = (Manifest.at(node.manifest_path(self.workspace)) for node in nodes)
            sharing.push_list(key, [m.action.key for m in (*made, packed) if m])

    def _list_key(self, plan: Plan) -> str | None:
        """Return the key of a target's list, if its tensors' digests are known."""
        leaves: dict[Node, Manifest] = {}
        for leaf in plan.leaves:
            try:
                found = self.recall(plan, leaf)
            except BuildError:  # which who needs it says
                return None
            if found is None:
                return None
            leaves[leaf] = found
        return bundle.list_key(plan, leaves)

    def fetch(
        self, plan: Plan, inputs: Inputs, keys: Iterable[Key], *, packs: bool = False
    ) -> None:
        """Fetch the blobs of inputs that only a remote has, all at once.

        Args:
            plan: the target.
            inputs: the inputs.
            keys: those that are read.
            packs: whether the target is packed of them: then they are written where they belong.
        """
        sharing, blobs = self.store.sharing, self.store.blobs
        if not sharing:
            return
        read = [inputs[key] for key in keys]
        lost = [each for each in read if not blobs.has(each.tensor.digest, each.tensor.nbytes)]
        if not lost:
            return
        makers = {maker: self.manifest(plan, maker).action.key for maker, _ in lost}
        draft = None
        if packs:
            draft = self.drafts.begin(plan, makers.__contains__, passes=self.passes(plan))
        places = {inputs[k].tensor.digest: draft.place(k.name) for k in inputs} if draft else {}
        with self.memory.reserve(sharing.memory(len(makers))):
            sharing.fetch_all([(makers[maker], tensor) for maker, tensor in lost], places)
        if draft:
            draft.note_written((key.name, tensor) for key, (_, tensor) in inputs.items())

    def scan(self, plan: Plan, node: Node, *, reread: bool = False) -> Manifest:
        """Return what a leaf finds in the checkpoint; to ``reread`` is to read its files anew."""
        with self.memory.reserve(self._memory(plan, node)):
            return self._scan(plan, node, reread=reread)

    def recall(self, plan: Plan, node: Node) -> Manifest | None:
        """Return what a leaf found in such files before, without reading them.

        Raises:
            BuildError: the checkpoint is not here, and what is wanted of it is not on record.
        """
        return self._manifest_of_leaf(node, _leaf(node).recall(*self._asked(plan, node)))

    def _scan(self, plan: Plan, node: Node, *, reread: bool) -> Manifest:
        tensors = _leaf(node).scan(*self._asked(plan, node), reread=reread)
        return Manifest(node.action(node.as_inputs(tensors)), tensors)

    def _asked(self, plan: Plan, node: Node) -> tuple[Any, NodeContext]:
        return node.spec, self.context(plan, node, {})

    @staticmethod
    def _manifest_of_leaf(node: Node, tensors: dict[str, Tensor] | None) -> Manifest | None:
        return None if tensors is None else Manifest(node.action(node.as_inputs(tensors)), tensors)

    def _make(self, plan: Plan, node: Node, inputs: Inputs, made: Made | None = None) -> Manifest:
        """Run a node's action.

        Args:
            plan: the target.
            node: the node.
            inputs: what it reads.
            made: what was made for it before; None, the nodes behind it make nothing meanwhile.
        """
        self.threads.add(threading.get_native_id())
        for _ in range(MOST_LOST):
            context = NodeContext(self, plan, node, inputs, made=made)
            try:
                default_to_cpu()
                with mx.stream(self.streams.get("cpu")):
                    result = node.stage.run(node.params, context.tensors, context)
                manifest = Manifest(node.action(inputs), result.tensors, result.notes)
                self.computed.add(manifest.action.key)
                return manifest
            except BlobLost as lost:  # noticed as it was read: it is made again, and this as well
                self.store.blobs.drop_if_wrong(lost.digest)
            except FileChanged:  # by its time: if only that has moved, it is found to be the same
                pass
        raise BuildError(
            f"{node.name}: what it reads has other bytes each time. The disk may be failing; or "
            f"something writes to {plan.checkpoint.folder}."
        )

    def _memory(self, plan: Plan, node: Node) -> int:
        """Return how many bytes a node's action holds at once: all that there are, to run alone."""
        if node.stage.runs_alone(node.params):
            return sys.maxsize
        views = [
            n.stage.view_memory(n.params, plan.checkpoint) for n in _not_kept(self, plan, node)
        ]
        return node.stage.memory(node.params, plan.checkpoint) + max(views, default=0)

    def keeps(self, plan: Plan, stage: Stage[Any]) -> bool:
        """Tell whether a stage's results are kept; what is not is made again as it is read."""
        return sizes.keeps(stage, self.kept(plan))

    def passes(self, plan: Plan) -> bool:
        """Tell whether what a target is made of comes from elsewhere, and is then dropped."""
        return sizes.passes(plan.checkpoint, self.keep)

    def kept(self, plan: Plan) -> frozenset[str]:
        """Return the stages whose results are kept of a target, besides those that always are."""
        return sizes.kept(plan, self.keep)

    def begin_draft(self, plan: Plan) -> WeightFileDraft | None:
        """Return the draft of a target's weight files, begun unless it is already.

        There is none where most of the target is on record here: see ``bundle.writes_in_place``.

        Raises:
            NoRoom: the disk cannot take it.
        """
        known: dict[Node, Manifest | None] = {}

        def is_made(node: Node) -> bool:
            return not self._on_record(plan, node, known)

        return self.drafts.begin(plan, is_made, passes=self.passes(plan))

    def is_on_record(self, plan: Plan, node: Node) -> bool:
        """Tell whether it is on record here what a node makes of the checkpoint as it is now."""
        return self._on_record(plan, node, {}) is not None

    def on_record(self, plan: Plan, nodes: Iterable[Node]) -> list[Manifest | None]:
        """Return what is on record here of nodes, for the checkpoint as it is now."""
        known: dict[Node, Manifest | None] = {}
        return [self._on_record(plan, node, known) for node in nodes]

    def _on_record(
        self, plan: Plan, node: Node, known: dict[Node, Manifest | None]
    ) -> Manifest | None:
        """Return what is on record of a node, for the checkpoint as it is now.

        Args:
            plan: the target.
            node: the node.
            known: the answers for nodes that were asked of before; extended.
        """
        if node not in known:
            known[node] = None
            if node.is_leaf:
                known[node] = self.recall(plan, node)
            else:
                results = {need: self._on_record(plan, need, known) for need in node.needs}
                read = {need: manifest for need, manifest in results.items() if manifest}
                if len(read) == len(results):
                    hit = self.store.actions.get(node.action(node.inputs(read)))
                    known[node] = hit.manifest if isinstance(hit, Hit) else None
        return known[node]

    def contents(self, plan: Plan, node: Node, manifest: Manifest) -> Mapping[str, bytes]:
        """Return the bytes of what a node made, by name, each read as it is asked for."""
        inputs = node.as_inputs(manifest.tensors)
        return Contents(self.store.blobs, inputs, lambda key: self.locate(plan, inputs, key))

    def rows(
        self,
        plan: Plan,
        inputs: Inputs,
        key: Key,
        makers: dict[Node, NodeContext] | None = None,
    ) -> Rows:
        """Return a tensor to read: from the store, or made again from what it was made of.

        Args:
            plan: the target.
            inputs: tensors, and the nodes that made them.
            key: which of these.
            makers: the contexts of nodes whose tensors were made again before; extended. The
                manifests of what a node reads may hold thousands of tensors.

        Raises:
            BuildError: it is lost for good, e.g. the checkpoint changed under it.
        """
        maker, tensor = inputs[key]
        blobs = self.store.blobs
        if not self.keeps(plan, maker.stage) and not blobs.has(tensor.digest, tensor.nbytes):
            makers = {} if makers is None else makers
            if maker not in makers:
                makers[maker] = NodeContext(self, plan, maker, self.inputs(plan, maker), makers)
            context = makers[maker]
            view = maker.stage.view(maker.params, context.tensors, context, key.name)
            if view is not None:
                return view
        parts = self.locate(plan, inputs, key)
        check = rows.DigestCheck([(tensor.digest, tensor.nbytes)])
        return rows.Stored(blobs, parts, tensor.dtype, tensor.shape, check=check)

    def locate(self, plan: Plan, inputs: Inputs, key: Key) -> list[Part]:
        """Return where the bytes of a tensor lie that is kept, made again if they are lost.

        Raises:
            BuildError: they come out differently.
        """
        maker, tensor = inputs[key]
        try:
            return self.store.blobs.locate(tensor.digest, tensor.nbytes)
        except BlobLost as lost:
            self.fetch(plan, inputs, [key])
            if not self.store.blobs.has(tensor.digest, tensor.nbytes):
                self.remake(plan, maker, key.name, tensor, lost)
                if self.store.sharing:  # where it is not there either, or corrupt
                    manifest = self.manifest(plan, maker)
                    self.store.sharing.push(manifest, self.shared(plan, maker))
        return self.store.blobs.locate(tensor.digest, tensor.nbytes)

    def remake(self, plan: Plan, node: Node, name: str, tensor: Tensor, lost: BlobLost) -> None:
        """Run the action again that made a tensor whose blob is gone.

        Raises:
            BuildError: it made something else.
        """
        inputs = self.inputs(plan, node)
        for key, (maker, passed) in inputs.items():
            # Only passed on here: whoever keeps it makes it again.
            if passed == tensor and self.keeps(plan, maker.stage):
                self.remake(plan, maker, key.name, tensor, lost)
                return
        # Whoever waits here holds actions of later stages alone, which this one never waits for.
        with self._working(plan, [node], node.action(inputs).key):
            if self.store.blobs.has(tensor.digest, tensor.nbytes):  # by another thread
                return
            with self.logged(node.name, f"blob lost: {lost.cause}") as record:
                if node.is_leaf:
                    remade = self._scan(plan, node, reread=True)
                else:
                    remade = self._make(plan, node, inputs)
                record["outcome"] = "computed"
        path = Path(node.manifest_path(self.workspace))
        recorded = Manifest.at(path)
        # All that it made: what is remade lies under its digest, which a record may have elsewhere.
        if remade.tensors.get(name) != tensor or (recorded and recorded.tensors != remade.tensors):
            # So that the next run sees it.
            if node.is_leaf:
                self.forget_checkpoint(plan)
            else:
                self.store.actions.put(remade)
                self.files.write(path, remade)
            raise BuildError(
                f"{node.name}: {name} is lost ({lost.cause}) and comes out differently now. "
                f"Run {COMMAND} again: what depends on it is then built anew."
            )

    def forget_checkpoint(self, plan: Plan) -> None:
        """Remember nothing of a checkpoint whose files have other bytes than their stamps say."""
        checkpoint, memos = plan.checkpoint, self.store.memos
        paths = [checkpoint.source.path(file) for file in checkpoint.stamps]
        headers.forget([path for path in paths if path], memos)
        for leaf in plan.leaves:
            self.forget_leaf(plan, leaf)

    def forget_leaf(self, plan: Plan, leaf: Node) -> None:
        """Remember nothing of what a leaf found in the checkpoint."""
        _leaf(leaf).forget(*self._asked(plan, leaf))
        Path(leaf.manifest_path(self.workspace)).unlink(missing_ok=True)


def _leaf(node: Node) -> LeafStage[Any]:
    """Return the stage of a node that reads the checkpoint."""
    assert isinstance(node.stage, LeafStage)
    return node.stage

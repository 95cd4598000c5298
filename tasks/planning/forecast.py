"""forecast: what a run would do, and why, worked out without doing it.

It goes through the layers in the order of the stages with the manifests that are there, as doit
does, and where a result is on record (in the action cache, in the remote) with that. What is
made of a result that nobody knows yet is not certain: it may come out as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from cache.digest import digest_record
from cache.files import link
from cache.records.actions import Hit
from cache.records.manifests import Action, Manifest, Tensor, TensorSpec
from cache.store import Store
from tasks.core.errors import BuildError
from tasks.core.task_names import PACK, REPORT, task_name
from tasks.core.workspace import Workspace
from tasks.layouts.registry import LAYOUTS
from tasks.planning import bundle, locked_sources, locked_targets, sizes
from tasks.planning.bundle import Bundle
from tasks.planning.lockfile import LOCKED_OTHERWISE, Lock
from tasks.planning.node import Inputs, Known, Node, total
from tasks.planning.plan import Plan
from tasks.planning.sizes import Traffic
from tasks.planning.steps import FETCH, IGNORED, REUSE, RUN, SETTLED, UP_TO_DATE, Step, TaskState
from tasks.stages import reasons, registry
from tasks.stages.reasons import Reason
from tasks.stages.stage import Key, Origin

UNKNOWN = Reason("what it reads may come out differently")
CONTENTS = Reason(reasons.CONTENTS)
REPORT_CHANGES = Reason("what it shows changes")
OTHERWISE = Reason(LOCKED_OTHERWISE)
LOST = Reason("bytes of it that are wanted are not in the cache any more")
NOTHING = Traffic()


@dataclass(frozen=True)
class _Result:
    """What a node is expected to have made.

    Attributes:
        identity: the same for two nodes that will have made the same.
        manifest: if it is known.
        new: whether nothing that is on record can have been made of it: it is made for the first
            time.
    """

    identity: str
    manifest: Manifest | None
    new: bool = False


@dataclass(frozen=True)
class _UnchangedResult:
    """The same of a node that does not run. Its manifest is only read if that is of interest."""

    path: str
    new: bool = False

    @cached_property
    def manifest(self) -> Manifest | None:
        return Manifest.at(self.path)

    @property
    def identity(self) -> str:
        return self.manifest.result if self.manifest else self.path


class Build(Protocol):
    """What a forecast asks of a build: what it has, never to make anything."""

    store: Store
    workspace: Workspace
    keep: frozenset[str] | None

    def recall(self, plan: Plan, node: Node) -> Manifest | None:
        """Return what a leaf found in such files before, without reading them."""

    def scan(self, plan: Plan, node: Node, *, reread: bool = False) -> Manifest:
        """Return what a leaf finds in the checkpoint."""

    def read_list(self, plan: Plan) -> None:
        """Have what a remote has on record of a target at hand."""


class Forecast:
    """Works out a run's steps.

    Attributes:
        steps: by task, in the order of the stages of each layer.
        refused: why models.lock will have none of it, or it is nowhere, by source.
    """

    def __init__(
        self, build: Build, lock: Lock, saved: Callable[[str], TaskState], *, quick: bool = False
    ) -> None:
        """Begin with nothing looked at.

        Args:
            build: gives the cache; nothing is written through it.
            lock: models.lock.
            saved: what doit knows of a task.
            quick: states are wanted, no bytes: the remote store is not asked, and of measures,
                which nobody may ever ask for, no results are looked up. What could be fetched, or
                such a result reused, is said to run.
        """
        self.steps: dict[str, Step] = {}
        self.refused: dict[str, str] = {}
        self._build = build
        self._store = replace(build.store, sharing=None) if quick else build.store
        self._quick = quick
        self._lock = lock
        self._saved = saved
        self._results: dict[Node, _Result | _UnchangedResult] = {}
        self._checked: set[str] = set()  # sources
        self._running: dict[str, bool] = {}  # identities of what will be made, and whether surely
        self._there: set[str] = set()  # digests of blobs that will be in the cache
        self._made: tuple[Plan | None, Known] = None, {}  # what nodes make, of one target
        # Else any result may be on record that is not known before it is made.
        self._empty = not self._store.actions.root.exists()

    def add(self, plan: Plan, node: Node) -> None:
        """Work out a layer's task, and those that it depends on."""
        if node in self._results:
            return
        for need in node.needs:
            self.add(plan, need)
        saved = self._saved(node.name)
        ignored = saved.ignored or self._ignored(need.name for need in node.needs)
        if ignored or not (saved.runs or self._changed(saved, node.needs)):
            self._results[node] = _UnchangedResult(self._path(node))
            self._put(node, IGNORED if ignored else UP_TO_DATE)
            return
        if self._quick and node.stage in registry.MEASURES:
            self._results[node] = _Result(node.spec.digest, None)
            self._put(node, RUN)
            return
        old = Manifest.at(self._path(node))
        if node.is_leaf:
            self._leaf(plan, node, saved, old)
        elif all(self._results[need].manifest for need in node.needs):
            self._known(plan, node, saved, old)
        else:
            self._unknown(plan, node, saved, old)

    def add_pack(self, plan: Plan) -> None:
        """Work out a target's packing, and all that it depends on."""
        task = task_name(PACK, plan.target.name)
        if task in self.steps:
            return
        last = plan.last
        for node in last:
            self.add(plan, node)
        saved = self._saved(task)
        step = Step(task, plan.target.name, PACK, "", UP_TO_DATE)
        changed = self._changed(saved, last)
        others = saved.changed - {*map(self._path, last)}
        if saved.ignored or self._ignored(node.name for node in last):
            step = replace(step, state=IGNORED)
        elif saved.runs or others or changed:
            self._check(plan)
            if plan.checkpoint.source.available:  # models.lock scans it, and refers to all of it
                scanned = self._known_outputs(plan.leaves).items()
                fetched = plan.checkpoint.fetched
                self._there |= {t.digest for key, (_, t) in scanned if key.name not in fetched}
            why = tuple(saved.why([*map(self._path, changed), *sorted(others)]))
            step = self._pack(plan, replace(step, state=RUN, why=why), saved)
        self.steps[task] = step

    def add_report(self, plan: Plan, beside: Iterable[Plan]) -> None:
        """Work out the writing of a target's report, and all that it depends on.

        Args:
            plan: the target.
            beside: those that are packed and measured first, to be compared.
        """
        target = plan.target.name
        reads = [task for each in (plan, *beside) for task in self._measured(each)]
        page, packing = task_name(REPORT, target), task_name(PACK, target)
        self._add_page(page, target, reads, sure=(packing,))

    def add_overview(self, plans: Iterable[Plan]) -> None:
        """Work out the writing of the overview, given that of each target's report."""
        self._add_page(REPORT, "", [task_name(REPORT, plan.target.name) for plan in plans])

    def _measured(self, plan: Plan) -> list[str]:
        self.add_pack(plan)
        for node in plan.measuring:
            self.add(plan, node)
        return [task_name(PACK, plan.target.name), *(node.name for node in plan.measuring)]

    def _add_page(self, task: str, target: str, reads: list[str], sure: Iterable[str] = ()) -> None:
        """Add a page; what is among ``sure`` changes it, and what else it reads may."""
        saved = self._saved(task)
        step = Step(task, target, REPORT, "", UP_TO_DATE)
        busy = [self.steps[read] for read in reads if self.steps[read].state not in SETTLED]
        if saved.ignored or self._ignored(reads):
            step = replace(step, state=IGNORED)
        elif saved.runs or saved.changed:
            step = replace(step, state=RUN, why=tuple(saved.why(sorted(saved.changed))))
        elif busy:
            certain = any(read.certain and read.task in sure for read in busy)
            step = replace(step, state=RUN, why=(REPORT_CHANGES,), certain=certain)
        self.steps[task] = step

    def _ignored(self, tasks: Iterable[str]) -> bool:
        return any(self.steps[task].state == IGNORED for task in tasks)

    def _changed(self, saved: TaskState, needs: Iterable[Node]) -> list[Node]:
        return [need for need in needs if not self._as_it_was(saved, need)]

    def _check(self, plan: Plan, node: Node | None = None) -> None:
        """Take note of what models.lock refuses.

        Args:
            plan: the target.
            node: of a layer that is looked at; else the whole source is.
        """
        source = plan.target.source_name
        if source in self.refused or source not in self._lock.sources:
            return
        if not node and source in self._checked:
            return
        nodes = [node] if node else plan.leaves
        manifests = [self._results[node].manifest for node in nodes]
        tensors = {
            name: t for manifest in manifests if manifest for name, t in manifest.tensors.items()
        }
        try:
            if node:
                locked_sources.check_layer(self._lock, self._store, plan, tensors)
            else:
                self._checked.add(source)
                locked_sources.check_known(
                    self._lock, plan, {name: t.digest for name, t in tensors.items()}
                )
        except BuildError as error:
            self.refused[source] = str(error)

    def _pack(self, plan: Plan, step: Step, saved: TaskState) -> Step:
        last = plan.last
        inputs = self._known_outputs(last)
        in_place = self._written_in_place(plan)
        if not all(self._results[node].manifest for node in last):
            size = sum(total(node.output_specs(self._outputs(plan)).values()) for node in last)
            parts = [bundle.params(plan), [self._results[node].identity for node in last]]
            shared = self._runs(digest_record(parts))
            certain = not shared and self._surely(saved, last)
            fetched = self._want(plan, inputs, inputs, certain=certain)
            traffic = Traffic(size, size - in_place, fetched)
            return replace(step, state=REUSE if shared else RUN, certain=certain, moved=traffic)
        tensors = {key.name: tensor for key, (_, tensor) in inputs.items()}
        wanted = Bundle.of(plan, tensors, self._store.memos)
        if locked_targets.will_contradict(
            self._lock, plan, wanted.action, partial(self._packed_before, plan)
        ):
            self._make_again(plan)
            step = replace(step, certain=False)
        packed, state = self._recorded(plan, wanted.action)
        if packed and self._holds(plan, packed):
            return replace(step, state=state)
        shared = not packed and self._runs(wanted.action.key)
        size = wanted.weights_nbytes
        before = Manifest.at(self._build.workspace.packed(plan.target.name))
        known = packed.tensors if packed else bundle.same_weights(before, wanted.action)
        if bundle.whole_files(self._store.blobs, wanted, known):
            traffic = Traffic(size, wanted.nbytes - size * self._links)
        else:
            fetched = self._want(plan, inputs, inputs)
            traffic = Traffic(size, wanted.nbytes - in_place, fetched)
        certain = step.certain and not shared
        return replace(step, state=REUSE if shared else state, certain=certain, moved=traffic)

    def _packed_before(self, plan: Plan, key: str) -> Manifest | None:
        last = self._build.workspace.packed(plan.target.name)
        return bundle.recorded(self._store, last, key)

    def _make_again(self, plan: Plan) -> None:
        """Have a target's layers made, whatever is on record, unless this run makes them."""
        for node in (node for nodes in plan.stages.values() for node in nodes if not node.is_leaf):
            inputs = self._inputs(node)
            if not self._runs(node.action(inputs).key):
                fetched = self._want(plan, inputs, self._reads(plan, node))
                traffic = self._traffic(plan, node) + Traffic(fetched=fetched)
                self._put(node, RUN, [OTHERWISE], moved=traffic)

    @cached_property
    def _links(self) -> bool:
        """Whether files of the cache are linked to build/, not copied."""
        return link.on_one_disk(self._store.blobs.root, self._build.workspace.state)

    def _written_in_place(self, plan: Plan) -> int:
        """Return how many bytes of a target's weight files are there before it is packed."""
        if self._quick or not self._links:
            return 0
        to_run = {node for node in plan.last if self.steps[node.name].state == RUN}
        passes = sizes.passes(plan.checkpoint, self._build.keep)
        known = self._outputs(plan)
        made = to_run.__contains__
        if not bundle.writes_in_place(plan, made, passes=passes, known=known):
            return 0
        return sum(
            total(bundle.in_place(node, passes=passes, known=known).values()) for node in to_run
        )

    def _leaf(self, plan: Plan, node: Node, saved: TaskState, old: Manifest | None) -> None:
        why = saved.why([])
        manifest = self._build.recall(plan, node)
        traffic = self._traffic(plan, node)
        if manifest is None:
            identity = node.spec.digest
            unknown = self._empty and not self._store.sharing
            self._results[node] = _Result(identity, None, unknown)
            self._check(plan, node)
            shared = self._runs(identity)
            self._put(
                node, REUSE if shared else RUN, why, certain=self._empty,
                moved=NOTHING if shared else traffic,
            )  # fmt: skip
            return
        self._results[node] = _Result(manifest.result, manifest)
        self._check(plan, node)
        if old:
            why = [*why, *reasons.between(old.action, manifest.action, node.stage.explain)]
        lost = 0
        if plan.checkpoint.source.available:  # else it is known by its record, and cannot be read
            fetched = plan.checkpoint.fetched  # when somebody reads it
            tensors = [t for name, t in manifest.tensors.items() if name not in fetched]
            lost = sum(tensor.nbytes for tensor in tensors if not self._has(tensor))
            self._there |= {tensor.digest for tensor in tensors}
        known = isinstance(self._store.actions.get(manifest.action), Hit)
        reuse = known or not plan.checkpoint.source.available or self._runs(manifest.action.key)
        self._put(node, REUSE if reuse else RUN, why, moved=Traffic(lost))

    def _unknown(self, plan: Plan, node: Node, saved: TaskState, old: Manifest | None) -> None:
        read = [self._results[need].identity for need in node.needs]
        identity = digest_record([node.stage.name, node.spec.digest, read])
        certain = self._surely(saved, node.needs)
        self._results[node] = _Result(identity, None, certain)
        why: list[Reason] = []
        if old:
            params = node.params.record
            now = replace(old.action, version=node.stage.version, params=params)
            why = reasons.between(old.action, now, node.stage.explain)
        if not why:
            why = saved.why([]) if saved.runs else [CONTENTS if certain else UNKNOWN]
        surely_made = self._running.get(identity, False)
        if self._runs(identity, surely=certain):
            # If the other one need not make it after all, this one makes it, if nobody else does.
            self._put(node, REUSE, why, certain=certain and surely_made)
            return
        inputs = self._inputs(node)
        keys = self._reads(plan, node) & inputs.keys() if inputs else set()
        fetched = self._want(plan, inputs, keys, certain=certain)
        traffic = self._traffic(plan, node) + Traffic(fetched=fetched)
        self._put(node, RUN, why, certain=certain, moved=traffic)

    def _known(self, plan: Plan, node: Node, saved: TaskState, old: Manifest | None) -> None:
        inputs = self._inputs(node)
        action = node.action(inputs)
        changed = [self._path(need) for need in self._changed(saved, node.needs)]
        explained = old and reasons.between(old.action, action, node.stage.explain)
        why = explained or saved.why(changed)
        recorded, state = self._recorded(plan, action, node.output_specs(self._outputs(plan)))
        if recorded:
            self._results[node] = _Result(recorded.result, recorded)
            self._put(node, state, why)
            return
        manifest = (
            None
            if node.new_specs(self._outputs(plan))
            else Manifest(action, _passed_on(node, inputs))
        )
        identity = manifest.result if manifest else action.key
        self._results[node] = _Result(identity, manifest, new=True)
        if self._runs(action.key):
            self._put(node, REUSE, why)
            return
        fetched = self._want(plan, inputs, self._reads(plan, node))
        traffic = self._traffic(plan, node) + Traffic(fetched=fetched)
        self._put(node, RUN, why, moved=traffic)

    def _kept(self, plan: Plan) -> frozenset[str]:
        return sizes.kept(plan, self._build.keep)

    def _reads(self, plan: Plan, node: Node) -> set[Key]:
        return sizes.reads(node, self._kept(plan))

    def _keeps(self, plan: Plan, node: Node) -> bool:
        return sizes.keeps(node.stage, self._kept(plan))

    def _surely(self, saved: TaskState, needs: Iterable[Node]) -> bool:
        """Tell whether a task is certain to run, and to find nothing on record."""
        results = {need: self._results[need] for need in needs}
        if not all(result.manifest or result.new for result in results.values()):
            return False
        if saved.runs or saved.changed - {*map(self._path, results)}:
            return True
        return any(
            not self._as_it_was(saved, need)
            if result.manifest
            else self._has_other_outputs(saved, need)
            for need, result in results.items()
        )

    def _as_it_was(self, saved: TaskState, need: Node) -> bool:
        result = self._results[need]
        if isinstance(result, _UnchangedResult):
            return self._path(need) not in saved.changed
        manifest = result.manifest
        return manifest is not None and manifest.result == saved.read(self._path(need))

    def _has_other_outputs(self, saved: TaskState, need: Node) -> bool:
        """Tell whether what a node will make has other names, dtypes or shapes than before."""
        old = Manifest.at(self._path(need))
        if not old or old.result != saved.read(self._path(need)):
            return False
        return need.output_specs() != {name: t.spec for name, t in old.tensors.items()}

    def _recorded(
        self, plan: Plan, action: Action, outputs: Mapping[str, TensorSpec] | None = None
    ) -> tuple[Manifest | None, str]:
        entry = self._store.actions.get(action)
        if isinstance(entry, Hit):
            return entry.manifest, REUSE
        if sharing := self._store.sharing:
            self._build.read_list(plan)
            if manifest := sharing.look_up(action, outputs):
                return manifest, FETCH
        return None, RUN

    def _runs(self, identity: str, *, surely: bool = True) -> bool:
        """Tell whether another task will have made what this one asks for; else this one will.

        Args:
            identity: of what it asks for.
            surely: whether it asks for certain.
        """
        shared = identity in self._running
        self._running[identity] = surely or self._running.get(identity, False)
        return shared

    def _inputs(self, node: Node) -> Inputs:
        """Return the tensors that a node reads, as far as they are known."""
        return node.inputs_of({need: self._tensors(need) for need in node.needs})

    def _tensors(self, node: Node) -> Mapping[str, Tensor]:
        """Return what a node makes, as far as it is known."""
        manifest = self._results[node].manifest
        return manifest.tensors if manifest else _passed_on(node, self._inputs(node))

    def _known_outputs(self, nodes: Iterable[Node]) -> Inputs:
        """Return the tensors that some nodes make, of those whose manifests are known."""
        inputs: Inputs = {}
        for node in nodes:
            if manifest := self._results[node].manifest:
                inputs |= node.as_inputs(manifest.tensors)
        return inputs

    def _has(self, tensor: Tensor) -> bool:
        return tensor.digest in self._there or self._store.blobs.has(tensor.digest, tensor.nbytes)

    def _want(
        self, plan: Plan, inputs: Inputs, keys: Iterable[Key], *, certain: bool = True
    ) -> int:
        """Take note that tensors' bytes are read: what is lost is fetched, or made again.

        Returns:
            The bytes to fetch.
        """
        fetched = 0
        for key in keys:
            maker, tensor = inputs[key]
            if not self._has(tensor):  # which what was wanted before it may bring
                fetched += self._want_one(plan, maker, tensor, key.name, certain)
        return fetched

    def _want_one(self, plan: Plan, maker: Node, tensor: Tensor, name: str, certain: bool) -> int:
        manifest, sharing = self._results[maker].manifest, self._store.sharing
        if sharing and manifest and (pack := sharing.pack(manifest.action.key, tensor)):
            self._there |= {each.digest for each in pack.tensors}
            return pack.nbytes
        if maker.is_leaf and not plan.checkpoint.source.available:
            self._refuse_making(plan, maker)
            return 0
        inputs = self._inputs(maker)
        output = maker.outputs(self._outputs(plan))[name]
        if (
            not self._keeps(plan, maker) and output.origin is not Origin.STORED
        ):  # made as it is read
            return self._want(plan, inputs, output.inputs, certain=certain)
        for key, (earlier, passed) in inputs.items():
            if passed == tensor and self._keeps(plan, earlier):
                return self._want(plan, inputs, [key], certain=certain)
        if self.steps[maker.name].state != RUN:
            traffic = self._traffic(plan, maker)
            if maker.is_leaf and manifest and traffic.fetched:
                lost = [t for t in manifest.tensors.values() if not self._has(t)]
                traffic = replace(traffic, fetched=total(lost))
            self._put(maker, RUN, [LOST], certain=certain, moved=traffic)
        reads = self._reads(plan, maker) if inputs else set()
        fetched = self._want(plan, inputs, reads & inputs.keys(), certain=certain)
        self._there |= {each.digest for each in manifest.tensors.values()} if manifest else set()
        return fetched

    def _refuse_making(self, plan: Plan, node: Node) -> None:
        """Take note that a layer must be made of a checkpoint that is not here."""
        if self._quick:  # the remote store may have what is made of it
            return
        try:
            self._build.scan(plan, node, reread=True)
        except BuildError as error:
            self.refused.setdefault(plan.target.source_name, f"{plan.target.name}: {error}")

    def _holds(self, plan: Plan, packed: Manifest) -> bool:
        """Tell whether build/TARGET has the files of a build, as far as their sizes tell."""
        target = plan.target.name
        last = Manifest.at(self._build.workspace.packed(target))
        folder = self._build.workspace.built(target)
        if not folder.is_dir() or (last and last.tensors != packed.tensors):
            return False
        loaded = LAYOUTS[plan.target.layout].loaded
        if any(path.name not in packed.tensors for path in folder.glob(loaded)):
            return False
        sizes = {name: tensor.nbytes for name, tensor in packed.tensors.items()}
        return all(_size(folder / name) == size for name, size in sizes.items())

    def _outputs(self, plan: Plan) -> Known:
        """Return what nodes of a target make that were asked before: the latest target's."""
        if self._made[0] is not plan:
            self._made = plan, {}
        return self._made[1]

    def _traffic(self, plan: Plan, node: Node) -> Traffic:
        if self._quick:
            return NOTHING
        return sizes.traffic(node, self._kept(plan), plan.checkpoint, self._outputs(plan))

    def _path(self, node: Node) -> str:
        return node.manifest_path(self._build.workspace)

    def _put(
        self,
        node: Node,
        state: str,
        why: Iterable[Reason] = (),
        *,
        certain: bool = True,
        moved: Traffic = NOTHING,
    ) -> None:
        self.steps[node.name] = Step(
            node.name, node.target, node.stage.group, node.layer, state, tuple(why), certain, moved
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _passed_on(node: Node, inputs: Inputs) -> dict[str, Tensor]:
    """Return what a node makes by passing it on, as far as that is known."""
    if not inputs:
        return {}
    return {
        name: Tensor(*output.spec, inputs[output.inputs[0]].tensor.digest)
        for name, output in node.outputs().items()
        if output.origin is Origin.PASSED_ON and output.inputs and output.inputs[0] in inputs
    }

"""forecast: what a run would do, and why, worked out without doing it.

It goes through the layers in the order of the stages with the manifests that are there, as doit
does, and where a result is on record (in the action cache, in the remote) with that. What is
made of a result that nobody knows yet is not certain: it may come out as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from cache.digest import digest_record
from cache.files import link
from cache.records.actions import Hit
from cache.records.manifests import Action, Manifest, Tensor
from tasks.core.errors import BuildError
from tasks.core.workspace import BUILD
from tasks.execution.builder import Builder
from tasks.planning import bundle, sizes
from tasks.planning.lockfile import Lock
from tasks.planning.plan import Needed, Node, Plan
from tasks.planning.sizes import Moved
from tasks.stages import extract, reasons, unshard
from tasks.stages.reasons import Reason

UP_TO_DATE, RUN, REUSE, FETCH = "up to date", "run", "reuse", "fetch"
IGNORED = "ignored"  # by doit ignore, or since something that it depends on is
SETTLED = (UP_TO_DATE, IGNORED)
UNKNOWN = Reason("what it reads may come out differently")
CONTENTS = Reason(reasons.CONTENTS)
SHOWN = Reason("what it shows changes")
LOST = Reason("bytes of it that are wanted are not in the cache any more")
NOTHING = Moved()


@dataclass(frozen=True)
class Saved:
    """What doit knows of a task before the run.

    Attributes:
        ignored: whether it was told to ignore it.
        runs: whether it runs whatever comes of the tasks that it depends on.
        why: says why it runs, given the inputs that are not what they were.
        read: returns the digest of what it read when it last ran, given the path.
        changed: paths of those inputs that are not what they were.
    """

    ignored: bool
    runs: bool
    why: Callable[[list[str]], list[Reason]]
    read: Callable[[str], str | None]
    changed: frozenset[str]


@dataclass(frozen=True)
class Step:
    """One task of the run to come.

    Attributes:
        task: its name.
        target: its target.
        stage: its stage.
        layer: its layer; of pack and report, none.
        state: ``up to date``, ``run``, ``reuse`` (from the action cache), ``fetch``, ``ignored``.
        why: reasons, none if it is up to date or ignored.
        certain: whether no result that is not known yet could change it.
        moved: bytes.
    """

    task: str
    target: str
    stage: str
    layer: str
    state: str
    why: tuple[Reason, ...] = ()
    certain: bool = True
    moved: Moved = field(default_factory=Moved)


@dataclass(frozen=True)
class _Result:
    """What a node is expected to have made.

    Attributes:
        symbol: the same for two nodes that will have made the same.
        manifest: if it is known.
        new: whether nothing that is on record can have been made of it: it is made for the first
            time.
    """

    symbol: str
    manifest: Manifest | None
    new: bool = False


@dataclass(frozen=True)
class _Kept:
    """The same of a node that does not run. Its manifest is only read if that is of interest."""

    path: str
    new: bool = False

    @cached_property
    def manifest(self) -> Manifest | None:
        return Manifest.at(self.path)

    @property
    def symbol(self) -> str:
        return self.manifest.result if self.manifest else self.path


class Forecast:
    """Works out a run's steps.

    Attributes:
        steps: by task, in the order of the stages of each layer.
        refused: why models.lock will have none of it, or it is nowhere, by source.
    """

    def __init__(
        self, builder: Builder, lock: Lock, saved: Callable[[str], Saved], *, quick: bool = False
    ) -> None:
        """Begin with nothing looked at.

        Args:
            builder: gives the cache; nothing is written through it.
            lock: models.lock.
            saved: what doit knows of a task.
            quick: states are wanted, no bytes: the remote store is not asked, and of the stage
                error, which nobody may ever ask for, no results are looked up. What could be
                fetched, or such a result reused, is said to run.
        """
        self.steps: dict[str, Step] = {}
        self.refused: dict[str, str] = {}
        self._builder = builder
        self._store = replace(builder.store, sharing=None) if quick else builder.store
        self._quick = quick
        self._lock = lock
        self._saved = saved
        self._results: dict[Node, _Result | _Kept] = {}
        self._checked: set[str] = set()  # sources
        self._running: dict[str, bool] = {}  # symbols of what will be made, and whether surely
        self._there: set[str] = set()  # digests of blobs that will be in the cache
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
            self._results[node] = _Kept(self._path(node))
            self._put(node, IGNORED if ignored else UP_TO_DATE)
            return
        if self._quick and node.stage == "error":
            self._results[node] = _Result(node.order.digest, None)
            self._put(node, RUN)
            return
        old = Manifest.at(self._path(node))
        if node.stage == "extract":
            self._extract(plan, node, saved, old)
        elif all(self._results[need].manifest for need in node.needs):
            self._known(plan, node, saved, old)
        else:
            self._unknown(plan, node, saved, old)

    def add_pack(self, plan: Plan) -> None:
        """Work out a target's packing, and all that it depends on."""
        task = f"pack:{plan.target.name}"
        if task in self.steps:
            return
        last = plan.stages["quantize"]
        for node in last:
            self.add(plan, node)
        saved = self._saved(task)
        step = Step(task, plan.target.name, "pack", "", UP_TO_DATE)
        changed = self._changed(saved, last)
        others = saved.changed - {*map(self._path, last)}
        if saved.ignored or self._ignored(node.name for node in last):
            step = replace(step, state=IGNORED)
        elif saved.runs or others or changed:
            self._check(plan)
            if plan.checkpoint.source.available:  # models.lock looks at it, and refers to all of it
                looked = self._made(plan.stages["extract"])
                self._there |= {tensor.digest for _, tensor in looked.values()}
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
        self._add_page(f"report:{target}", target, reads, sure=(f"pack:{target}",))

    def add_overview(self, plans: Iterable[Plan]) -> None:
        """Work out the writing of the overview, given that of each target's report."""
        self._add_page("report", "", [f"report:{plan.target.name}" for plan in plans])

    def _measured(self, plan: Plan) -> list[str]:
        self.add_pack(plan)
        for node in plan.errors:
            self.add(plan, node)
        return [f"pack:{plan.target.name}", *(node.name for node in plan.errors)]

    def _add_page(self, task: str, target: str, reads: list[str], sure: Iterable[str] = ()) -> None:
        """Add a page; what is among ``sure`` changes it, and what else it reads may."""
        saved = self._saved(task)
        step = Step(task, target, "report", "", UP_TO_DATE)
        busy = [self.steps[read] for read in reads if self.steps[read].state not in SETTLED]
        if saved.ignored or self._ignored(reads):
            step = replace(step, state=IGNORED)
        elif saved.runs or saved.changed:
            step = replace(step, state=RUN, why=tuple(saved.why(sorted(saved.changed))))
        elif busy:
            certain = any(read.certain and read.task in sure for read in busy)
            step = replace(step, state=RUN, why=(SHOWN,), certain=certain)
        self.steps[task] = step

    def _ignored(self, tasks: Iterable[str]) -> bool:
        return any(self.steps[task].state == IGNORED for task in tasks)

    def _changed(self, saved: Saved, needs: Iterable[Node]) -> list[Node]:
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
        nodes = [node] if node else plan.stages["extract"]
        found = [self._results[node].manifest for node in nodes]
        tensors = {
            name: t for manifest in found if manifest for name, t in manifest.tensors.items()
        }
        try:
            if node:
                self._lock.check_layer(self._store, plan, tensors)
            else:
                self._checked.add(source)
                self._lock.check_known(plan, {name: t.digest for name, t in tensors.items()})
        except BuildError as error:
            self.refused[source] = str(error)

    def _pack(self, plan: Plan, step: Step, saved: Saved) -> Step:
        last = plan.stages["quantize"]
        needed = self._made(last)
        in_place = self._written_in_place(plan)
        if not all(self._results[node].manifest for node in last):
            size = sum(sizes.total(sizes.made(node).values()) for node in last)
            parts = [bundle.told(plan), [self._results[node].symbol for node in last]]
            shared = self._runs(digest_record(parts))
            certain = not shared and self._surely(saved, last)
            fetched = self._want(plan, needed, needed, certain=certain)
            moved = Moved(size, size - in_place, fetched)
            return replace(step, state=REUSE if shared else RUN, certain=certain, moved=moved)
        content = bundle.Content.of(self._builder, plan, needed)
        found, state = self._recorded(content.action)
        if found and self._holds(plan, found):
            return replace(step, state=state)
        shared = not found and self._runs(content.action.key)
        size = content.weights_nbytes
        if found and bundle.whole_files(self._store.blobs, content, found.tensors):
            moved = Moved(size, content.nbytes - size * self._links)
        else:
            fetched = self._want(plan, needed, needed)
            moved = Moved(size, content.nbytes - in_place, fetched)
        return replace(step, state=REUSE if shared else state, certain=not shared, moved=moved)

    @cached_property
    def _links(self) -> bool:
        """Whether files of the cache are linked to build/, not copied."""
        return link.on_one_disk(self._store.blobs.root, self._builder.state)

    def _written_in_place(self, plan: Plan) -> int:
        """Return how many bytes of a target's weight files are there before it is packed."""
        if self._quick or not self._links:
            return 0
        made = {n for n in plan.stages["quantize"] if self.steps[n.name].state == RUN}
        if not bundle.is_new(plan, made.__contains__):
            return 0
        return sum(sizes.total(sizes.new(node).values()) for node in made)

    def _extract(self, plan: Plan, node: Node, saved: Saved, old: Manifest | None) -> None:
        why = saved.why([])
        tensors = extract.known(self._builder, plan, node)
        moved = self._moved(plan, node)
        if tensors is None:
            symbol = node.order.digest
            self._results[node] = _Result(symbol, None, self._empty and not self._store.sharing)
            self._check(plan, node)
            shared = self._runs(symbol)
            self._put(
                node, REUSE if shared else RUN, why, certain=self._empty,
                moved=NOTHING if shared else moved,
            )  # fmt: skip
            return
        made = {name: (node, tensor) for name, tensor in tensors.items()}
        manifest = Manifest(self._builder.action(node, made), tensors)
        self._results[node] = _Result(manifest.result, manifest)
        self._check(plan, node)
        if old:
            why = [*why, *reasons.between(old.action, manifest.action)]
        lost = 0
        if plan.checkpoint.source.available:  # else it is known by its record, and cannot be read
            lost = sum(t.nbytes for t in tensors.values() if not self._has(t))
            self._there |= {tensor.digest for tensor in tensors.values()}
        known = isinstance(self._store.actions.get(manifest.action), Hit)
        reuse = known or not plan.checkpoint.source.available or self._runs(manifest.action.key)
        self._put(node, REUSE if reuse else RUN, why, moved=Moved(lost))

    def _unknown(self, plan: Plan, node: Node, saved: Saved, old: Manifest | None) -> None:
        read = [self._results[need].symbol for need in node.needs]
        symbol = digest_record([node.stage, node.order.digest, read])
        certain = self._surely(saved, node.needs)
        self._results[node] = _Result(symbol, None, certain)
        why = []
        if old:
            now = replace(old.action, version=node.order.version, params=node.params)
            why = reasons.between(old.action, now)
        if not why:
            why = saved.why([]) if saved.runs else [CONTENTS if certain else UNKNOWN]
        made = self._running.get(symbol, False)
        if self._runs(symbol, surely=certain):
            # If the other one need not make it after all, this one makes it, if nobody else does.
            self._put(node, REUSE, why, certain=certain and made)
            return
        needed = self._needed(node)
        names = sizes.reads(self._builder, node) & needed.keys() if needed else set()
        fetched = self._want(plan, needed, names, certain=certain)
        moved = self._moved(plan, node) + Moved(fetched=fetched)
        self._put(node, RUN, why, certain=certain, moved=moved)

    def _known(self, plan: Plan, node: Node, saved: Saved, old: Manifest | None) -> None:
        needed = self._needed(node)
        action = self._builder.action(node, needed)
        changed = [self._path(need) for need in self._changed(saved, node.needs)]
        why = (old and reasons.between(old.action, action)) or saved.why(changed)
        found, state = self._recorded(action, sizes.made(node))
        if found:
            self._results[node] = _Result(found.result, found)
            self._put(node, state, why)
            return
        manifest = None if sizes.changed(node) else Manifest(action, _passed_on(node, needed))
        symbol = manifest.result if manifest else action.key
        self._results[node] = _Result(symbol, manifest, new=True)
        if self._runs(action.key):
            self._put(node, REUSE, why)
            return
        fetched = self._want(plan, needed, sizes.reads(self._builder, node))
        moved = self._moved(plan, node) + Moved(fetched=fetched)
        self._put(node, RUN, why, moved=moved)

    def _surely(self, saved: Saved, needs: Iterable[Node]) -> bool:
        """Tell whether a task is certain to run, and to find nothing on record."""
        results = {need: self._results[need] for need in needs}
        if not all(result.manifest or result.new for result in results.values()):
            return False
        if saved.runs or saved.changed - {*map(self._path, results)}:
            return True
        return any(
            not self._as_it_was(saved, need) if result.manifest else self._differs(saved, need)
            for need, result in results.items()
        )

    def _as_it_was(self, saved: Saved, need: Node) -> bool:
        result = self._results[need]
        if isinstance(result, _Kept):
            return self._path(need) not in saved.changed
        manifest = result.manifest
        return manifest is not None and manifest.result == saved.read(self._path(need))

    def _differs(self, saved: Saved, need: Node) -> bool:
        """Tell whether what a node will make has other names, dtypes or shapes than before."""
        old = Manifest.at(self._path(need))
        if not old or old.result != saved.read(self._path(need)):
            return False
        return sizes.made(need) != {n: replace(t, digest="") for n, t in old.tensors.items()}

    def _recorded(
        self, action: Action, outline: Mapping[str, Tensor] | None = None
    ) -> tuple[Manifest | None, str]:
        found = self._store.actions.get(action)
        if isinstance(found, Hit):
            return found.manifest, REUSE
        sharing = self._store.sharing
        manifest = sharing.look_up(action, outline) if sharing else None
        return (manifest, FETCH) if manifest is not None else (None, RUN)

    def _runs(self, symbol: str, *, surely: bool = True) -> bool:
        """Tell whether another task will have made what this one asks for; else this one will.

        Args:
            symbol: of what it asks for.
            surely: whether it asks for certain.
        """
        shared = symbol in self._running
        self._running[symbol] = surely or self._running.get(symbol, False)
        return shared

    def _needed(self, node: Node) -> Needed:
        """Return the tensors that a node reads, as far as they are known."""
        return node.given({need: self._tensors(need) for need in node.needs})

    def _tensors(self, node: Node) -> Mapping[str, Tensor]:
        """Return what a node makes, as far as it is known."""
        manifest = self._results[node].manifest
        return manifest.tensors if manifest else _passed_on(node, self._needed(node))

    def _made(self, nodes: Iterable[Node]) -> Needed:
        """Return the tensors that some nodes make, of those whose manifests are known."""
        return {
            name: (node, tensor)
            for node in nodes
            if (manifest := self._results[node].manifest)
            for name, tensor in manifest.tensors.items()
        }

    def _has(self, tensor: Tensor) -> bool:
        return tensor.digest in self._there or self._store.blobs.has(tensor.digest, tensor.nbytes)

    def _want(
        self, plan: Plan, needed: Needed, names: Iterable[str], *, certain: bool = True
    ) -> int:
        """Take note that tensors' bytes are read: what is lost is fetched, or made again.

        Returns:
            The bytes to fetch.
        """
        fetched = 0
        for name in names:
            maker, tensor = needed[name]
            if not self._has(tensor):  # which what was wanted before it may bring
                # Of two stages' tensors, each has its stage's name in front.
                plain = name.removeprefix(f"{maker.stage}:")
                fetched += self._want_one(plan, maker, tensor, plain, certain)
        return fetched

    def _want_one(self, plan: Plan, maker: Node, tensor: Tensor, name: str, certain: bool) -> int:
        manifest, sharing = self._results[maker].manifest, self._store.sharing
        if sharing and manifest and sharing.has(manifest.action.key, tensor):
            self._there.add(tensor.digest)
            return tensor.nbytes
        if maker.stage == "extract" and not plan.checkpoint.source.available:
            self._refuse_making(plan, maker)
            return 0
        needed = self._needed(maker)
        if not self._builder.keeps(maker.stage) and (keys := _again(maker, name)) is not None:
            return self._want(plan, needed, keys, certain=certain)
        for key, (earlier, passed) in needed.items():
            if passed == tensor and self._builder.keeps(earlier.stage):
                return self._want(plan, needed, [key], certain=certain)
        if self.steps[maker.name].state != RUN:
            moved = self._moved(plan, maker)
            self._put(maker, RUN, [LOST], certain=certain, moved=moved)
        reads = sizes.reads(self._builder, maker) if needed else set()
        fetched = self._want(plan, needed, reads & needed.keys(), certain=certain)
        self._there |= {made.digest for made in manifest.tensors.values()} if manifest else set()
        return fetched

    def _refuse_making(self, plan: Plan, node: Node) -> None:
        """Take note that a layer must be made of a checkpoint that is not here."""
        if self._quick:  # the remote store may have what is made of it
            return
        try:
            extract.make(self._builder, plan, node, look=True)
        except BuildError as error:
            self.refused.setdefault(plan.target.source_name, f"{plan.target.name}: {error}")

    def _holds(self, plan: Plan, packed: Manifest) -> bool:
        """Tell whether build/TARGET has the files of a build, as far as their sizes tell."""
        target = plan.target.name
        last = Manifest.at(self._builder.packed_path(target))
        folder = self._builder.state.parent / BUILD / target
        if not folder.is_dir() or (last and last.tensors != packed.tensors):
            return False
        there = {path.name: path.stat().st_size for path in folder.iterdir()}
        return there == {name: tensor.nbytes for name, tensor in packed.tensors.items()}

    def _moved(self, plan: Plan, node: Node) -> Moved:
        return NOTHING if self._quick else sizes.moved(self._builder, plan, node)

    def _path(self, node: Node) -> str:
        return self._builder.manifest_path(node)

    def _put(
        self,
        node: Node,
        state: str,
        why: Iterable[Reason] = (),
        *,
        certain: bool = True,
        moved: Moved = NOTHING,
    ) -> None:
        self.steps[node.name] = Step(
            node.name, node.target, node.stage, node.order.layer, state, tuple(why), certain, moved
        )


def _passed_on(node: Node, needed: Needed) -> dict[str, Tensor]:
    """Return what a node makes by passing it on, as far as that is known."""
    if not needed:
        return {}
    made = sizes.made(node)
    inputs = {name: name for name in needed}  # in the order that the node will find
    if node.stage == "unshard":
        inputs = {name: told[2][0] for name, told in node.params["tensors"].items()}
    kept = made.keys() - sizes.changed(node)
    return {
        name: replace(made[name], digest=needed[key][1].digest)
        for name, key in inputs.items() if name in kept and key in needed
    }  # fmt: skip


def _again(node: Node, name: str) -> list[str] | None:
    """Return what a tensor that is not kept is made of as it is read; None if it is kept."""
    if node.stage == "cast":
        return [name]
    _, _, inputs, steps = node.params["tensors"][name]
    return None if unshard.sanitized(steps) else inputs

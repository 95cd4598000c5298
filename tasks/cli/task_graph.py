"""graph: doit's tasks from plans: one for each stage and layer, and one that packs a target."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from doit.exceptions import InvalidDodoFile, TaskFailed
from doit.globals import Globals

from cache.digest import digest_file, digest_record
from cache.errors import CacheError
from cache.files import atomic as files
from cache.records.log import Log
from cache.records.manifests import Action, Manifest
from cache.store import Store
from tasks.cli import invocation as options
from tasks.config import reader as config
from tasks.config.reader import BUILD, STATE
from tasks.core.errors import BuildError
from tasks.execution import pack
from tasks.execution.builder import Builder, Memory, machine_memory, threads
from tasks.execution.draft import Drafts
from tasks.execution.early import Early
from tasks.layouts import LAYOUTS
from tasks.planning.lockfile import Built, Lock
from tasks.planning.plan import Node, Plan, Planner
from tasks.stages import extract, reasons
from tasks.stages.reasons import Reason

CHANGED = "what it is told changed"
NEVER = "never built here"
NOT_LEFT = "is not as it was left"
KNOWN = ((True, None, None),)  # as doit keeps what uptodate says, once that is known


@dataclass(frozen=True)
class Graph:
    """All targets of one models.toml.

    Attributes:
        folder: where models.toml lies; all state and output lie beside it.
        builder: runs the tasks.
        plans: by target.
        lock: models.lock.
        early: packs behind the tasks.
    """

    folder: Path
    builder: Builder
    plans: dict[str, Plan]
    lock: Lock
    early: Early = field(default_factory=Early)

    @cached_property
    def up_to_date(self) -> frozenset[str]:
        """The targets of a lean run whose layers are all up to date.

        They are packed, or not even that. doit would make a task of each of their layers, and then
        find by the same look at its database that there is nothing to do.
        """
        if not options.lean:
            return frozenset()
        return frozenset(
            target
            for target, found in self.plans.items()
            if all(
                self._is_up_to_date(node)
                for nodes in reversed(found.stages.values())  # most settings change the last
                for node in nodes
            )
        )

    def stage(self, stage: str) -> Iterator[dict[str, Any]]:
        """Yield a stage's tasks: one a layer, and a group a target."""
        plans = [found for name, found in self.plans.items() if name not in self.up_to_date]
        for found in plans:
            for node in found.nodes(stage):
                yield self._layer_task(found, node)
        groups = [f"{stage}:{found.target.name}" for found in plans if found.nodes(stage)]
        yield {"basename": stage, "actions": None, "task_dep": groups, "meta": {"graph": self}}

    def pack(self) -> Iterator[dict[str, Any]]:
        """Yield the tasks that write the built models' folders."""
        for target, found in self.plans.items():
            yield self._pack_task(target, found)

    def accept(self) -> Iterator[dict[str, Any]]:
        """Yield the tasks that lock the sources as they are now."""
        for target, found in self.plans.items():

            def act(found: Plan = found) -> Any:
                plans = self.plans.values()
                return reported(lambda: self.lock.accept(self.builder, found, plans), {})

            yield {"basename": "lock", "name": target, "actions": [act], "io": {"capture": False}}

    def _is_up_to_date(self, node: Node) -> bool:
        """Ask doit's database whether a layer's task is up to date."""
        database = Globals.dep_manager
        needs = {self.builder.manifest_path(need) for need in node.needs}
        task = SimpleNamespace(name=node.name, file_dep=needs, targets=(), uptodate=KNOWN)
        told = self._layer_told(node)  # which looks for the target, too
        return (
            not database.status_is_ignore(task)
            and told(task, database.get_values(node.name))
            and database.get_status(task, {}).status == "up-to-date"
        )

    def _layer_told(self, node: Node) -> Told:
        path = self.builder.manifest_path(node)

        def odd(values: Mapping[str, Any]) -> list[Reason]:
            # A build that was cut off changes manifests before doit's database, which then speaks
            # of older ones.
            if as_left(path, values.get("left")):
                return []
            return [Reason(f"its manifest {NOT_LEFT}", (path,))]  # a name: one fact for all layers

        def differs(values: Mapping[str, Any]) -> list[Reason]:
            if node.stage != "extract":
                return []  # the manifest that is there tells more
            return reasons.of_files(values.get("look"), extract.look(node))

        return Told(node.order.digest, path, odd, differs)

    def _layer_task(self, found: Plan, node: Node) -> dict[str, Any]:
        told = self._layer_told(node)
        path = told.made

        def build(why: str) -> dict[str, Any]:
            made: dict[str, Any] = {}
            with self.builder.store.lock.using():
                manifest = self.builder.run(found, node, why)
            if node.stage == "extract":
                made["look"] = extract.look(node)
                self.lock.check_layer(self.builder.store, found, manifest.tensors)
            if node.stage == "quantize" and _packs(node.target):
                strong = self.lock.is_strong(self.builder, found)
                self.early.layer(self.builder, found, self._folder(found), manifest, strong=strong)
            return {**made, "left": [*files.Stamp.of(path), digest_file(Path(path))]}

        return {
            "basename": f"{node.stage}:{node.target}",
            "name": node.order.layer,
            "actions": [told.action(build)],
            "file_dep": [self.builder.manifest_path(need) for need in node.needs],
            "targets": [path],
            "uptodate": [told],
            "clean": True,
            "io": {"capture": False},
            "meta": {"plan": found, "node": node, "told": told},
        }

    def _pack_task(self, target: str, found: Plan) -> dict[str, Any]:
        folder = self._folder(found)
        manifest_path = self.builder.packed_path(target)
        last = found.stages["quantize"]
        waits_for = [] if target in self.up_to_date else _large_first(found)
        layout = LAYOUTS[found.target.layout]
        parts = pack.told(found)
        told = Told(
            digest_record(parts),
            str(folder),
            lambda values: self._not_packed(found, values),
            lambda values: reasons.of_parts(values.get("parts"), parts),
        )

        def build(why: str) -> dict[str, Any]:
            plans = self.plans.values()
            built: list[Built] = []
            notes: list[str] = []  # of this lock, not of the result, which others may share

            def check(action: Action) -> None:
                notes.extend(self.lock.check_target(self.builder, found, source, action))

            def accept(made: Manifest, blake3: str | None) -> None:
                now, more = self.lock.check_output(found, source, made, blake3)
                built.append(now)
                notes.extend(more)

            builder, drafts = self.builder, self.builder.drafts
            with (
                builder.store.lock.using(),
                drafts.ending(target),
                self.early.taken(target) as begun,
            ):
                source = self.lock.check_source(builder, found, plans)
                made = pack.run(
                    builder, found, folder, manifest_path, why, check, accept, begun,
                    strong=self.lock.is_strong(builder, found),
                )  # fmt: skip
            self.lock.update(found, source, built[-1], plans)
            bits = sum(
                tensor.nbytes for name, tensor in made.tensors.items()
                if name.endswith((".safetensors", ".npz"))
            ) * 8 / found.weights  # fmt: skip
            return {
                "parts": parts,
                "outputs": pack.stamps(str(folder), list(made.tensors)),
                "size": sum(tensor.nbytes for tensor in made.tensors.values()),
                "bits_per_weight": bits,
                "notes": [*made.notes, *notes],
                "locked": self.lock.state(found),
            }

        return {
            "basename": "pack",
            "name": target,
            "actions": [told.action(build)],
            "file_dep": [
                *(self.builder.manifest_path(node) for node in last),
                *(str(path) for path in layout.sources(found.checkpoint)),
            ],
            # In reverse: doit is made to run the newest ready task first.
            "task_dep": [node.name for node in reversed(waits_for)],
            "targets": [str(manifest_path)],
            "uptodate": [told],
            "clean": [(_remove, [folder, manifest_path])],
            "io": {"capture": False},
            "meta": {"plan": found, "told": told},
        }

    def _folder(self, found: Plan) -> Path:
        return self.folder / BUILD / found.target.name

    def _not_packed(self, found: Plan, values: Mapping[str, Any]) -> list[Reason]:
        """Say how a target's folder and its lines in models.lock are not as they were left."""
        folder = str(self._folder(found))
        if not pack.intact(folder, values.get("outputs") or {}):
            return [Reason(f"{folder} {NOT_LEFT}")]
        if self.lock.state(found) != values.get("locked", ""):
            return [Reason(f"{self.lock.path.name} has another source or result than it built")]
        return []


class Told:
    """Tells doit whether a task is still told what it was told when it last ran.

    Attributes:
        digest: of what it is told now.
        made: the path of what it makes.
        odd: says, from what it returned the last time, how that is not as it left it.
        differs: says, from the same, how what it is told differs, as far as the task knows.
    """

    # doit asks for the signature of each task's, at 50 µs a time if it must be worked out.
    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("task", "values")]
    )

    def __init__(
        self,
        digest: str,
        made: str,
        odd: Callable[[Mapping[str, Any]], list[Reason]],
        differs: Callable[[Mapping[str, Any]], list[Reason]],
    ) -> None:
        self.digest = digest
        self.made = made
        self.odd = odd
        self.differs = differs
        self._why: list[Reason] = []

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool:
        """Answer doit, which passes what the task returned the last time."""
        if not values:
            known = Path(self.made).exists()
            self._why = [Reason("doit's database has no record of it" if known else NEVER)]
        elif values.get("told") != self.digest:
            self._why = self.differs(values) or [Reason(CHANGED)]
        else:
            self._why = self.odd(values)
        return not self._why

    def why(self, changed: list[str]) -> list[Reason]:
        """Return why the task runs, given the file_deps that are not what they were."""
        return (
            self._why
            or reasons.contents(Path(path).name.removesuffix(".json") for path in changed)
            or [Reason("it reads other files than before, or its manifest is missing")]
        )

    def action(self, build: Callable[[str], dict[str, Any]]) -> Callable[[list[str]], Any]:
        """Return doit's action that calls ``build`` with the reason, and keeps what it returns."""

        def act(changed: list[str]) -> Any:
            made: dict[str, Any] = {}

            def run() -> None:
                made.update(build(reasons.joined(self.why(changed))), told=self.digest)

            return reported(run, made)

        return act


def as_left(path: str, left: list[Any] | None) -> bool:
    """Tell whether a manifest is the one that was left, touched or not."""
    if not left:  # by another version
        return False
    *stamp, digest = left
    try:
        return files.Stamp.of(path) == tuple(stamp) or digest_file(Path(path)) == digest
    except FileNotFoundError:
        return False


def load(models: Path, make: Mapping[Path, Callable[[Path], None]]) -> Graph:
    """Read models.toml and plan every target.

    Args:
        models: the file.
        make: checkpoints that the project makes itself, if they are asked for.

    Raises:
        InvalidDodoFile: something in it cannot be built; doit prints the message.
    """
    try:
        read = config.load(models)
        lock = Lock.load(read.path.with_suffix(".lock"), strict=options.locked)
        store = _store(read)
        for target in read.targets.values():
            if target.source in make:
                make[target.source](target.source)
        planner = Planner(store.memos, lambda target: lock.recall(store, target))
        plans = {name: planner.plan(target) for name, target in read.targets.items()}
        lock.check_plans(plans.values())
    except (BuildError, CacheError) as error:
        raise InvalidDodoFile(str(error)) from error
    except OSError as error:
        raise InvalidDodoFile(_told(error)) from error
    folder = read.path.parent
    state = folder / STATE
    run_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
    memory = Memory(read.memory_bytes or machine_memory() // 2)
    log = Log(state / "log.jsonl")
    builder = Builder(store, state, log, run_id, read.keep, memory, Drafts(_packs))
    found = Graph(folder, builder, plans, lock)
    options.early = found.early
    return found


def _store(read: config.Config) -> Store:
    """Open the cache, and the remote if there is one to be used."""
    store = Store.at(read.cache, read_only=options.read_only)
    if not read.remote or read.mode == "off":
        return store
    from cache.remote.remote import Remote
    from cache.remote.sharing import Sharing

    remote = Remote(
        read.remote,
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
        read_only=options.read_only or read.mode == "read-only",
        secret=os.environ.get("MLX_MAKE_SIGNING_KEY", "").encode() or None,
    )
    options.remotes.append(remote)
    return replace(store, sharing=Sharing(store.actions, store.blobs, remote))


def doit_config(models: Path) -> dict[str, Any]:
    """Return DOIT_CONFIG: threads, and all state beside models.toml."""
    from tasks.cli.run import Checker

    state = models.absolute().parent / STATE
    return {
        "default_tasks": ["pack"],
        "dep_file": str(state / "doit.json"),
        "backend": "mlx-make",
        "check_file_uptodate": Checker,
        "reporter": "mlx-make",
        "num_process": threads(_devices(models)),
        "par_type": "thread",
        "verbosity": 2,
    }


def _devices(models: Path) -> Iterator[str | None]:
    """Yield what targets say of their device; what is wrong with the file ``load`` tells."""
    try:
        yield from (target.device for target in config.load(models).targets.values())
    except (BuildError, OSError):
        yield None


def reported(act: Callable[[], None], values: dict[str, Any]) -> Any:
    """Run ``act``; what a user can mend is a failure with a message and no traceback."""
    try:
        act()
    except (BuildError, CacheError) as error:
        return TaskFailed(str(error))
    except OSError as error:
        return TaskFailed(_told(error))
    return values


def _told(error: OSError) -> str:
    if files.is_full(error):
        return str(files.no_room(Path(error.filename or ".")))
    where = f"{error.filename}: " if error.filename else ""
    return (
        f"{where}{error.strerror or error}. Mend that and run doit again: what is already built "
        "is kept."
    )


def _large_first(found: Plan) -> list[Node]:
    """Return the last nodes of a target's layers in the order in which packing has them made.

    A head that is begun last ends last, while the other threads have nothing to do. The others
    keep their order, which is that of the weight files that are begun behind them.
    """
    return sorted(
        found.stages["quantize"], key=lambda node: node.order.layer not in found.outline.large
    )


def _packs(target: str) -> bool:
    """Tell whether a run means to pack a target."""
    told = (f"pack:{target}", f"report:{target}")  # which shows what is packed
    return not options.asked or any(map(options.names, told))


def _remove(folder: Path, manifest_path: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    manifest_path.unlink(missing_ok=True)

"""session: one call of doit on one models.toml: its targets, and all that was opened for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import CacheError, one_line
from cache.records.memos import Memos
from cache.store import Store
from tasks.checkpoints import adapter
from tasks.checkpoints.adapter import Adapter
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.source import ReadableSource
from tasks.checkpoints.sources import folder_of
from tasks.cli.failures import MENDABLE, as_invalid_dodo_file, message
from tasks.cli.look import Look
from tasks.cli.options import DEFAULT, Options
from tasks.cli.untouched import Untouched
from tasks.config.reader import Config
from tasks.core.errors import BuildError, CheckpointError
from tasks.core.program import COMMAND
from tasks.core.quantization import Quantize
from tasks.core.spec import Target
from tasks.core.task_names import LOCK, PACK, task_name
from tasks.core.text import plural
from tasks.core.workspace import Workspace
from tasks.execution.filling import ownership
from tasks.execution.filling.place import Stamps
from tasks.execution.log import Log
from tasks.planning import bundle, locked_sources, locked_targets, model_card
from tasks.planning.choice import Choice
from tasks.planning.lockfile import Lock
from tasks.planning.plan import Plan, Planner
from tasks.planning.refused import Refused, messages
from tasks.stages import registry

if TYPE_CHECKING:  # imported where they are wanted: a run with nothing to do wants none
    from cache.remote.remote import Remote
    from cache.remote.sharing import Sharing
    from tasks.cli.schedule import StreamingSchedule
    from tasks.execution.accept import Acceptor
    from tasks.execution.builder import Builder
    from tasks.execution.crew import Crew
    from tasks.execution.early import BackgroundPacker


FETCHING = 4  # the part of a run's memory that what is fetched at once may take


@dataclass(frozen=True)
class Session:
    """The targets of one models.toml, planned or refused, and what their tasks need to run.

    Attributes:
        workspace: where things lie beside models.toml.
        config: what models.toml says.
        options: what the command line says.
        store: the cache.
        plans: by target, of those that are asked for.
        refused: the targets of these that cannot be planned, by name. Each fails alone.
        lock: models.lock.
        remote: the remote store, if one is used.
        planner: plans targets.
        database: doit's dependency manager, if there is one.
        untouched: the targets that are up to date, where they may be skipped; ``plans`` lacks them.
        undecided: the targets that a run is to build whose modules' settings are yet to be chosen,
            as if they were not quantized: ``refused``, until their sensitivities are on record.
    """

    workspace: Workspace
    config: Config
    options: Options
    store: Store
    plans: dict[str, Plan]
    refused: dict[str, Refused]
    lock: Lock
    planner: Planner
    database: Any = None
    remote: Remote | None = None
    untouched: Untouched | None = None
    undecided: Mapping[str, Plan] = field(default_factory=dict)

    @cached_property
    def log(self) -> Log:
        """The build log."""
        return _log(self.workspace)

    @cached_property
    def builder(self) -> Builder:
        """Runs the tasks."""
        builder = _builder(self.config, self.options, self.store, self.workspace, self.log)
        return replace(builder, crew=self.crew) if self.crew else builder

    @cached_property
    def crew(self) -> Crew | None:
        """Makes the layers in place of this machine, if models.toml names a cluster."""
        if not self.config.build.cluster or self.options.read_only:
            return None
        from tasks.cli import clusters  # where there is one

        return clusters.crew(self.config, self.lock)

    @cached_property
    def schedule(self) -> StreamingSchedule | None:
        """Decides on the order of tasks, where a checkpoint comes from elsewhere."""
        if not any(plan.checkpoint.fetched for plan in self.plans.values()):
            return None
        from tasks.cli.schedule import StreamingSchedule

        return StreamingSchedule(self.builder, self.config.build.disk_bytes, self.options.packs)

    @cached_property
    def background_packer(self) -> BackgroundPacker:
        """Begins to pack targets while their layers are still made."""
        from tasks.execution.early import BackgroundPacker

        return BackgroundPacker()

    @cached_property
    def all_plans(self) -> dict[str, Plan]:
        """The plans of all targets, in the order of models.toml, that can be planned."""
        plans = {}
        checked = self.untouched.targets if self.untouched else {}  # and nothing happened since
        for name, target in self.config.targets.items():
            if name in self.plans:
                plans[name] = self.plans[name]
            elif name not in self.refused:
                with suppress(*MENDABLE):  # nobody asked for it
                    if name in checked:
                        plans[name] = self.planner.plan(target)
                    else:
                        plans[name] = _checked(
                            target, self.planner, self.workspace, self.lock, self.database
                        )
        return plans

    @cached_property
    def acceptor(self) -> Acceptor:
        """Holds the targets' sources against models.lock."""
        from tasks.execution.accept import Acceptor

        # What those read that are not asked for is a part of what is locked.
        plans = [*self.all_plans.values()]
        return Acceptor(self.lock, self.builder, plans, self.config.targets)

    @classmethod
    def open(
        cls,
        config: Config,
        options: Options = DEFAULT,
        makers: Mapping[Path, Callable[[Path], None]] | None = None,
        database: Any = None,
    ) -> Session:
        """Plan the targets of a models.toml that has been read.

        Args:
            config: what models.toml says.
            options: what the command line says.
            makers: what makes a checkpoint that this project makes itself, by its folder.
            database: doit's dependency manager, which knows what the tasks left.

        Raises:
            InvalidDodoFile: nothing that is asked for can be built; doit prints the message. Of
                ``--locked``, that anything cannot.
        """
        with as_invalid_dodo_file(), ExitStack() as if_it_fails:
            lock = Lock.load(config.path.with_suffix(".lock"), strict=options.locked)
            store = Store.at(config.cache.dir, read_only=options.read_only)
            remote = _open_remote(config, store.memos, read_only=options.read_only)
            if remote:
                store = replace(store, sharing=_sharing(config, store, remote))
                if_it_fails.callback(store.close)
            for target in config.targets.values():
                folder = folder_of(target.source)
                if folder and makers and folder in makers:
                    makers[folder](folder)
            workspace = Workspace(config.path.parent)
            planner = _planner(store, lock, options, config, workspace)
            untouched = None
            if options.skip_targets and not options.locked:
                saved = partial(database.backend.saved, without=options.looked_at)
                look = Look(workspace, lock, database).finds_nothing_to_do
                untouched = Untouched(workspace, lock, planner, saved, look)
            asked = config.targets if options.locked else options.targets(config.targets)
            targets = [target for name, target in config.targets.items() if name in asked]
            plans, refused = _plan(planner, workspace, lock, targets, untouched, database)
            undecided = {
                name: plan
                for name, plan in plans.items()
                if plan.undecided and not _only_runs(options, name)
            }
            refused |= {name: _undecided(plans.pop(name)) for name in undecided}
            if not (untouched and untouched.targets) and not undecided:
                _check_any_is_planned(options, plans, refused)
            if config.build.cluster and plans and not options.read_only:
                _check_cluster(config.build.cluster)
            if not undecided:
                locked_targets.check_plans(lock, plans.values())
            if_it_fails.pop_all()
        return cls(
            workspace, config, options, store, plans, refused, lock, planner, database, remote,
            untouched,
            {name: plan for name, plan in undecided.items() if _is_asked(options, name)},
        )  # fmt: skip

    def _leave_crew(self) -> None:
        if crew := vars(self).get("crew"):
            crew.close()

    def abandon(self) -> None:
        """Have all that goes on behind the tasks stop before long; wait for nothing."""
        if "background_packer" in vars(self):
            self.background_packer.abandon()
        self._await_threads()

    def _await_threads(self) -> None:
        if "builder" in vars(self):
            from tasks.execution import ended_threads

            ended_threads.wait(self.builder.threads)

    def finish(self) -> None:
        """End what goes on behind the tasks, and say what the remote store was sent and gave."""
        if self.untouched:
            self.untouched.save()
        self._leave_crew()
        if "background_packer" in vars(self):
            self.background_packer.stop()
        if "builder" in vars(self):
            from tasks.execution import changed_files  # as the builder: not for nothing to do

            self._await_threads()
            self.builder.streaming.end()
            for plan in self.plans.values():
                with suppress(CheckpointError):  # its packing says so, if it comes to that
                    changed_files.refuse_wrong_files(self.builder, [plan], waits=False)
        if not self.remote:
            return
        try:
            pushed = self.remote.finish()
        except (CacheError, OSError) as error:  # what was built is built
            print(f"warning: {message(error)}", file=sys.stderr)
            return
        if self.remote.fetched_bytes:
            print(f"{self.remote.name}: {self.remote.fetched_bytes / 1e6:,.1f} MB fetched")
        if pushed.objects:
            print(
                f"{self.remote.name}: {plural(pushed.objects, 'object')} uploaded, "
                f"{pushed.bytes / 1e6:,.1f} MB; the last {pushed.seconds:.1f} s were for that alone"
            )

    def close(self) -> None:
        """Let go of the cluster, the store and the remote: what is queued for that is dropped."""
        self._leave_crew()
        self.store.close()


def _check_cluster(address: str) -> None:
    from tasks.cli import clusters  # where there is one

    clusters.check_installed(address)


def _builder(
    config: Config, options: Options, store: Store, workspace: Workspace, log: Log
) -> Builder:
    from tasks.execution.builder import Builder
    from tasks.execution.filling.draft import Drafts
    from tasks.execution.resources import DiskBudget, MemoryBudget, cores
    from tasks.execution.streaming.streaming import Streaming

    keep = None if config.cache.keep is None else frozenset(config.cache.keep)
    passes = registry.leaves().isdisjoint(keep or ())
    return Builder(
        store,
        workspace,
        log,
        options.run,
        keep,
        MemoryBudget(
            _memory(config),
            cores() if config.build.cluster else sys.maxsize,  # of more threads, that mostly wait
        ),
        Drafts(store.blobs, options.packs, workspace.drafts),
        Streaming(store, DiskBudget(), drops=passes),
    )


def _sharing(config: Config, store: Store, remote: Remote) -> Sharing:
    from cache.remote.sharing import Sharing

    memory = _memory(config) // FETCHING
    return Sharing(store.actions, store.blobs, store.memos, remote, memory=memory)


def _memory(config: Config) -> int:
    """Return how many bytes tasks may hold at once."""
    from tasks.execution.resources import machine_memory

    return config.build.memory_bytes or machine_memory() // 2


def _planner(
    store: Store, lock: Lock, options: Options, config: Config, workspace: Workspace
) -> Planner:
    """Return what plans targets of their sources as they are locked, unless asked to lock anew."""

    def is_newest(target: Target) -> bool:
        return not options.read_only and options.requests(task_name(LOCK, target.name))

    def open_source(target: Target) -> ReadableSource:
        return locked_sources.open_source(lock, store, target, newest=is_newest(target))

    def read_adapter(target: Target) -> Adapter:
        opened = locked_sources.open_adapter(lock, store, target, newest=is_newest(target))
        return adapter.read(opened, store, target.adapter_name or "")

    def recall(target: Target, source: ReadableSource) -> Checkpoint | None:
        return locked_sources.recall(lock, store, target, source)

    def choose(plan: Plan, asked: Quantize) -> Choice:
        from tasks.execution import recorded  # only where there is a budget
        from tasks.planning import choosing

        def sensitivities() -> choosing.Sensitivities | None:
            builder = _builder(config, options, store, workspace, _log(workspace))
            return recorded.sensitivities(builder, plan, recovers=options.recovers)

        anew = not options.read_only and options.requests(task_name(LOCK, plan.target.name))
        return choosing.choose(plan, asked, lock, sensitivities, anew=anew)

    return Planner(store.memos, open_source, recall, config.quality, choose, read_adapter)


def _log(workspace: Workspace) -> Log:
    return Log(workspace.state / "log.jsonl")


def _plan(
    planner: Planner,
    workspace: Workspace,
    lock: Lock,
    targets: Iterable[Target],
    untouched: Untouched | None,
    database: Any,
) -> tuple[dict[str, Plan], dict[str, Refused]]:
    """Return the targets that can be planned, and those that cannot; not those ``untouched``."""
    plans, refused = {}, {}
    for target in targets:
        try:
            if untouched and untouched.holds(target):
                continue
            plan = _checked(target, planner, workspace, lock, database)
            if not (untouched and untouched.finds_nothing_to_do(plan)):
                plans[target.name] = plan
        except MENDABLE as error:
            refused[target.name] = Refused(target, message(error))
    return plans, refused


def _checked(
    target: Target, planner: Planner, workspace: Workspace, lock: Lock, database: Any
) -> Plan:
    """Return a target's plan, once all is checked that can be before any work."""
    plan = planner.plan(target)
    model_card.check(plan, planner.memos)
    bundle.overlay(plan)
    stamps = last_stamps(database, target.name)
    ownership.check(workspace, plan, lock, planner.memos, stamps)
    return plan


def last_stamps(database: Any, target: str) -> Stamps:
    """Return the stamps of a target's files when they were last built, as far as they are known."""
    values = database.get_values(task_name(PACK, target)) if database else {}
    return values.get("outputs") or {}


def _check_any_is_planned(
    options: Options, plans: Iterable[str], refused: Mapping[str, Refused]
) -> None:
    """Refuse a run of which nothing can be planned; of ``--locked``, also of which a part cannot.

    Raises:
        BuildError: that is so.
    """
    if options.locked:
        wanted = [*refused.values()]
    elif options.cleans or any(_is_asked(options, target) for target in plans):
        wanted = []
    else:
        wanted = [each for target, each in refused.items() if _is_asked(options, target)]
    if wanted:
        raise BuildError(*messages(wanted))


def _is_asked(options: Options, target: str) -> bool:
    """Tell whether a command is for a target, by any of its tasks."""
    tasks = [task_name(group, target) for group in registry.groups()]
    return not options.requested_tasks or any(map(options.requests, tasks))


def _only_runs(options: Options, target: str) -> bool:
    """Tell whether a run asks of a target for nothing that its settings have a part in."""
    others = {LOCK, *(stage.group for stage in registry.RUNNING)}
    building = [task_name(group, target) for group in registry.groups() if group not in others]
    return bool(options.requested_tasks) and not any(map(options.requests, building))


def _undecided(plan: Plan) -> Refused:
    task = task_name(registry.SENSITIVITY.group, plan.target.name)
    return Refused(
        plan.target,
        "how its modules are quantized is chosen once it is known what each setting would cost. "
        f"{COMMAND} {task} finds out, and so does a build of it.",
        undecided=True,
    )


def _open_remote(config: Config, memos: Memos, *, read_only: bool) -> Remote | None:
    """Open the remote store, if there is one to be used."""
    if not config.cache.remote or config.cache.mode == "off":
        return None
    from cache.remote.address import risks
    from cache.remote.remote import Remote

    def warn(text: str) -> None:
        print(f"warning: {one_line(text)}", file=sys.stderr)

    secret = os.environ.get("MLX_MAKE_SIGNING_KEY", "").encode() or None
    remote = Remote(
        config.cache.remote,
        warn=warn,
        read_only=read_only or config.cache.mode == "read-only",
        secret=secret,
    )
    for risk in risks(config.cache.remote, signed=secret is not None):
        question = [remote.name, risk]
        if not memos.get("warned", question, bool):
            warn(f"remote {remote.name}: {risk}")
            memos.put("warned", question, True)  # once is enough
    return remote

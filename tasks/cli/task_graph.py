"""task_graph: doit's tasks from plans: one a stage and layer, and one that packs a target."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cache.errors import one_line, printable
from tasks.cli.failures import as_invalid_dodo_file, values_or_failure
from tasks.cli.look import Look
from tasks.cli.refused_tasks import fails, refused_tasks
from tasks.cli.session import Session, last_stamps
from tasks.cli.up_to_date import manifest_state
from tasks.core.errors import BuildError
from tasks.core.task_names import LOCK, PACK, task_name
from tasks.core.workspace import BUILD
from tasks.execution import cleaning
from tasks.execution.filling import place
from tasks.planning import bundle, locked_sources
from tasks.planning.node import Node, total
from tasks.planning.plan import Plan
from tasks.stages import registry
from tasks.stages.stage import LeafStage, Stage


@dataclass(frozen=True)
class TaskGraph:
    """doit's tasks that build the targets of a session.

    Attributes:
        session: the targets, and what the tasks need.
        database: doit's dependency manager.
        runs_models: whether models are to be run, for which the tasks are many.
    """

    session: Session
    database: Any
    runs_models: bool = False
    _sensitivities: dict[str, set[Node]] = field(default_factory=dict)

    @cached_property
    def skipped(self) -> frozenset[str]:
        """The targets whose layers are all up to date, in a run that may skip them.

        Of a run that names no task, they are to be packed; else its plans would not have them.
        """
        options = self.session.options
        if not (options.skip_layers and options.asks_of_models):
            return frozenset()
        return self._up_to_date(self.session.plans.values(), lambda plan: plan.stages)

    @cached_property
    def measured(self) -> frozenset[str]:
        """Those of the targets that are ``skipped`` whose measures are all up to date as well."""
        plans = [self.session.plans[name] for name in self.skipped]
        return self._up_to_date(plans, lambda plan: plan.measures)

    def _up_to_date(
        self, plans: Iterable[Plan], stages: Callable[[Plan], dict[str, list[Node]]]
    ) -> frozenset[str]:
        up_to_date = set()
        for plan in plans:
            name = plan.target.name
            if self._look.finds_layers_up_to_date(stages(plan)):
                up_to_date.add(name)
                self.database.backend.let_go(name)
        return frozenset(up_to_date)

    @cached_property
    def _look(self) -> Look:
        return Look(self.session.workspace, self.session.lock, self.database)

    def stage_creators(self) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
        """Return what yields each stage's tasks, as doit names it in a dodo.py."""
        plans, refused = self.session.plans.values(), self.session.refused
        stages = [
            stage  # where none has an adapter, there is nothing to fuse
            for stage in registry.PIPELINE
            if refused or not plans or any(plan.nodes(stage.name) for plan in plans)
        ]
        if not self.session.options.builds_all:  # of a plain doit's tasks, a fifth would be unused
            stages += registry.MEASURES
        if self.runs_models or self.session.undecided:
            stages += registry.RUNNING
        used = {name for plan in self.session.plans.values() for name in plan.specs}
        known = {stage.name for stage in stages}
        stages += [s for s in registry.stages() if s.name in used - known]
        named = {f"task_{stage.group}": self._named(stage) for stage in registry.ASKED_FOR}
        return named | {f"task_{stage.group}": self._stage_creator(stage) for stage in stages}

    def _named(self, stage: Stage[Any]) -> Callable[[], Iterator[dict[str, Any]]]:
        """Return what yields a stage's group alone, so that it is listed."""

        def create() -> Iterator[dict[str, Any]]:
            yield {"basename": stage.group, "actions": None}

        create.__doc__ = stage.__doc__
        return create

    def _stage_creator(self, stage: Stage[Any]) -> Callable[[], Iterator[dict[str, Any]]]:
        def create() -> Iterator[dict[str, Any]]:
            with as_invalid_dodo_file():
                yield from self.stage(stage)

        create.__doc__ = stage.__doc__
        return create

    def stage(self, stage: Stage[Any]) -> Iterator[dict[str, Any]]:
        """Yield a stage's tasks: one a layer, and a group a target."""
        skipped = self.measured if stage in registry.MEASURES else self.skipped
        plans = [p for target, p in self.session.plans.items() if target not in skipped]
        plans += self.session.undecided.values()
        nodes = {plan.target.name: self._nodes(plan, stage) for plan in plans}
        for plan in plans:
            for node in nodes[plan.target.name]:
                yield self._layer_task(plan, node)
        yield from refused_tasks(self.session, stage.group, but={t for t in nodes if nodes[t]})
        if self.runs_models and stage in registry.ASKED_FOR:
            cannot = (
                plan for plan in self.session.plans.values()
                if plan in plans and not nodes[plan.target.name]
            )  # fmt: skip
            yield from self._cannot_run(stage, cannot)
        targets = [target for target, of_target in nodes.items() if of_target]
        of = dict.fromkeys((*targets, *self.session.refused))
        groups = [task_name(stage.group, target) for target in of]
        # The reporter finds the session here: doit hands it tasks, and nothing else.
        meta = {"session": self.session}
        yield {"basename": stage.group, "actions": None, "task_dep": groups, "meta": meta}

    def _nodes(self, plan: Plan, stage: Stage[Any]) -> list[Node]:
        """Return a stage's nodes that a run may ask for; of a target that is undecided, first."""
        if plan.target.name in self.session.undecided:
            first = self._first(plan.target.name)
            return [node for node in plan.nodes(stage.name) if node in first]
        if self.runs_models or stage.name in (*plan.specs, *(s.name for s in registry.MEASURES)):
            return plan.nodes(stage.name)
        return []

    def _first(self, target: str) -> set[Node]:
        """Return the nodes that sensitivities take, of a target that is undecided."""
        if target not in self._sensitivities:
            left = [*self.session.undecided[target].nodes(registry.SENSITIVITY.name)]
            found: set[Node] = set()
            while left:
                node = left.pop()
                if node not in found:
                    found.add(node)
                    left += node.needs
            self._sensitivities[target] = found
        return self._sensitivities[target]

    def _cannot_run(self, stage: Stage[Any], plans: Iterable[Plan]) -> Iterator[dict[str, Any]]:
        """Yield tasks that fail, of targets whose models no library runs; they are in no group."""
        for plan in plans:
            target = plan.target
            task = task_name(stage.group, target.name)
            message = (
                f"{target.name} is not run: {plan.why_not_run.rstrip('.')}. Name a variant of "
                'it with layout = "mlx-lm", if mlx-lm has it, too.'
            )

            def fail(task: str = task, message: str = message) -> dict[str, Any]:
                with self.session.builder.logged(task, "it cannot be run"):
                    raise BuildError(message)

            def act(fail: Callable[[], dict[str, Any]] = fail) -> Any:
                return values_or_failure(fail)

            if stage.group in (self.session.options.requested_tasks or ()):
                print(f"note: {message}", file=sys.stderr)
            yield {"basename": task, "actions": [act], "io": {"capture": False}}

    def pack(self) -> Iterator[dict[str, Any]]:
        """Yield the tasks that write the built models' folders."""
        for plan in self.session.plans.values():
            yield self._pack_task(plan)
        for target in self.session.refused:
            clean = [(self._clean_pack, [target])]
            task = fails(self.session, PACK, target)
            yield {"basename": PACK, "name": target, "clean": clean, **task}

    def accept(self) -> Iterator[dict[str, Any]]:
        """Yield the tasks that lock the sources as they are now."""
        session = self.session
        for target, plan in {**session.plans, **session.undecided}.items():

            def accept(plan: Plan = plan) -> dict[str, Any]:
                for change in session.acceptor.accept(plan):
                    print(one_line(change))
                return {}

            def act(accept: Any = accept) -> Any:
                return values_or_failure(accept)

            yield {"basename": LOCK, "name": target, "actions": [act], "io": {"capture": False}}
        for target in [each for each in session.refused if each not in session.undecided]:
            yield {"basename": LOCK, "name": target, **fails(session, LOCK, target)}

    def _layer_task(self, plan: Plan, node: Node) -> dict[str, Any]:
        check = self._look.layer_check(node)
        return {
            "basename": task_name(node.stage.group, node.target),
            "name": node.layer,
            "actions": [check.action(lambda why: self._run_layer(plan, node, why))],
            "file_dep": self._look.made_of(node),
            "targets": [check.output],
            "uptodate": [check],
            "clean": True,
            "io": {"capture": False},
            "meta": {"plan": plan, "node": node, "check": check},
        }

    def _run_layer(self, plan: Plan, node: Node, why: str) -> dict[str, Any]:
        """Run a stage on a layer; return the values that doit keeps of the task."""
        session, builder = self.session, self.session.builder
        values: dict[str, Any] = {}
        if not (session.crew and session.crew.takes(plan, node)):
            builder.streaming.enter(node.name)  # before it holds what others might wait for
        with builder.store.lock.using():
            manifest = builder.run(plan, node, why)
        if isinstance(node.stage, LeafStage):
            values["look"] = node.stage.watched(node.spec)
            locked_sources.check_layer(session.lock, builder.store, plan, manifest.tensors)
        if node in plan.packed and session.options.packs(node.target):
            with_blake3 = session.acceptor.wants_blake3(plan)
            session.background_packer.add_layer(builder, plan, manifest, with_blake3=with_blake3)
        if summary := node.stage.summary(builder.contents(plan, node, manifest)):
            lines = [f"{node.target}: {summary}"]
            lines += [f"note: {node.target}: {printable(note)}" for note in manifest.notes]
            values["summary"] = "\n".join(lines)
        return {**values, "left": manifest_state(node.manifest_path(session.workspace))}

    def _pack_task(self, plan: Plan) -> dict[str, Any]:
        target = plan.target.name
        waits_for = [] if target in self.skipped else _large_first(plan)
        parts = bundle.params(plan)
        check = self._look.pack_check(plan, parts)
        return {
            "basename": PACK,
            "name": target,
            "actions": [check.action(lambda why: {"parts": parts, **self._run_pack(plan, why)})],
            "file_dep": self._look.packed_of(plan),
            # In reverse: doit is made to run the newest ready task first.
            "task_dep": [node.name for node in reversed(waits_for)],
            "targets": [str(self.session.workspace.packed(target))],
            "uptodate": [check],
            "clean": [(self._clean_pack, [target])],
            "io": {"capture": False},
            "meta": {"plan": plan, "check": check},
        }

    def _run_pack(self, plan: Plan, why: str) -> dict[str, Any]:
        """Write a target's folder; return the values that doit keeps of the task."""
        from tasks.execution.pack import Packing  # not where there is nothing to do

        session, target = self.session, plan.target.name
        with (
            session.builder.store.lock.using(),
            session.background_packer.taken(target) as begun,
        ):
            acceptance = session.acceptor.target(plan)
            stamps = last_stamps(self.database, target)
            packing = Packing(session.builder, plan, acceptance, begun, stamps)
            manifest = packing.run(why)
        acceptance.update_lock()
        # As mlx_lm.convert prints it: of tensors, without the headers of their files.
        bits = 8 * total(bundle.specs(plan).values())
        return {
            "outputs": place.stamps(str(session.workspace.built(target)), list(manifest.tensors)),
            "size": sum(tensor.nbytes for tensor in manifest.tensors.values()),
            "bits_per_weight": bits / plan.weights,
            "notes": [*manifest.notes, *acceptance.notes, *packing.notes],
            "locked": session.lock.state(plan),
        }

    def _clean_pack(self, target: str, dryrun: bool) -> None:
        """Remove what was built of a target; what people put there stays, and is named."""
        stamps, name = last_stamps(self.database, target), f"{BUILD}/{target}"
        try:
            workspace = self.session.workspace
            for line in cleaning.clean(workspace, target, stamps, name=name, dryrun=dryrun):
                print(one_line(line))
        except BuildError as error:  # of a link that leads nowhere, for one
            print(f"warning: {error}", file=sys.stderr)


def _large_first(plan: Plan) -> list[Node]:
    """Return the last nodes of a target's layers in the order in which packing is to have them.

    A head that is begun last ends last, while the other threads have nothing to do. The others
    keep their order, which is that of the weight files that are begun behind them.
    """
    return sorted(plan.last, key=lambda node: node.layer not in plan.shared.large)

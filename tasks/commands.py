"""commands: ``doit plan`` and ``doit why``: what a run would do, what it did, and the reasons."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl
from doit.exceptions import InvalidCommand

from cache.log import Entry
from tasks import reasons
from tasks.forecast import RUN, UP_TO_DATE, Forecast, Saved, Step, estimate
from tasks.graph import Graph, as_left
from tasks.plan import Node, Plan
from tasks.progress import size

SOMETHING_TO_DO = 1  # exit status of ``doit plan``
WIDTH = 80
JSON = {
    "name": "json",
    "short": "",
    "long": "json",
    "type": bool,
    "default": False,
    "help": "print JSON, for scripts",
}


@dataclass(frozen=True)
class _Group:
    """Steps that are told in one line."""

    target: str
    stage: str
    state: str
    certain: bool
    why: tuple[str, ...]


class _Foresight(DoitCmdBase):  # type: ignore[misc]
    """What both commands need: the tasks that are meant, and their steps."""

    def graph(self) -> Graph:
        """Return the graph that the tasks are of."""
        for task in self.task_list:
            if task.meta and "graph" in task.meta:
                graph: Graph = task.meta["graph"]
                return graph
        raise InvalidCommand("there are no models here")

    def steps(self, names: list[str]) -> list[Step]:
        """Return the steps that a run of the tasks ``names`` has, as far as they are of models."""
        control = TaskControl(self.task_list)
        control.process(names or None)
        forecast = Forecast(self.graph().builder, self._saved)
        found: dict[str, Step] = {}
        for name in control.selected_tasks:
            for task in _leaves(control.tasks, name):
                for step in self._of(forecast, task):
                    found[step.task] = step
        if not found:
            raise InvalidCommand(f"{', '.join(names)}: no task that builds models")
        return list(found.values())

    def _of(self, forecast: Forecast, task: Any) -> Iterator[Step]:
        if not task.meta or "plan" not in task.meta:
            return
        plan: Plan = task.meta["plan"]
        node: Node | None = task.meta.get("node")
        last = [node] if node else plan.stages["quantize"]
        for of in (n for one in last for n in _closure(one)):
            yield forecast.step(plan, of)
        if not node:
            yield forecast.pack(plan, self._changed_files(task))

    def _saved(self, name: str) -> Saved:
        task = self._tasks[name]
        values = self.dep_manager.get_values(name)
        if node := task.meta.get("node"):
            intact = as_left(task.targets[0], values.get("left"))
            told = values.get("told") == node.order.digest
        else:
            plan = task.meta["plan"]
            intact = self.graph().is_packed(plan, values)
            told = values.get("told") == task.uptodate[0][0].digest
        states = {path: self.dep_manager._get(name, path) for path in task.file_dep}
        inputs = {path: state[-1] for path, state in states.items() if state}
        return Saved(values, intact, told, inputs)

    def _changed_files(self, task: Any) -> list[str]:
        """Return a packing's inputs that are no manifests and not as they were."""
        status = self.dep_manager.get_status(task, self._tasks, get_log=True)
        reasons_found = getattr(status, "reasons", {})
        manifests = str(self.graph().builder.state)
        paths = [
            *reasons_found.get("changed_file_dep", ()), *reasons_found.get("added_file_dep", ())
        ]  # fmt: skip
        return [path for path in paths if not path.startswith(manifests)]

    @property
    def _tasks(self) -> dict[str, Any]:
        if "by_name" not in self.__dict__:
            self.by_name = {task.name: task for task in self.task_list}
        return self.by_name


class PlanCommand(_Foresight):
    """``doit plan``."""

    name = "plan"
    doc_purpose = "say what a run would do and why, without doing it"
    doc_usage = "[TASK ...]"
    doc_description = (
        "Exit status 0: there is nothing to do; 1: there is; 3: it cannot be told, with the error."
    )
    cmd_options = (JSON,)

    def _execute(self, json: bool, pos_args: list[str]) -> int:
        steps = self.steps(pos_args)
        log = self.graph().builder.log.entries()
        seconds = estimate(steps, log)
        if json:
            self.outstream.write(_as_json(steps, seconds))
        else:
            for line in _told(steps, seconds):
                self.outstream.write(f"{line}\n")
        return SOMETHING_TO_DO if any(step.state != UP_TO_DATE for step in steps) else 0


class WhyCommand(_Foresight):
    """``doit why``."""

    name = "why"
    doc_purpose = "say why a task would run, and why it last ran"
    doc_usage = "TASK ..."
    doc_description = "TASK is a task's name, of a layer too: quantize:llama-7b:layers.0"
    cmd_options = ()

    def _execute(self, pos_args: list[str]) -> int:
        if not pos_args:
            raise InvalidCommand("name a task: doit list --all shows them")
        last: dict[str, Entry] = {entry.task: entry for entry in self.graph().builder.log.entries()}
        wanted = {
            task.name
            for name in TaskControl(self.task_list)._filter_tasks(pos_args)
            for task in _leaves(self._tasks, name)
        }
        for step in self.steps(pos_args):
            if step.task in wanted:
                for line in self._told(step, last.get(step.task)):
                    self.outstream.write(f"{line}\n")
        return 0

    def _told(self, step: Step, entry: Entry | None) -> Iterator[str]:
        yield step.task
        sure = "" if step.certain else ", unless its inputs come out as they were"
        yield f"  now: {step.state}{sure}"
        for reason in step.why:
            yield from textwrap.wrap(
                reason, WIDTH, initial_indent="    ", subsequent_indent="      "
            )
        if entry is None:
            yield "  last run: none on record"
            return
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.start))
        yield f"  last run: {when}, {entry.outcome} in {entry.seconds:.2f} s"
        yield from textwrap.wrap(
            entry.why, WIDTH, initial_indent="    ", subsequent_indent="      "
        )


def _leaves(tasks: dict[str, Any], name: str) -> Iterator[Any]:
    """Yield a task, or those that a group stands for."""
    task = tasks[name]
    if task.actions:
        yield task
        return
    for below in task.task_dep:
        yield from _leaves(tasks, below)


def _closure(node: Node) -> Iterator[Node]:
    for need in node.needs:
        yield from _closure(need)
    yield node


def _told(steps: list[Step], seconds: float | None) -> Iterator[str]:
    """Yield the plan's lines: by target and stage, layers of one state and reason together."""
    groups: dict[_Group, list[Step]] = {}
    targets = list(dict.fromkeys(step.target for step in steps))
    stages = list(dict.fromkeys(step.stage for step in steps))
    for step in sorted(steps, key=lambda s: (targets.index(s.target), stages.index(s.stage))):
        why = tuple(reasons.short(reason) for reason in step.why)
        group = _Group(step.target, step.stage, step.state, step.certain, why)
        groups.setdefault(group, []).append(step)
    idle = {step.target for step in steps} - {s.target for s in steps if s.state != UP_TO_DATE}
    target, said = "", ()  # type: str, tuple[str, ...]
    for group, members in groups.items():
        if group.target in idle:
            continue
        if group.target != target:
            target, said = group.target, ()
            yield target
        state = group.state if group.certain else f"{group.state}?"
        layers = reasons.some([step.layer for step in members]) if group.stage != "pack" else ""
        yield f"  {group.stage:<9}{state:<11}{_count(members)}{layers}".rstrip()
        for reason in group.why if group.why != said else ():
            yield from textwrap.wrap(
                reason, WIDTH, initial_indent=" " * 13, subsequent_indent=" " * 15
            )
        said = group.why
    if idle:
        yield f"up to date: {', '.join(sorted(idle))}"
    todo = [step for step in steps if step.state != UP_TO_DATE]
    if not todo:
        return
    if any(not step.certain for step in todo):
        yield "run?: may come out as it was, which is not known before what it reads is made"
    reads, writes = sum(s.reads for s in todo), sum(s.writes for s in todo)
    cached = sum(s.writes for s in todo if s.stage != "pack")
    packed = writes - cached
    took = (
        f"about {_seconds(seconds)}, by earlier runs" if seconds is not None else "time not known"
    )
    yield (
        f"{len(todo)} of {len(steps)} tasks; reads {size(reads)}, writes {size(writes)} "
        f"({size(cached)} into the cache, {size(packed)} into build/); {took}"
    )


def _count(members: list[Step]) -> str:
    return f"{len(members)}: " if members[0].stage != "pack" else ""


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _as_json(steps: Iterable[Step], seconds: float | None) -> str:
    steps = list(steps)
    todo = [step for step in steps if step.state == RUN]
    record = {
        "tasks": [asdict(step) for step in steps],
        "seconds": seconds,
        "bytes_read": sum(step.reads for step in todo),
        "bytes_written": sum(step.writes for step in todo),
        "disk_bytes": sum(step.writes for step in todo),
    }
    return json.dumps(record, indent=1) + "\n"

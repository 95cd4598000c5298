"""commands: ``doit plan`` and ``doit why``: what a run would do, what it did, and the reasons."""

from __future__ import annotations

import json
import shutil
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.exceptions import InvalidCommand

from tasks.cli import invocation
from tasks.cli.command import Command
from tasks.cli.commands.estimate import estimate
from tasks.cli.commands.forecasting import forecast, graph
from tasks.cli.run import Control
from tasks.core.text import duration, plural, size
from tasks.execution.log import Entry
from tasks.execution.resources import threads
from tasks.planning.forecast import SETTLED, UP_TO_DATE, Forecast, Step
from tasks.planning.sizes import Moved
from tasks.stages.reasons import Reason

SOMETHING_TO_DO, REFUSED = 1, 3  # exit status of ``doit plan``
MOST_COLUMNS = 80
UNCERTAIN = "?: what it reads is made first, and may come out as it was or be on record already"
OVERVIEW = "overview"  # reports/index.html, of all targets
MAY_BE_REFUSED = (
    "a checkpoint whose tensors are not those of models.lock is an error until doit lock accepts it"
)
JSON = {
    "name": "as_json",
    "short": "",
    "long": "json",
    "type": bool,
    "default": False,
    "help": "print JSON, for scripts",
}


class _Foresight(Command, DoitCmdBase):  # type: ignore[misc]
    """What both commands have in common. They write nothing, and so need no lock."""

    def execute(self, params: Any, args: list[str]) -> int:
        """Load the tasks, and say what is asked."""
        invocation.read_only, invocation.asked = True, args
        try:
            return int(super().execute(params, args))
        finally:
            invocation.read_only, invocation.asked = False, None

    def forecast(self) -> tuple[Forecast, list[Step]]:
        """Return what a run of the tasks that are asked for does, and what these alone do."""
        control = Control(self.task_list)
        control.process(self.sel_tasks)
        self._tasks = control.tasks
        leaves = [leaf for name in control.selected_tasks for leaf in self._leaves(name)]
        asked = [name for name in leaves if "told" in (self._tasks[name].meta or {})]
        if not asked:
            raise InvalidCommand(f"{' '.join(self.sel_tasks)}: that builds no model")
        found = forecast(self._tasks, asked, self.dep_manager)
        return found, [found.steps[name] for name in dict.fromkeys(asked)]

    def _leaves(self, name: str) -> Iterator[str]:
        """Yield a task's name, or those that a group stands for."""
        task = self._tasks[name]
        if task.actions:
            yield name
            return
        for below in task.task_dep:
            yield from self._leaves(below)

    def _log(self) -> Iterator[Entry]:
        return graph(self.task_list).builder.log.entries()


class PlanCommand(_Foresight):
    """``doit plan``."""

    name = "plan"
    doc_purpose = "say what a run would do and why, without doing it"
    doc_usage = "[TASK ...]"
    doc_description = """\
Exit status 0: there is nothing to do, 1: there is, 3: an error, also if models.lock refuses it."""
    cmd_options = (JSON,)

    def _execute(self, as_json: bool) -> int:
        found, _ = self.forecast()
        steps, refused = list(found.steps.values()), list(found.refused.values())
        devices = {plan.target.device for plan in graph(self.task_list).plans.values()}
        seconds = estimate(steps, self._log(), threads(devices))
        if as_json:
            self.outstream.write(_as_json(steps, seconds, refused))
        else:
            self.outstream.writelines(f"ERROR: {message}\n" for message in refused)
            locked = bool(graph(self.task_list).lock.sources)
            self.outstream.writelines(f"{line}\n" for line in _told(steps, seconds, locked))
        if refused:
            return REFUSED
        return SOMETHING_TO_DO if any(step.state not in SETTLED for step in steps) else 0


class WhyCommand(_Foresight):
    """``doit why``."""

    name = "why"
    doc_purpose = "say why a task would run, and why it last ran"
    doc_usage = "TASK ..."
    doc_description = "TASK is a task's name, of a layer too: quantize:llama-7b:layers.0"
    cmd_options = ()

    def _execute(self) -> int:
        if self.sel_default_tasks:
            raise InvalidCommand("why what? Name a task; doit list --all shows them.")
        last = {entry.task: entry for entry in self._log()}
        found, asked = self.forecast()
        self.outstream.writelines(f"ERROR: {message}\n" for message in found.refused.values())
        for step in asked:
            self.outstream.writelines(f"{line}\n" for line in _why(step, last.get(step.task)))
        return 0


def _why(step: Step, entry: Entry | None) -> Iterator[str]:
    yield step.task
    yield f"  now: {step.state}{'' if step.certain else '?'}"
    for reason in step.why:
        yield from _indented(_whole(reason), 4)
    if not step.certain:
        yield from _indented(UNCERTAIN, 4)
    if entry is None:
        yield "  last run: none on record"
        return
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.start))
    head = f"last run: {when}, {entry.outcome} in {entry.seconds:.2f} s; the reason then:"
    yield from _indented(head, 2)
    yield from _indented(entry.why, 4)


def _whole(reason: Reason) -> str:
    return f"{reason.fact}: {', '.join(reason.names)}" if reason.names else reason.fact


@dataclass(frozen=True)
class _Group:
    """Steps that are told in one line."""

    stage: str
    state: str
    facts: tuple[str, ...]

    @classmethod
    def of(cls, step: Step) -> _Group:
        state = step.state if step.certain else f"{step.state}?"
        # Which tensors of a layer they are about, doit why tells.
        facts = [r.fact if step.layer else str(r) for r in step.why]
        return cls(step.stage, state, tuple(facts))


def _told(steps: list[Step], seconds: float | None, locked: bool) -> Iterator[str]:
    """Yield the plan's lines: by target and stage, layers of one state and reason together."""
    todo = [step for step in steps if step.state not in SETTLED]
    busy = list(dict.fromkeys(step.target for step in steps if step.state != UP_TO_DATE))
    for target in busy:
        yield from _of_target(target, [step for step in steps if step.target == target])
    if idle := [t for t in dict.fromkeys(step.target for step in steps) if t not in busy]:
        yield from _indented(f"up to date: {', '.join(target or OVERVIEW for target in idle)}", 0)
    if not todo:
        return
    if not all(step.certain for step in todo):
        yield from _indented(UNCERTAIN, 0)
    if locked and any(step.stage == "extract" and not step.certain for step in todo):
        yield from _indented(MAY_BE_REFUSED, 0)
    moved, cached, packed = _totals(todo)
    yield f"{len(todo)} of {plural(len(steps), 'task')}"
    fetched = f", fetches {size(moved.fetched)}" if moved.fetched else ""
    yield f"reads {size(moved.read)}, writes {size(moved.written)}{fetched}"
    yield from _indented(
        f"takes up to {size(cached + packed)} more of the disk while it runs: "
        f"cache {size(cached)}, build {size(packed)}",
        0,
    )
    yield f"time {_seconds(seconds)}"


def _of_target(target: str, steps: list[Step]) -> Iterator[str]:
    groups: dict[_Group, list[str]] = {}
    stages = list(dict.fromkeys(step.stage for step in steps))
    for step in sorted(steps, key=lambda step: stages.index(step.stage)):
        groups.setdefault(_Group.of(step), []).append(step.layer)
    yield target or OVERVIEW
    said: tuple[str, ...] = ()
    for group, layers in groups.items():
        head = f"  {group.stage:<9}{group.state:<11}"
        yield from _indented(head + _folded(layers), 0, 22)
        for fact in group.facts if group.facts != said else ():
            yield from _indented(fact, 22)
        said = group.facts


def _folded(layers: list[str]) -> str:
    """Return names of layers, those that follow each other as one range."""

    def place(at: tuple[int, str]) -> tuple[str, int]:
        begin, _, number = at[1].rpartition(".")
        return (begin, int(number) - at[0]) if number.isdigit() else (at[1], 0)

    runs = [[name for _, name in run] for _, run in groupby(enumerate(layers), place)]
    parts = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1].rpartition('.')[2]}" for run in runs]
    return ", ".join(parts)


def _indented(text: str, first: int, rest: int | None = None) -> list[str]:
    further = " " * (first + 2 if rest is None else rest)
    columns = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    return textwrap.wrap(
        text, columns, initial_indent=" " * first, subsequent_indent=further, break_on_hyphens=False
    )


def _totals(steps: Iterable[Step]) -> tuple[Moved, int, int]:
    """Return what steps move, and how much the cache and build/ grow by meanwhile."""
    steps = list(steps)
    moved = sum((step.moved for step in steps), Moved())
    packed = sum(step.moved.written for step in steps if step.stage == "pack")
    return moved, moved.written + moved.fetched - packed, packed


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "not known: no earlier run tells"
    return f"{duration(seconds)}, by earlier runs"


def _as_json(steps: list[Step], seconds: float | None, refused: list[str]) -> str:
    moved, cached, packed = _totals(steps)
    tasks = []
    for step in steps:
        record = asdict(step)
        moved_by_it = record.pop("moved")
        tasks.append({**record, **_bytes(moved_by_it)})
    summary = {"seconds": seconds, **_bytes(asdict(moved)), "disk_bytes": cached + packed}
    return json.dumps({"refused": refused, "tasks": tasks, **summary}, indent=1) + "\n"


def _bytes(moved: dict[str, int]) -> dict[str, int]:
    return {f"bytes_{key}": value for key, value in moved.items()}

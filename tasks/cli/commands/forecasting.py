"""forecasting: what doit's tasks would do now, by what doit's database has, and that in words."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.exceptions import InvalidCommand
from msgspec import structs

from cache.errors import CacheError
from tasks.cli import failures
from tasks.cli.command import Command
from tasks.cli.doit_adapter import Control
from tasks.cli.refused_tasks import messages_of, refused_of, undecided_of
from tasks.cli.session import Session
from tasks.core.errors import BuildError
from tasks.core.task_names import PACK, PUBLISH, REPORT, VERIFY, group_of, target_of, task_name
from tasks.planning.forecast import Forecast
from tasks.planning.refused import Refused, messages
from tasks.planning.steps import SETTLED, UP_TO_DATE, Step, TaskState
from tasks.stages import registry

BY_RESULTS = {"changed_file_dep", "missing_file_dep"}  # reasons of doit's that a run settles
MOST_COLUMNS = 80
UNCERTAIN = "?: what it reads is made first, and may come out as it was or be on record already"


class ForecastCommand(Command, DoitCmdBase):  # type: ignore[misc]
    """A command that tells of a run, and writes nothing: so it needs no lock."""

    def execute(self, params: Any, args: list[str]) -> int:
        """Load the tasks, and say what is asked."""
        self.options = structs.replace(self.options, requested_tasks=tuple(args), read_only=True)
        return int(super().execute(params, args))

    def requested(self) -> tuple[Mapping[str, Any], list[str]]:
        """Return doit's tasks by name, and the names of those asked for, without groups."""
        control = Control(self.task_list)
        control.process(self.sel_tasks)
        tasks: Mapping[str, Any] = control.tasks
        return tasks, [leaf for name in control.selected_tasks for leaf in _leaves(tasks, name)]

    def forecast(self) -> tuple[Forecast, list[Step], list[str]]:
        """Return what a run of the requested tasks does, and what these alone do.

        Last comes what there is to tell of those that wait for their settings to be chosen: of
        them the forecast has what comes before.
        """
        tasks, names = self.requested()
        # Of what is published, or verified, a forecast tells that it is packed.
        names = [
            task_name(PACK, target)
            if group_of(name) in (PUBLISH, VERIFY) and (target := target_of(name))
            else name
            for name in names
        ]
        undecided = [name for name in names if undecided_of(tasks[name])]
        first = [each for name in undecided for each in _first(tasks, name)]
        asked = [name for name in names if "check" in (tasks[name].meta or {})]
        requested = [*asked, *first]
        refused = messages_of(tasks, names)
        untouched = self.session.untouched and self.session.untouched.targets
        if not requested and not refused and not untouched:
            raise InvalidCommand(f"{' '.join(self.sel_tasks)}: that builds no model")
        forecasted = forecast(self.session, tasks, requested, self.dep_manager)
        forecasted.refused |= zip(refused, refused, strict=True)
        told = messages(each for name in undecided if (each := refused_of(tasks[name])))
        return forecasted, [forecasted.steps[name] for name in dict.fromkeys(asked)], told


def _first(tasks: Mapping[str, Any], name: str) -> list[str]:
    """Return the tasks that tell how to choose, of a target whose settings are yet to be chosen."""
    plan = undecided_of(tasks[name])
    return [node.name for node in plan.nodes(registry.SENSITIVITY.name)] if plan else []


def _leaves(tasks: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield a task's name, or those that a group stands for."""
    task = tasks[name]
    if task.actions:
        yield name
        return
    for below in task.task_dep:
        yield from _leaves(tasks, below)


def forecast(
    session: Session,
    tasks: Mapping[str, Any],
    requested: Iterable[str],
    database: Any,
    *,
    quick: bool = False,
) -> Forecast:
    """Work out what some tasks, and those that they depend on, would do.

    Args:
        session: what the tasks were made of.
        tasks: doit's, by name.
        requested: those that have an ``UpToDateCheck`` in their meta.
        database: doit's dependency manager.
        quick: see ``Forecast``.

    Raises:
        InvalidCommand: what is there does not allow it.
    """
    forecasted = Forecast(
        session.builder, session.lock, lambda name: _saved(tasks, name, database), quick=quick
    )
    add_requested(forecasted, tasks, requested)
    return forecasted


def add_requested(forecasted: Forecast, tasks: Mapping[str, Any], requested: Iterable[str]) -> None:
    """Add the requested tasks to a forecast.

    Raises:
        InvalidCommand: what is there does not allow it.
    """
    try:
        for name in requested:
            _add(forecasted, tasks, name)
    except (BuildError, CacheError) as error:
        raise InvalidCommand(failures.message(error)) from error


def _add(forecasted: Forecast, tasks: Mapping[str, Any], name: str) -> None:
    meta = tasks[name].meta
    if "node" in meta:
        forecasted.add(meta["plan"], meta["node"])
    elif "beside" in meta:
        forecasted.add_report(meta["plan"], meta["beside"])
    elif "plan" in meta:
        forecasted.add_pack(meta["plan"])
    else:
        for plan in meta["plans"]:
            _add(forecasted, tasks, task_name(REPORT, plan.target.name))
        forecasted.add_overview(meta["plans"])


def _saved(tasks: Mapping[str, Any], name: str, database: Any) -> TaskState:
    task = tasks[name]
    status = database.get_status(task, tasks, get_log=True)

    def read(path: str) -> str | None:
        state = database.backend.get(name, path)
        return state[-1] if state else None

    return TaskState(
        ignored=bool(database.status_is_ignore(task)),
        runs=not status.reasons.keys() <= BY_RESULTS,
        why=task.meta["check"].why,
        read=read,
        changed=frozenset(task.dep_changed),
    )


def warn_of_refused(forecasted: Forecast, targets: Iterable[Refused]) -> None:
    """Say on stderr which targets cannot be planned, and what models.lock refuses."""
    for message in (*messages(targets), *forecasted.refused.values()):
        print(f"warning: {message}", file=sys.stderr)


def state_words(step: Step) -> str:
    """Return in words what a task would do: ``to run?`` if that is not certain."""
    if step.state in SETTLED:
        return step.state
    return f"to {step.state}{'' if step.certain else '?'}"


def state_counts(words: Iterable[str], layers: str = " layers") -> str:
    """Return in words what some tasks would do, given ``state_words`` of each."""
    counts = Counter(words)
    for word in [word for word in counts if f"{word}?" in counts]:
        counts[f"{word}?"] += counts.pop(word)
    total = counts.total()
    if len(counts) == 1 and (total == 1 or counts.keys() <= {*SETTLED}):
        return next(iter(counts))
    (first, number), *others = [each for each in counts.items() if each[0] != UP_TO_DATE]
    more = "".join(f", {count} {word}" for word, count in others)
    return f"{number} of {total}{layers} {first}{more}"


def indented(text: str, first: int, rest: int | None = None) -> list[str]:
    """Return a text as lines that fit the terminal.

    Args:
        text: the text.
        first: spaces before the first line.
        rest: spaces before each further one; two more by default.
    """
    further = " " * (first + 2 if rest is None else rest)
    columns = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    return textwrap.wrap(
        text, columns, initial_indent=" " * first, subsequent_indent=further, break_on_hyphens=False
    )

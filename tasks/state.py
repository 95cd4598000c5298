"""state: which of the tasks that build models are up to date, as doit's database says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from doit.exceptions import InvalidCommand

from tasks.graph import Graph
from tasks.plan import Plan


class State(StrEnum):
    """What becomes of a task when doit is called now."""

    UP_TO_DATE = "up to date"
    IGNORED = "ignored"  # by doit ignore
    RUN = "to run"


def graph(tasks: Iterable[Any]) -> Graph:
    """Return what doit's tasks were made from.

    Raises:
        InvalidCommand: they are another dodo.py's.
    """
    for task in tasks:
        if task.meta and "graph" in task.meta:
            found: Graph = task.meta["graph"]
            return found
    raise InvalidCommand("there are no models here: run it where models.toml lies")


def states(plans: Iterable[Plan], tasks: Mapping[str, Any], database: Any) -> dict[str, State]:
    """Return the state of each task of some targets, by name.

    What reads the result of a task that runs is taken to run too, although it does not if that
    result comes out as it was.

    Args:
        plans: the targets.
        tasks: doit's, by name.
        database: doit's dependency manager.
    """
    found: dict[str, State] = {}
    for plan in plans:
        for nodes in (*plan.stages.values(), plan.errors):
            for node in nodes:
                needs = [need.name for need in node.needs]
                found[node.name] = _state(node.name, needs, found, tasks, database)
        pack, report = (f"{task}:{plan.target.name}" for task in ("pack", "report"))
        last = [node.name for node in plan.stages["quantize"]]
        found[pack] = _state(pack, last, found, tasks, database)
        read = [pack, *(node.name for node in plan.errors)]
        found[report] = _state(report, read, found, tasks, database)
    return found


def _state(
    name: str, needs: Iterable[str], known: Mapping[str, State], tasks: Mapping[str, Any],
    database: Any,
) -> State:  # fmt: skip
    task = tasks[name]
    if database.status_is_ignore(task):
        return State.IGNORED
    if any(known[need] is State.RUN for need in needs):
        return State.RUN
    # "error": a file that it reads is not there yet.
    is_done = database.get_status(task, tasks).status == "up-to-date"
    return State.UP_TO_DATE if is_done else State.RUN

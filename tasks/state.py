"""state: which of the tasks that build models are up to date, as doit's database says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from doit.exceptions import InvalidCommand

from tasks.graph import Graph
from tasks.plan import Node, Plan


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
        for nodes in plan.stages.values():
            for node in nodes:
                found[node.name] = _state(node.name, node.needs, found, tasks, database)
        name = f"pack:{plan.target.name}"
        found[name] = _state(name, plan.stages["quantize"], found, tasks, database)
    return found


def _state(
    name: str, needs: Iterable[Node], known: Mapping[str, State], tasks: Mapping[str, Any],
    database: Any,
) -> State:  # fmt: skip
    task = tasks[name]
    if database.status_is_ignore(task):
        return State.IGNORED
    if any(known[need.name] is State.RUN for need in needs):
        return State.RUN
    # "error": a file that it reads is not there yet.
    is_done = database.get_status(task, tasks).status == "up-to-date"
    return State.UP_TO_DATE if is_done else State.RUN

"""state: what doit's tasks would do now: a forecast of them, by what doit's database has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from doit.exceptions import InvalidCommand

from cache.errors import CacheError
from tasks.cli import failures
from tasks.cli.task_graph import Graph
from tasks.core.errors import BuildError
from tasks.planning.forecast import Forecast, Saved

BY_RESULTS = {"changed_file_dep", "missing_file_dep"}  # reasons of doit's that a run settles


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


def forecast(
    tasks: Mapping[str, Any], asked: Iterable[str], database: Any, *, quick: bool = False
) -> Forecast:
    """Work out what some tasks, and those that they depend on, would do.

    Args:
        tasks: doit's, by name.
        asked: those that have ``told`` in their meta.
        database: doit's dependency manager.
        quick: see ``Forecast``.

    Raises:
        InvalidCommand: what is there does not allow it.
    """
    of = graph(tasks.values())
    found = Forecast(of.builder, of.lock, lambda name: _saved(tasks, name, database), quick=quick)
    add(found, tasks, asked)
    return found


def add(found: Forecast, tasks: Mapping[str, Any], asked: Iterable[str]) -> None:
    """Have tasks in a forecast that were asked for, too.

    Raises:
        InvalidCommand: what is there does not allow it.
    """
    try:
        for name in asked:
            _add(found, tasks, name)
    except (BuildError, CacheError) as error:
        raise InvalidCommand(failures.message(error)) from error


def _add(found: Forecast, tasks: Mapping[str, Any], name: str) -> None:
    meta = tasks[name].meta
    if "node" in meta:
        found.add(meta["plan"], meta["node"])
    elif "beside" in meta:
        found.add_report(meta["plan"], meta["beside"])
    elif "plan" in meta:
        found.add_pack(meta["plan"])
    else:
        for plan in meta["plans"]:
            _add(found, tasks, f"report:{plan.target.name}")
        found.add_overview(meta["plans"])


def _saved(tasks: Mapping[str, Any], name: str, database: Any) -> Saved:
    task = tasks[name]
    status = database.get_status(task, tasks, get_log=True)

    def read(path: str) -> str | None:
        state = database.backend.get(name, path)
        return state[-1] if state else None

    return Saved(
        ignored=bool(database.status_is_ignore(task)),
        runs=not status.reasons.keys() <= BY_RESULTS,
        why=task.meta["told"].why,
        read=read,
        changed=frozenset(task.dep_changed),
    )

"""refused_tasks: doit's tasks of targets that cannot be planned: each fails at once, and says why.

So such a target fails alone. What it says is in the tasks' meta, for those who tell of tasks; so is
the plan of one whose settings are yet to be chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from tasks.cli.failures import values_or_failure
from tasks.cli.session import Session
from tasks.core.errors import BuildError
from tasks.core.task_names import task_name
from tasks.planning.plan import Plan
from tasks.planning.refused import Refused, messages


def refused_tasks(
    session: Session, group: str, but: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield a group's task of each of these targets, with its whole name as basename.

    Args:
        session: whose targets.
        group: the group.
        but: targets that have tasks of it.
    """
    for target in (each for each in session.refused if each not in but):
        yield {"basename": task_name(group, target), **fails(session, group, target)}


def fails(session: Session, group: str, target: str) -> dict[str, Any]:
    """Return a group's task of such a target, but for its name."""
    refused = session.refused[target]

    def fail() -> dict[str, Any]:
        with session.builder.logged(task_name(group, target), "it cannot be planned"):
            raise BuildError(*refused.reason.splitlines())

    return {
        "actions": [lambda: values_or_failure(fail)],
        "io": {"capture": False},
        "meta": {"refused": refused, "undecided": session.undecided.get(target)},
    }


def refused_of(task: Any) -> Refused | None:
    """Return the target that cannot be planned, if a task of doit's is such a target's."""
    refused: Refused | None = (task.meta or {}).get("refused")
    return refused


def messages_of(tasks: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return what to tell of those tasks, among some of doit's, that cannot be planned.

    Nothing of those that can be once sensitivities are on record.
    """
    refused = [
        refused
        for name in names
        if (refused := refused_of(tasks[name])) and not undecided_of(tasks[name])
    ]
    return messages(refused)


def undecided_of(task: Any) -> Plan | None:
    """Return the plan of the target whose settings are yet to be chosen, if it is one's task."""
    undecided: Plan | None = (task.meta or {}).get("undecided")
    return undecided

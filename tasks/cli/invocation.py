"""options: what the command line says that the tasks must know, for one ``doit`` call."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache.remote.remote import Remote
    from tasks.execution.early import Early

locked = False  # --locked: any difference from models.lock is an error
asked: list[str] | None = None  # the tasks that a run names; None: it is another command
lean = False  # a run of all targets: what is up to date need be no task
read_only = False  # nothing may be written
remotes: list[Remote] = []  # opened: to be finished before doit returns
early: Early | None = None  # packs meanwhile: to be stopped before doit returns


def names(task: str) -> bool:
    """Tell whether a run names a task: by itself, by its group, or by a pattern."""
    return any(n == task.partition(":")[0] or fnmatchcase(task, n) for n in asked or ())

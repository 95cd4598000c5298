"""target_names: what the names on the command line stand for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePath

from tasks.core.task_names import PACK, task_name
from tasks.core.workspace import BUILD


def task_named(name: str, targets: Collection[str], groups: Collection[str]) -> str:
    """Return the task that builds a target, if a name on the command line means that target.

    A target is named as in models.toml, by its folder, or by how no other target's name begins, a
    slash behind it or not.
    All other names stay as they are: tasks, options, and mistakes.

    Args:
        name: what stands on the command line.
        targets: the names of all targets.
        groups: the names of all groups of tasks, which go first.
    """
    path = PurePath(name)
    if name in groups or ":" in name or name.startswith("-"):
        return name
    if path.name != str(path) and path.parent.name != BUILD:
        return name
    if path.name in targets:
        return task_name(PACK, path.name)
    begun = [target for target in targets if path.name and target.startswith(path.name)]
    return task_name(PACK, begun[0]) if len(begun) == 1 else name

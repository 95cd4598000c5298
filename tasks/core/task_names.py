"""task_names: how tasks are named: GROUP:TARGET, and a layer's GROUP:TARGET:LAYER.

The groups are those of the stages (``stages/registry.py``), and those that stand here.
"""

from __future__ import annotations

PACK = "pack"  # writes build/TARGET; a packing's manifest says so too
REPORT = "report"
PUBLISH = "publish"
VERIFY = "verify"
LOCK = "lock"
# A new group is a name here, and what yields its tasks in dodo.py.
GROUPS = (PACK, REPORT, PUBLISH, VERIFY, LOCK)


def task_name(group: str, target: str, layer: str = "") -> str:
    """Return the name of a target's task, or of that of one of its layers."""
    return f"{group}:{target}:{layer}" if layer else f"{group}:{target}"


def group_of(task: str) -> str:
    """Return the group of a task, which may be the group itself."""
    return task.partition(":")[0]


def is_packing(task: str) -> bool:
    """Tell whether a task, or all of a group, write build/TARGET."""
    return group_of(task) == PACK


def target_of(task: str) -> str:
    """Return the target of a task; "" of one that is of all."""
    return task.split(":")[1] if ":" in task else ""

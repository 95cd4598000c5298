"""steps: what a forecast says of each task, and what doit knows of it before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tasks.planning.sizes import Traffic
from tasks.stages.reasons import Reason

UP_TO_DATE, RUN, REUSE, FETCH = "up to date", "run", "reuse", "fetch"
IGNORED = "ignored"  # by doit ignore, or since something that it depends on is
SETTLED = (UP_TO_DATE, IGNORED)


@dataclass(frozen=True)
class TaskState:
    """What doit knows of a task before the run.

    Attributes:
        ignored: whether it was told to ignore it.
        runs: whether it runs whatever comes of the tasks that it depends on.
        why: says why it runs, given the inputs that are not what they were.
        read: returns the digest of what it read when it last ran, given the path.
        changed: paths of those inputs that are not what they were.
    """

    ignored: bool
    runs: bool
    why: Callable[[list[str]], list[Reason]]
    read: Callable[[str], str | None]
    changed: frozenset[str]


@dataclass(frozen=True)
class Step:
    """One task of the run to come.

    Attributes:
        task: its name.
        target: its target.
        stage: its stage, as in its name; of others, their group.
        layer: its layer; of others, none.
        state: ``up to date``, ``run``, ``reuse`` (from the action cache), ``fetch``, ``ignored``.
        why: reasons, none if it is up to date or ignored.
        certain: whether no result that is not known yet could change it.
        moved: bytes.
    """

    task: str
    target: str
    stage: str
    layer: str
    state: str
    why: tuple[Reason, ...] = ()
    certain: bool = True
    moved: Traffic = field(default_factory=Traffic)

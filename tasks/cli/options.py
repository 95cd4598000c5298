"""options: what the command line says that the tasks must know."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from msgspec import Struct, field, structs

from tasks.core.task_names import (
    LOCK,
    PACK,
    PUBLISH,
    REPORT,
    VERIFY,
    group_of,
    target_of,
    task_name,
)


def _new_run() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"


class Options(Struct, frozen=True):
    """What the command line says that the tasks must know.

    Attributes:
        requested_tasks: the tasks that a run names: none, if it is to build every target. None:
            the command is not a run, nor does it tell of one.
        skip_targets: whether targets that are up to date need no tasks.
        skip_layers: whether those whose layers are up to date need none for these, if the run
            ``asks_of_models`` alone.
        looked_at: groups of tasks whose states are wanted: a target that has any of them on record
            needs tasks.
        locked: whether any difference from models.lock is an error.
        read_only: whether nothing may be written but memos.
        recovers: whether sensitivities that the cache has on record and lost are made again while
            targets are planned: in a run that saw to them just now.
        cleans: whether what was built is to be removed, for which nothing need be planned.
        in_parts: whether a run of very many tasks may be run in ``parts``.
        run: the id under which what it does is logged.
    """

    requested_tasks: tuple[str, ...] | None = None
    skip_targets: bool = False
    skip_layers: bool = False
    looked_at: frozenset[str] = frozenset()
    locked: bool = False
    read_only: bool = False
    recovers: bool = False
    cleans: bool = False
    in_parts: bool = False
    run: str = field(default_factory=_new_run)

    def requesting(self, tasks: Iterable[str]) -> Options:
        """Return these options with the tasks that a run names, if it is one."""
        if self.requested_tasks is None:
            return self
        return structs.replace(self, requested_tasks=tuple(tasks))

    def targets(self, every: Collection[str]) -> Collection[str]:
        """Return the targets of the tasks that a run names, of ``every`` target.

        It is all of them if it names none, a group, a pattern, or what there is not.
        """
        names = self.requested_tasks or ()
        asked = {target_of(name) for name in names}
        plain = names and asked <= {*every} and not any(map(re.compile(r"[*?[]").search, names))
        return asked if plain else every

    @property
    def builds_all(self) -> bool:
        """Whether it is a run that names no task."""
        return self.requested_tasks == ()

    @property
    def asks_of_models(self) -> bool:
        """Whether it is a run of all models as they are built, which names no layer."""
        return self.requested_tasks is not None and {PACK, REPORT, PUBLISH}.issuperset(
            self.requested_tasks
        )

    @property
    def only_locks(self) -> bool:
        """Whether it is a run that accepts checkpoints, and does nothing else."""
        return {*map(group_of, self.requested_tasks or ())} == {LOCK}

    def requests(self, task: str) -> bool:
        """Tell whether a run names a task: by itself, by its group, or by a pattern."""
        names = self.requested_tasks or ()
        return any(name == group_of(task) or fnmatchcase(task, name) for name in names)

    def packs(self, target: str) -> bool:
        """Tell whether a run is to pack a target."""
        # A report shows what is packed, and that is published.
        return not self.requested_tasks or any(
            self.requests(task_name(group, target)) for group in (PACK, REPORT, PUBLISH, VERIFY)
        )


DEFAULT = Options()  # of a command that takes none

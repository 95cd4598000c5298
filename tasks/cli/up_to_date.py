"""up_to_date: ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from doit.exceptions import TaskFailed

from cache.digest import digest_file
from cache.errors import CacheError
from cache.files.stamp import Stamp
from tasks.cli import failures
from tasks.core.errors import BuildError
from tasks.stages import reasons
from tasks.stages.reasons import Reason

CHANGED = "what it is told changed"


NEVER = "never built here"


NOT_LEFT = "is not as it was left"


KNOWN = ((True, None, None),)  # as doit keeps what uptodate says, once that is known


class Told:
    """Tells doit whether a task is still told what it was told when it last ran.

    Attributes:
        digest: of what it is told now.
        made: the path of what it makes.
        odd: says, from what it returned the last time, how that is not as it left it.
        differs: says, from the same, how what it is told differs, as far as the task knows.
    """

    # doit asks for the signature of each task's, at 50 µs a time if it must be worked out.
    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("task", "values")]
    )

    def __init__(
        self,
        digest: str,
        made: str,
        odd: Callable[[Mapping[str, Any]], list[Reason]],
        differs: Callable[[Mapping[str, Any]], list[Reason]],
    ) -> None:
        self.digest = digest
        self.made = made
        self.odd = odd
        self.differs = differs
        self._why: list[Reason] = []

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool:
        """Answer doit, which passes what the task returned the last time."""
        if not values:
            known = Path(self.made).exists()
            self._why = [Reason("doit's database has no record of it" if known else NEVER)]
        elif values.get("told") != self.digest:
            self._why = self.differs(values) or [Reason(CHANGED)]
        else:
            self._why = self.odd(values)
        return not self._why

    def why(self, changed: list[str]) -> list[Reason]:
        """Return why the task runs, given the file_deps that are not what they were."""
        return (
            self._why
            or reasons.contents(Path(path).name.removesuffix(".json") for path in changed)
            or [Reason("it reads other files than before, or its manifest is missing")]
        )

    def action(self, build: Callable[[str], dict[str, Any]]) -> Callable[[list[str]], Any]:
        """Return doit's action that calls ``build`` with the reason, and keeps what it returns."""

        def act(changed: list[str]) -> Any:
            made: dict[str, Any] = {}

            def run() -> None:
                made.update(build(reasons.joined(self.why(changed))), told=self.digest)

            return reported(run, made)

        return act


def as_left(path: str, left: list[Any] | None) -> bool:
    """Tell whether a manifest is the one that was left, touched or not."""
    if not left:  # by another version
        return False
    *stamp, digest = left
    try:
        return Stamp.of(path) == tuple(stamp) or digest_file(Path(path)) == digest
    except FileNotFoundError:
        return False


def reported(act: Callable[[], None], values: dict[str, Any]) -> Any:
    """Run ``act``; what a user can mend is a failure with a message and no traceback."""
    try:
        act()
    except (BuildError, CacheError, OSError) as error:
        return TaskFailed(failures.message(error))
    return values

"""up_to_date: whether a task is up to date by more than its files, and if not, why it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cache.digest import digest_file
from cache.files.stamp import Stamp
from tasks.cli.failures import values_or_failure
from tasks.stages import reasons
from tasks.stages.reasons import Reason

CHANGED = "what it is told changed"
NEVER = "never built here"
NOT_LEFT = "is not as it was left"


class UpToDateCheck:
    """Tells doit whether a task has the same parameters and output as when it last ran.

    It is the task's ``uptodate``. What it compares is kept in the values that doit's database has
    of the task: the digest of its parameters under ``told``, and what its action returned.

    Attributes:
        digest: of the task's parameters now.
        output: the path of the file that the task writes.
        changed_outputs: says, from the values, how what the task wrote is not as it left it.
        changed_params: says, from the values, how its parameters changed, as far as it can.
    """

    # doit asks for the signature of each task's, at 50 µs a time if it must be worked out.
    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in ("task", "values")]
    )

    def __init__(
        self,
        digest: str,
        output: str,
        changed_outputs: Callable[[Mapping[str, Any]], list[Reason]],
        changed_params: Callable[[Mapping[str, Any]], list[Reason]] = lambda _: [],
    ) -> None:
        self.digest = digest
        self.output = output
        self.changed_outputs = changed_outputs
        self.changed_params = changed_params
        self._why: list[Reason] = []

    def __call__(self, task: Any, values: Mapping[str, Any]) -> bool:
        """Answer doit, which passes the values that it has of the task."""
        if not values:
            exists = Path(self.output).exists()
            self._why = [Reason("doit's database has no record of it" if exists else NEVER)]
        elif values.get("told") != self.digest:
            self._why = self.changed_params(values) or [Reason(CHANGED)]
        else:
            self._why = self.changed_outputs(values)
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
            return values_or_failure(
                lambda: {**build(reasons.joined(self.why(changed))), "told": self.digest}
            )

        return act


def manifest_state(path: str) -> list[Any]:
    """Return what ``is_unchanged`` compares a manifest with, as JSON has it."""
    return [*Stamp.of(path), digest_file(Path(path))]


def is_unchanged(path: str, state: list[Any] | None) -> bool:
    """Tell whether a manifest has the content that ``manifest_state`` saw, touched or not."""
    if not state:  # of another version
        return False
    *stamp, digest = state
    try:
        return Stamp.of(path) == tuple(stamp) or digest_file(Path(path)) == digest
    except FileNotFoundError:
        return False

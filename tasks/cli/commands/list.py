"""list: ``doit list``: a line a target and stage with its state, then the other tasks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from tasks.cli.command import Command
from tasks.cli.commands.forecasting import (
    add_requested,
    forecast,
    state_counts,
    state_words,
    warn_of_refused,
)
from tasks.cli.doit_adapter import ListCommand, group_task
from tasks.cli.options import Options
from tasks.cli.orphans import orphans
from tasks.cli.refused_tasks import refused_of
from tasks.core.program import COMMAND
from tasks.core.task_names import (
    PACK,
    PUBLISH,
    REPORT,
    group_of,
    target_of,
    task_name,
)
from tasks.planning.steps import IGNORED, RUN, SETTLED, UP_TO_DATE, Step
from tasks.stages import registry

# The groups of tasks that a plain doit leaves out.
NOT_IN_A_PLAIN_RUN = frozenset((*(stage.group for stage in registry.MEASURES), REPORT))
CANNOT_BE_PLANNED = "cannot be planned"
UNDECIDED = "to run, once settings are chosen"
STATUS_LETTERS = {UP_TO_DATE: "U", IGNORED: "I"}  # of doit list -s, where all else is R


class List(Command, ListCommand):
    """``doit list``; what builds a target stands together, and says its state."""

    name = "list"
    doc_purpose = "list targets and stages with their state, and the other tasks"
    doc_description = f"""\
What builds a target stands together, unless --sort says otherwise. The states are those of
{COMMAND} plan (reuse: from the cache; ?: not certain), but that no remote store is asked: what
could be fetched is to run, too."""
    cmd_options = tuple(
        {**option, "default": "definition"} if option["name"] == "sort" else option
        for option in ListCommand.cmd_options
    )

    def execute(self, params: Any, args: list[str]) -> int:
        """List the tasks."""
        alone = not args and not any(map(params.get, ("subtasks", "list_deps", "status")))
        self.options = Options(skip_targets=alone, looked_at=NOT_IN_A_PLAIN_RUN)
        gc.disable()  # as in run: thousands of tasks are made, and none goes
        status = int(super().execute(params, args))
        for target in [] if args else orphans(self.session):
            print(
                f"note: {self.session.workspace.built(target)} was built here, and models.toml has "
                f"it no more: {COMMAND} clean --orphans removes it.",
                file=sys.stderr,
            )
        return status

    def tasks_to_list(self, *, include_subtasks: bool) -> Iterator[Any]:
        """Yield what builds each target, then the other tasks."""
        tasks = {task.name: task for task in self.task_list}
        names: dict[str, None] = {}
        for line, layers in self._lines.items():
            names |= dict.fromkeys([line, *layers] if include_subtasks else [line])
        yield from (tasks.get(name) or group_task(name) for name in names)
        # Stages, of all targets; it may be that none has errors.
        groups = {stage.group for stage in registry.stages()}
        groups -= {stage.group for stage in registry.ASKED_FOR}
        groups |= {PUBLISH, *(group_of(line) for line in self._lines)}
        unused = {stage.group for stage in registry.PIPELINE} if self.session.all_plans else set()
        unused -= {group_of(line) for line in self._lines}
        for task in self.task_list:
            listed = task.name not in unused and (
                include_subtasks
                or not (task.subtask_of or (task.name in groups and not task.actions))
            )
            if listed and task.name not in names and not refused_of(task):
                yield task

    def status_of(self, name: str) -> tuple[str, str] | None:
        """Return what a task, or those that a line stands for, would do."""
        target = target_of(name)
        if target in self.session.undecided:
            return "R", UNDECIDED
        if target in self.session.refused:
            return "E", CANNOT_BE_PLANNED
        if name in self._lines and target not in self.session.plans:
            return self._untouched(group_of(name), target)
        known = self._steps
        names = self._lines.get(name, [name])
        if not known.keys() >= {*names}:
            return None
        steps = [known[name] for name in names]
        busy = any(step.state not in SETTLED for step in steps)
        letter = "R" if busy else STATUS_LETTERS[min(step.state for step in steps)]
        return letter, state_counts(map(state_words, steps))

    def _untouched(self, group: str, target: str) -> tuple[str, str]:
        """Return what tasks would do of a target that is untouched, and was never measured."""
        if group not in NOT_IN_A_PLAIN_RUN:
            return STATUS_LETTERS[UP_TO_DATE], UP_TO_DATE
        specs = self.session.all_plans[target].measure_specs
        layers = {stage.group: [*specs[stage.name]] for stage in registry.MEASURES}.get(group, [""])
        words = [state_words(Step(group, target, group, layer, RUN)) for layer in layers]
        return "R", state_counts(words)

    @cached_property
    def _lines(self) -> dict[str, list[str]]:
        """The tasks that each line of a target and stage stands for; none, if it is untouched."""
        lines: dict[str, list[str]] = {}
        group_of_stage = {stage.name: stage.group for stage in registry.stages()}
        for target, plan in self.session.all_plans.items():
            looked_at = target in self.session.plans
            layers: dict[str, list[str]] = {}
            for name, specs in plan.specs.items():
                if specs:
                    layers[group_of_stage[name]] = [*specs]
            layers[PACK] = [""]
            for stage in registry.MEASURES:
                layers[stage.group] = [*plan.measure_specs[stage.name]]
            layers[REPORT] = [""]
            lines |= {
                task_name(group, target): [task_name(group, target, n) for n in of if looked_at]
                for group, of in layers.items()
                if of
            }
        return lines | {task_name(PACK, target): [] for target in self.session.refused}

    @cached_property
    def _steps(self) -> dict[str, Step]:
        """What each of these tasks would do; of those that build, in a plain doit."""
        tasks = {task.name: task for task in self.task_list}
        names = [name for names in self._lines.values() for name in names]
        reports = [name for name in names if group_of(name) in NOT_IN_A_PLAIN_RUN]
        building = [name for name in names if group_of(name) not in NOT_IN_A_PLAIN_RUN]
        forecasted = forecast(self.session, tasks, building, self.dep_manager, quick=True)
        refused = [each for each in self.session.refused.values() if not each.undecided]
        warn_of_refused(forecasted, refused)
        built = {**forecasted.steps}
        add_requested(forecasted, tasks, reports)  # which may want what has been lost
        return forecasted.steps | built

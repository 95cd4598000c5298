"""listing: ``doit list``: a line a target and stage with its state, then the other tasks."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from doit.cmd_list import List as DoitList

from tasks.cli.command import Command
from tasks.cli.commands.forecasting import add, forecast, graph
from tasks.planning.forecast import IGNORED, SETTLED, UP_TO_DATE, Forecast, Step

READING = ("error:", "report:")  # begin the names of what a plain doit leaves out
LETTERS = {UP_TO_DATE: "U", IGNORED: "I"}  # of doit list -s, where all else is R


class List(Command, DoitList):  # type: ignore[misc]
    """doit's ``list``; what builds a target stands together, and says its state."""

    name = "list"
    doc_purpose = "list targets and stages with their state, and the other tasks"
    doc_description = """\
What builds a target stands together, unless --sort says otherwise. The states are those of doit
plan (reuse: from the cache; ?: not certain), but that no remote store is asked: what could be
fetched is to run, too."""
    cmd_options = tuple(
        {**option, "default": "definition"} if option["name"] == "sort" else option
        for option in DoitList.cmd_options
    )

    def execute(self, params: Any, args: list[str]) -> int:
        """List the tasks."""
        gc.disable()  # as in run: thousands of tasks are made, and none goes
        return int(super().execute(params, args))

    def _list_all(self, include_subtasks: bool) -> list[Any]:
        tasks = {task.name: task for task in self.task_list}
        names: dict[str, None] = {}
        for line, layers in self._lines.items():
            names |= dict.fromkeys([line, *layers] if include_subtasks else [line])
        # Stages, of all targets; it may be that none has errors.
        whole = {"error", *(line.partition(":")[0] for line in self._lines)}
        rest = [
            task
            for task in self.task_list
            if task.name not in names
            and (include_subtasks or task.actions or task.name not in whole)
            and (include_subtasks or not task.subtask_of)
        ]
        return [*(tasks[name] for name in names), *rest]

    def _print_task(
        self, template: str, task: Any, status: bool, list_deps: bool, tasks: dict[str, Any]
    ) -> None:
        names = self._lines.get(task.name, [task.name])
        if not self._steps.keys() >= {*names}:
            super()._print_task(template, task, status, list_deps, tasks)
            return
        steps = [self._steps[name] for name in names]
        busy = any(step.state not in SETTLED for step in steps)
        letter = "R" if busy else LETTERS[min(step.state for step in steps)]
        text = told(map(state, steps))
        self.outstream.write(template.format(name=task.name, doc=text, status=letter))
        if list_deps:
            self.outstream.writelines(f" -  {path}\n" for path in sorted(task.file_dep))
            self.outstream.write("\n")

    @cached_property
    def _lines(self) -> dict[str, list[str]]:
        """The tasks that each line of a target and stage stands for."""
        found = {}
        for target, plan in graph(self.task_list).plans.items():
            for stage, nodes in plan.stages.items():
                found[f"{stage}:{target}"] = [node.name for node in nodes]
            found[f"pack:{target}"] = [f"pack:{target}"]
            if plan.errors:
                found[f"error:{target}"] = [node.name for node in plan.errors]
            found[f"report:{target}"] = [f"report:{target}"]
        return found

    @cached_property
    def _steps(self) -> dict[str, Step]:
        """What each of these tasks would do; of those that build, in a plain doit."""
        tasks = {task.name: task for task in self.task_list}
        names = [name for names in self._lines.values() for name in names]
        reports = [name for name in names if name.startswith(READING)]
        building = [name for name in names if not name.startswith(READING)]
        found = forecast(tasks, building, self.dep_manager, quick=True)
        warn(found)
        built = {**found.steps}
        add(found, tasks, reports)  # which may want what has been lost
        return found.steps | built


def warn(found: Forecast) -> None:
    """Say on stderr what models.lock refuses."""
    for message in found.refused.values():
        print(f"warning: {message}", file=sys.stderr)


def told(words: Iterable[str], layers: str = " layers") -> str:
    """Return in words what some tasks would do, given what each would."""
    counts = Counter(words)
    for word in [word for word in counts if f"{word}?" in counts]:
        counts[f"{word}?"] += counts.pop(word)
    total = counts.total()
    if len(counts) == 1 and (total == 1 or counts.keys() <= {*SETTLED}):
        return next(iter(counts))
    (first, number), *others = [each for each in counts.items() if each[0] != UP_TO_DATE]
    more = "".join(f", {count} {word}" for word, count in others)
    return f"{number} of {total}{layers} {first}{more}"


def state(step: Step) -> str:
    """Return in words what a task would do: ``to run?`` if that is not certain."""
    if step.state in SETTLED:
        return step.state
    return f"to {step.state}{'' if step.certain else '?'}"

"""listing: ``doit list``: a line a target and stage with its state, then the other tasks."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from doit.cmd_list import List as DoitList

from tasks.command_line import Command
from tasks.state import State, graph, states

LETTERS = {State.UP_TO_DATE: "U", State.RUN: "R", State.IGNORED: "I"}  # of doit list -s


class List(Command, DoitList):  # type: ignore[misc]
    """doit's ``list``; what builds a target stands together, and says its state."""

    name = "list"
    doc_purpose = "list targets and stages with their state, and the other tasks"
    doc_description = "What builds a target stands together, unless --sort says otherwise."
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
        if not self._states.keys() >= {*names}:
            super()._print_task(template, task, status, list_deps, tasks)
            return
        counts = Counter(self._states[name] for name in names)
        letter = LETTERS[next(state for state in reversed(State) if counts[state])]
        self.outstream.write(template.format(name=task.name, doc=told(counts), status=letter))
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
    def _states(self) -> dict[str, State]:
        tasks = {task.name: task for task in self.task_list}
        return states(graph(self.task_list).plans.values(), tasks, self.dep_manager)


def told(counts: Mapping[State, int]) -> str:
    """Return in words how many of some tasks are in which state."""
    total = sum(counts.values())
    if counts[State.RUN] and total > 1:
        return f"{counts[State.RUN]} of {total} layers to run"
    return str(next(state for state in reversed(State) if counts[state]))

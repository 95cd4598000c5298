"""doit_adapter: all that mlx-make takes from doit beyond what doit documents.

Whatever stands here may change in any release of doit: tests/contract/test_doit_adapter.py says for
each name what it must do, and pyproject.toml admits only releases with which that was seen to hold.
"""

from __future__ import annotations

import gc
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from doit import cmd_run, doit_cmd, get_var, loader, plugin
from doit.cmd_clean import Clean as DoitClean
from doit.cmd_forget import Forget as DoitForget
from doit.cmd_info import Info as DoitInfo
from doit.cmd_list import List as DoitList
from doit.control import TaskControl, TaskDispatcher
from doit.exceptions import InvalidCommand, UnmetDependency
from doit.runner import MThreadRunner, Runner
from doit.task import Task

from tasks.core.text import plural


def models_file() -> Path:
    """Return the models.toml that the command line names (``models=PATH``)."""
    return Path(get_var("models", "models.toml"))


def command_line_variables() -> Mapping[str, str]:
    """Return the variables that the command line sets (``NAME=VALUE``)."""
    return doit_cmd._CMDLINE_VARS or {}


def is_given(params: Any, option: str) -> bool:
    """Tell whether an option of a command stands on the command line."""
    return option in params._non_default_keys


# What is installed


@cache
def _all_entry_points() -> Any:
    return entry_points()


def plugins_of(*, group: str) -> Any:
    """Return the entry points of a group; what is installed is looked through once a process."""
    return _all_entry_points().select(group=group)


def read_plugins_once() -> None:
    """Have doit look through what is installed once, not for each kind of plugin: 5 ms each."""
    plugin.entry_points = plugins_of


# Which tasks there are


def line_of(creator: Any) -> tuple[list[str], int]:
    """Return where a creator of tasks begins, without the lines that it has."""
    return [], inspect.unwrap(creator).__code__.co_firstlineno


def read_no_source() -> None:
    """Have doit, which puts creators in order by their lines, not read all their code: 8 ms."""
    loader.inspect = SimpleNamespace(**{**vars(inspect), "getsourcelines": line_of})


# What people type


def parse_error_message(error: Exception, options: Iterable[Mapping[str, Any]] = ()) -> str | None:
    """Return what is wrong with an option, without all that doit adds, as Python writes it.

    Args:
        error: the error.
        options: of the command, as doit is told of them.
    """
    if match := re.match(r"Error parsing Command: (.*?) \(parsing options: ", str(error)):
        return match[1]
    number = re.match(r"Error parsing parameter '(\w+)' <class 'int'>\.\n.*: ('.*')", str(error))
    if number is None:
        return None
    names = {option["name"]: option for option in options}
    option = names.get(number[1], {})
    flag = f"-{option['short']}" if option.get("short") else f"--{option.get('long', number[1])}"
    return f"{flag} takes a whole number, and {number[2]} is none"


def name_not_found(error: Exception) -> str | None:
    """Return the task or command that does not exist, if an error says so: doit has two ways."""
    match = re.fullmatch(r"'(.*)' is not a task\.", str(error))
    return match[1] if match else getattr(error, "not_found", None)


# Which task runs next


class Schedule(Protocol):
    """What decides on the order of a run's tasks, and hears of their end."""

    def arrange(self, tasks: Mapping[str, Any], selected: list[str]) -> list[str]:
        """Return the tasks to begin with, in order, given all tasks and those that are selected."""

    def choose(self, ready: Sequence[str]) -> int:
        """Return which one is run next of tasks that are ready."""

    def finished(self, task: str) -> None:
        """Take note that a task ended, or needs not to begin."""

    def stop(self) -> None:
        """Take note that no more tasks begin."""


class DepthFirst(TaskDispatcher):  # type: ignore[misc]
    """Finishes a layer before it begins the next, so that what is in memory stays small."""

    def __init__(
        self,
        tasks: Mapping[str, Any],
        targets: Mapping[str, str],
        selected: list[str],
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(
            tasks, targets, schedule.arrange(tasks, selected) if schedule else selected
        )
        self.schedule = schedule

    def _update_waiting(self, processed: Any) -> None:
        super()._update_waiting(processed)
        if self.schedule and processed is not None and processed.run_status != "run":
            self.schedule.finished(processed.task.name)

    def _get_next_node(self, ready: Any, tasks_to_run: Any) -> Any:
        if not ready:
            return super()._get_next_node(ready, tasks_to_run)
        if not self.schedule:
            return ready.pop()
        chosen = self.schedule.choose([node.task.name for node in ready])
        node = ready[chosen]
        del ready[chosen]
        return node


class Control(TaskControl):  # type: ignore[misc]
    """doit's control, with our dispatcher. A pattern that matches nothing is a mistake."""

    selected_tasks: list[str]

    def process(self, task_selection: list[str] | None) -> None:
        """Select tasks.

        Raises:
            InvalidCommand: a pattern matches none.
        """
        if task_selection is not None:
            task_selection = [each for name in task_selection for each in self._matching(name)]
        super().process(task_selection)
        # The dispatcher takes a group's tasks from the end, and those that are selected in order.
        groups = {name: self.tasks[name].task_dep for name in self.selected_tasks}
        self.selected_tasks = [
            each
            for name, parts in groups.items()
            for each in (*(parts if self.tasks[name].has_subtask else ()), name)
        ]

    def _matching(self, name: str) -> list[str]:
        """Return the tasks that a pattern names; what is none, as it is."""
        if not re.search(r"[*?[]", name):
            return [name]
        if not (found := self._get_wild_tasks(name)):
            raise InvalidCommand(not_found=name)
        return list(found)

    def task_dispatcher(self) -> DepthFirst:
        """Return what hands tasks to the runner."""
        gc.freeze()  # the tasks stay: no need to look through them again
        gc.enable()
        sessions = (
            t.meta["session"] for t in self.tasks.values() if t.meta and "session" in t.meta
        )
        session = next(sessions, None)
        schedule = session.schedule if session else None
        return DepthFirst(self.tasks, self.targets, self.selected_tasks, schedule)


class _FailsAlone:
    """For a runner: what is refused, and what only needs what failed, stops nothing else."""

    final_result: Any
    _stop_running: bool
    continue_: bool

    def _handle_task_error(self, node: Any, base_fail: Any) -> None:
        before = self.final_result, self._stop_running
        super()._handle_task_error(node, base_fail)  # type: ignore[misc]
        if self.continue_:
            return
        if isinstance(base_fail, UnmetDependency):
            self.final_result, self._stop_running = before
        elif "refused" in (node.task.meta or {}):
            self._stop_running = before[1]
        dispatcher = getattr(self, "task_dispatcher", None)  # only threads wait for each other
        if self._stop_running and dispatcher and dispatcher.schedule:
            dispatcher.schedule.stop()


class OneByOne(_FailsAlone, Runner):  # type: ignore[misc]
    """doit's runner without threads."""


class InThreads(_FailsAlone, MThreadRunner):  # type: ignore[misc]
    """doit's runner in threads."""


@contextmanager
def our_control() -> Iterator[None]:
    """Have doit's ``run`` use our classes, which it looks up by name: it has no hook for them."""
    ours = {"TaskControl": Control, "Runner": OneByOne, "MThreadRunner": InThreads}
    originals = {name: getattr(cmd_run, name) for name in ours}
    vars(cmd_run).update(ours)
    try:
        yield
    finally:
        vars(cmd_run).update(originals)


# Whether a task is up to date


# What doit makes of a task's uptodate once its answer is known: True, without arguments.
ALWAYS_UP_TO_DATE = ((True, None, None),)


def is_up_to_date(database: Any, name: str, file_dep: set[str], uptodate: Any) -> bool:
    """Ask doit's database whether a task is up to date, without having made the task.

    Args:
        database: doit's dependency manager.
        name: the task's.
        file_dep: the paths of the files that it depends on.
        uptodate: what it would have as ``uptodate``, which must look for its target, too.
    """
    task = SimpleNamespace(
        name=name, file_dep=file_dep, targets=(), uptodate=ALWAYS_UP_TO_DATE, dep_changed=None
    )
    return (
        not database.status_is_ignore(task)
        and uptodate(task, database.get_values(name))
        and database.get_status(task, {}).status == "up-to-date"
    )


# Commands, with names for what theirs do within


class ListCommand(DoitList):  # type: ignore[misc]
    """doit's ``list``."""

    task_list: list[Any]

    def tasks_to_list(self, *, include_subtasks: bool) -> Iterable[Any]:
        """Return the tasks to list where none is named."""
        raise NotImplementedError

    def status_of(self, name: str) -> tuple[str, str] | None:
        """Return a task's status, as one letter and in words, or None where doit is to tell it."""
        raise NotImplementedError

    def _list_all(self, include_subtasks: bool) -> list[Any]:
        return [*self.tasks_to_list(include_subtasks=include_subtasks)]

    def _print_task(
        self, template: str, task: Any, status: bool, list_deps: bool, tasks: dict[str, Any]
    ) -> None:
        answer = self.status_of(task.name)
        if answer is None:
            super()._print_task(template, task, status, list_deps, tasks)
            return
        letter, text = answer
        self.outstream.write(template.format(name=task.name, doc=text, status=letter))
        if list_deps:
            self.outstream.writelines(f" -  {path}\n" for path in sorted(task.file_dep))
            self.outstream.write("\n")


def group_task(name: str) -> Task:
    """Return a task that does nothing, to be listed."""
    return Task(name, None)


class CleanCommand(DoitClean):  # type: ignore[misc]
    """doit's ``clean``; naming a stage, or one of a target, means all of its layers."""

    def _expand(self, clean_list: list[str]) -> list[str]:
        return _with_layers(self.task_list, super()._expand(clean_list))

    def clean_tasks(self, tasks: list[Any], dryrun: bool, cleanforget: bool) -> None:
        """Clean each task once, as doit does, but say what goes and not how.

        Actions are told whether it is a ``dryrun``. Records of layers are counted.
        """
        records = 0
        for task in {task.name: task for task in tasks}.values():
            task.init_options()
            for action in task.clean_actions:
                action.kwargs["dryrun"] = dryrun
                if failure := action.execute(out=self.outstream):
                    sys.stderr.write(str(failure))
            for path in task.targets if task._remove_targets is True else ():
                records += os.path.isfile(path)
                if not dryrun:
                    Path(path).unlink(missing_ok=True)
            if cleanforget and not dryrun:
                self.dep_manager.remove(task.name)
        if records:
            what = "would forget" if dryrun else "forgot"
            self.outstream.write(
                f"{what} how {plural(records, 'step')} ended; the results stay in the cache\n"
            )
        self.dep_manager.close()


class ForgetCommand(DoitForget):  # type: ignore[misc]
    """doit's ``forget``; naming a stage, or one of a target, means all of its layers."""

    sel_tasks: Any

    def _execute(self, forget_sub: bool, forget_disable_default: bool, forget_all: bool) -> None:
        if not forget_all and (names := list(self.sel_tasks)):
            self.sel_tasks = _with_layers(self.task_list, names)
        super()._execute(forget_sub, forget_disable_default, forget_all)


class InfoCommand(DoitInfo):  # type: ignore[misc]
    """doit's ``info``, without a task's meta: here that holds all plans."""

    def _execute(self, pos_args: list[str], hide_status: bool = False) -> int:
        named = {task.name: task for task in self.task_list if task.name in pos_args}
        if unknown := [name for name in pos_args if name not in named]:
            raise InvalidCommand(not_found=unknown[0])
        for task in named.values():
            task.meta = None
        return int(super()._execute(pos_args, hide_status))


def _with_layers(tasks: list[Any], names: list[str]) -> list[str]:
    """Return task names and those of all tasks below them."""
    begins = tuple(f"{name}:" for name in names)
    return [*names, *(task.name for task in tasks if task.name.startswith(begins))]


def with_needs(tasks: Mapping[str, Any], selected: Iterable[str]) -> list[str]:
    """Return the selected tasks and all that they need, in the order in which tasks are defined."""
    wanted: set[str] = set()
    pending = list(selected)
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            pending += [*tasks[name].task_dep, *tasks[name].setup_tasks]
    return [name for name in tasks if name in wanted]

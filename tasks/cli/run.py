"""plugins: how doit is fitted to long builds of large files: see [tool.doit] in pyproject.toml."""

from __future__ import annotations

import gc
import sys
from typing import Any

from doit import cmd_run
from doit.cmd_run import Run as DoitRun
from doit.control import TaskControl, TaskDispatcher
from doit.exceptions import InvalidCommand

from cache.errors import CacheError
from tasks.cli import failures, invocation
from tasks.cli.command import Command, alone, interruptible
from tasks.core.text import plural
from tasks.tensors import cuda

LOCKED = {
    "name": "locked",
    "short": "",
    "long": "locked",
    "type": bool,
    "default": False,
    "help": "fail if anything differs from models.lock, and never write it (for CI)",
}


class DepthFirst(TaskDispatcher):  # type: ignore[misc]
    """Finishes a layer before it begins the next, so that what is in memory stays small."""

    def _get_next_node(self, ready: Any, tasks_to_run: Any) -> Any:
        return ready.pop() if ready else super()._get_next_node(ready, tasks_to_run)


class Control(TaskControl):  # type: ignore[misc]
    """doit's control, with our dispatcher. A pattern that matches nothing is a mistake."""

    def process(self, task_selection: list[str] | None) -> None:
        """Select tasks."""
        for name in task_selection or ():
            if "*" in name and not self._get_wild_tasks(name):
                raise InvalidCommand(not_found=name)
        super().process(task_selection)

    def task_dispatcher(self) -> DepthFirst:
        """Return what hands tasks to the runner."""
        gc.freeze()  # the tasks stay: no need to look through them again
        gc.enable()
        return DepthFirst(self.tasks, self.targets, self.selected_tasks)


class Run(Command, DoitRun):  # type: ignore[misc]
    """doit's ``run``: one at a time on one state, layer by layer, and tidy when interrupted."""

    name = "run"
    cmd_options = (*DoitRun.cmd_options, LOCKED)

    def __init__(self, **kwargs: Any) -> None:
        cuda.begin()  # now, before all that is imported to run
        super().__init__(**kwargs)

    def execute(self, params: Any, args: list[str]) -> int:
        """Run the tasks named in ``args``."""
        invocation.locked = params["locked"]
        invocation.asked = args
        invocation.lean = not args and not params["always"]
        gc.disable()  # thousands of tasks are made, and none goes: half of the time would be its
        cmd_run.TaskControl = Control  # doit looks the class up there, and has no hook for it
        with interruptible("layers that are done are kept; run doit again to go on"), alone():
            try:
                status = int(super().execute(params, args))
            except BaseException:
                if invocation.early:
                    invocation.early.abandon()
                raise
            if invocation.early:
                invocation.early.stop()
            _finish_uploads()
            return status


def _finish_uploads() -> None:
    for remote in invocation.remotes:
        try:
            pushed = remote.finish()
        except (CacheError, OSError) as error:  # what was built is built
            print(f"warning: {failures.message(error)}", file=sys.stderr)
            continue
        finally:
            remote.close()
        if remote.fetched_bytes:
            print(f"{remote.name}: {remote.fetched_bytes / 1e6:,.1f} MB fetched")
        if pushed.objects:
            print(
                f"{remote.name}: {plural(pushed.objects, 'object')} uploaded, "
                f"{pushed.bytes / 1e6:,.1f} MB; the last {pushed.seconds:.1f} s were for that alone"
            )

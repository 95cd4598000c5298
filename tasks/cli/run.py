"""run: ``doit`` itself: builds targets, one run at a time, and is tidy when interrupted."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from doit.cmd_run import Run as DoitRun
from doit.exceptions import InvalidCommand
from doit.globals import Globals
from msgspec import structs

from tasks.cli.command import Command
from tasks.cli.doit_adapter import is_given, models_file, our_control
from tasks.cli.loader import InParts, SensitivitiesFirst
from tasks.cli.options import Options
from tasks.cli.parts import tasks_of
from tasks.cli.process import interruptible
from tasks.cli.state_lock import alone
from tasks.core import pytorch
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.task_names import task_name
from tasks.execution.resources import raise_file_limit
from tasks.stages import registry
from tasks.tensors import cuda

LOCKED = {
    "name": "locked",
    "short": "",
    "long": "locked",
    "type": bool,
    "default": False,
    "help": "fail if anything differs from models.lock, and never write it (for CI)",
}


class Run(Command, DoitRun):  # type: ignore[misc]
    """``doit run``, or ``doit`` alone."""

    name = "run"
    cmd_options = (*DoitRun.cmd_options, LOCKED)

    def __init__(self, **kwargs: Any) -> None:
        cuda.begin()  # now, before all that is imported to run
        pytorch.leave_out()
        super().__init__(**kwargs)

    def execute(self, params: Any, args: list[str]) -> int:
        """Run the tasks named in ``args``.

        Raises:
            InvalidCommand: they are to run in processes.
        """
        if is_given(params, "par_type") and params["par_type"] != "thread":
            raise InvalidCommand(
                f"-P {params['par_type']}: tasks run in threads, which share what they read, and "
                "never in processes. Leave -P out; -n COUNT says how many threads."
            )
        if is_given(params, "num_process") and params["num_process"] < 0:
            raise InvalidCommand(f"-n {params['num_process']}: that is no count of threads.")
        self.options = Options(
            requested_tasks=tuple(args),
            skip_targets=not args and not params["always"],
            skip_layers=not params["always"],
            locked=params["locked"],
            in_parts=not params["locked"] and not params["single"],
        )
        raise_file_limit()
        gc.disable()  # thousands of tasks are made, and none goes: half of the time would be its
        kept = f"layers that are done are kept; run {COMMAND} again to go on"
        with interruptible(kept), alone(models_file()), our_control(), _one_file(params):
            try:
                return self._run_in_parts(params, args)
            except SensitivitiesFirst as first:
                tasks = [task_name(registry.SENSITIVITY.group, name) for name in first.targets]
            options = self.options  # what is locked is checked below
            self.options = Options(requested_tasks=tuple(tasks), run=options.run)
            # All of them: doit's database may know of results that the cache has lost.
            always, params["always"] = params["always"], True
            status = self._run(params, tasks)
            params["always"] = always
            if status:
                return status
            self.session.close()
            self.options = structs.replace(options, recovers=True)
            try:
                return self._run_in_parts(params, args)
            except SensitivitiesFirst as first:
                raise BuildError(
                    f"the sensitivities of {first} were worked out, and are not on record. See "
                    f"that the cache is written to, and kept: {COMMAND} cache stats."
                ) from first

    def _run_in_parts(self, params: Any, args: list[str]) -> int:
        """Run tasks: if they are too many, those of a part of the targets after another's."""
        try:
            return self._run(params, args)
        except InParts as many:
            parts = many.parts
        options = structs.replace(self.options, in_parts=False)
        count, begun, status = sum(map(len, parts)), 0, 0
        for part in parts:
            self._forget()
            if params["reporter"] != "json":
                said = f"{begun + 1} to {begun + len(part)} of {count} targets"
                print(said, file=params["outfile"], flush=True)
            begun += len(part)
            tasks = tasks_of(part, options.requested_tasks or ())
            named = {"requested_tasks": tuple(tasks), "skip_targets": False}
            self.options = structs.replace(options, **named)
            status = max(status, self._run(params, tasks))
            self.session.close()
            if status and not params["continue"]:
                return status
        self._forget()
        self.options, params["always"] = options, False
        return max(status, self._run(params, args))

    def _forget(self) -> None:
        """Let go of all tasks of a run, which stay else until those of the next are there."""
        self.loader.session, self.loader.namespace = None, {}
        self.task_list, self.control, self.dep_manager = [], None, None
        Globals.dep_manager = None
        gc.unfreeze()
        gc.collect()
        gc.disable()  # as at first

    def _run(self, params: Any, args: list[str]) -> int:
        """Run tasks."""
        self.dep_manager = None  # that of a run before is closed
        try:
            status = int(super().execute(params, [*args]))
        except BaseException:
            if self.loader.session:
                self.loader.session.abandon()
            raise
        if self.loader.session:
            self.loader.session.finish()
        return status


@contextmanager
def _one_file(params: Any) -> Iterator[None]:
    """Have all runs of a command write into the file of ``-o``: doit begins it anew with each."""
    if not isinstance(params["outfile"], str):
        yield
        return
    with open(params["outfile"], "w", encoding="utf-8") as params["outfile"]:
        yield

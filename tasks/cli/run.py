"""run: ``doit`` itself: builds targets, one run at a time, and is tidy when interrupted."""

from __future__ import annotations

import gc
from typing import Any

from doit.cmd_run import Run as DoitRun
from doit.exceptions import InvalidCommand
from msgspec import structs

from tasks.cli.command import Command
from tasks.cli.doit_adapter import is_given, models_file, our_control
from tasks.cli.loader import SensitivitiesFirst
from tasks.cli.options import Options
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
        )
        raise_file_limit()
        gc.disable()  # thousands of tasks are made, and none goes: half of the time would be its
        kept = f"layers that are done are kept; run {COMMAND} again to go on"
        with interruptible(kept), alone(models_file()), our_control():
            try:
                return self._run(params, args)
            except SensitivitiesFirst as first:
                tasks = [task_name(registry.SENSITIVITY.group, name) for name in first.targets]
            options = self.options
            self.options = Options(requested_tasks=tuple(tasks))  # what is locked is checked below
            # All of them: doit's database may know of results that the cache has lost.
            always, params["always"] = params["always"], True
            status = self._run(params, tasks)
            params["always"] = always
            if status:
                return status
            self.session.close()
            self.options = structs.replace(options, recovers=True)
            try:
                return self._run(params, args)
            except SensitivitiesFirst as first:
                raise BuildError(
                    f"the sensitivities of {first} were worked out, and are not on record. See "
                    f"that the cache is written to, and kept: {COMMAND} cache stats."
                ) from first

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

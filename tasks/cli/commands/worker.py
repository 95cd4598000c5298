"""worker: ``mlx-make worker``: a worker of a Dask cluster that makes layers for builds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from doit.exceptions import InvalidCommand

from tasks.cli.clusters import EXTRA
from tasks.cli.command import Command
from tasks.cli.process import piped
from tasks.core.program import COMMAND

PRELOAD = "mlx_make.worker"


class Worker(Command):
    """Becomes ``dask worker``, with the preload that makes it one of mlx-make."""

    name = "worker"
    doc_purpose = "make layers for builds elsewhere, as a worker of a Dask cluster"
    doc_usage = "ADDRESS [dask worker's options]"
    doc_description = f"""\
The same as: dask worker --preload {PRELOAD} ADDRESS …

Its cache is the folder that MLX_MAKE_CACHE_DIR names; else it goes with the worker."""
    names_tasks = False

    def parse_execute(self, in_args: list[str]) -> int:
        """Become the worker: what is behind the command is Dask's to read.

        Raises:
            InvalidCommand: Dask is not installed, or not told where the scheduler is.
        """
        with piped():
            if find_spec("distributed") is None:
                raise InvalidCommand(f"{COMMAND} {self.name} needs Dask: pip install '{EXTRA}'")
            if not _names_scheduler(in_args):
                raise InvalidCommand(
                    f"{COMMAND} {self.name} needs the scheduler's address: "
                    f"{COMMAND} {self.name} tcp://HOST:8786, or --scheduler-file PATH"
                )
            call = [sys.executable, "-m", "dask", "worker", "--preload", PRELOAD, *in_args]
            os.execv(sys.executable, call)

    def execute(self, opt_values: Mapping[str, Any], pos_args: list[str]) -> int:
        """Do nothing: ``parse_execute`` did all.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{COMMAND} {self.name}")


def _names_scheduler(args: list[str]) -> bool:
    """Tell whether Dask is told where its scheduler is, or asked for no worker at all."""
    if {"--help", "--version"} & {*args}:
        return True
    command = import_module("distributed.cli.dask_worker").main
    # What else is wrong with them Dask says itself.
    params = command.make_context("worker", [*args], resilient_parsing=True).params
    if params.get("scheduler") or params.get("scheduler_file"):
        return True
    return import_module("dask").config.get("scheduler-address", None) is not None

"""worker: ``mlx-make worker``: a worker of a Dask cluster that makes layers for builds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from tasks.cli.clusters import check_installed
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
        """Become the worker: what is behind the command is Dask's to read."""
        with piped():
            check_installed(next(iter(in_args), "ADDRESS"))
            call = [sys.executable, "-m", "dask", "worker", "--preload", PRELOAD, *in_args]
            os.execv(sys.executable, call)

    def execute(self, opt_values: Mapping[str, Any], pos_args: list[str]) -> int:
        """Do nothing: ``parse_execute`` did all.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{COMMAND} {self.name}")

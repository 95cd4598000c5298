"""inside: doit without a process of its own: the same command line, a third of a second sooner.

For tests that ask what is on the disk, in the log and in the output. Those that ask about the
process itself, its signals, its memory or what it imports, use `front_door`.
"""

import contextlib
import copy
import functools
import gc
import io
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import mlx.core as mx
from doit import cmd_run
from doit.doit_cmd import DoitConfig, DoitMain

from support import front_door, warm
from tasks.cli.failures import as_invalid_dodo_file
from tasks.cli.loader import InstalledLoader
from tasks.cli.session import Session
from tasks.config import reader
from tasks.core import pytorch
from tasks.layouts import limited
from tasks.tensors import cuda, device


def session(folder: Path) -> Session:
    """What doit opens before any task."""
    with as_invalid_dodo_file():
        return Session.open(reader.load(folder / "models.toml"))


def doit(
    folder: Path, *args: str, expect: int | None = 0, env: Mapping[str, str] | None = None
) -> front_door.Finished:
    """As `front_door.doit`, in this process."""
    before = set(front_door.runs(folder))
    with mock.patch.dict(os.environ, env or {}):
        status, out, err = run(folder, *args)
    assert expect is None or status == expect, (
        f"doit {' '.join(args)}: exit status {status}, not {expect}\n{out}\n{err}"
    )
    entries = [entry for entry in front_door.log(folder) if entry["run"] not in before]
    return front_door.Finished([*args], status, out, err, entries)


@functools.cache
def _plugins() -> dict:
    return DoitConfig().load_config_toml(str(front_door.REPOSITORY / "pyproject.toml"), "tool.doit")


def run(folder: Path, *args: str) -> tuple[int, str, str]:
    """Run doit; return its exit status, and what it wrote to stdout and stderr."""
    main = DoitMain(InstalledLoader(), config_filenames=(), extra_config=copy.deepcopy(_plugins()))
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.dict(cmd_run.opt_outfile, default=out),
            mock.patch.object(cuda, "begin"),  # this process goes on, with CUDA as it is
            mock.patch.object(pytorch, "leave_out"),
            mock.patch.object(limited, "subprocess", warm),
        ):
            status = main.run([*args, f"models={folder / 'models.toml'}"]) or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.unfreeze()
        # As in a process of its own: what a test has the peer do next is done by its default.
        mx.set_default_device(getattr(mx, device.default()))
        device.default_to_cpu.cache_clear()
    return status, out.getvalue(), err.getvalue()

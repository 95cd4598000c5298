"""inside: doit without a process of its own, for tests that call it a hundred times."""

import contextlib
import gc
import io
import runpy
import signal
from pathlib import Path
from unittest import mock

from doit.cmd_base import NamespaceTaskLoader
from doit.doit_cmd import DoitConfig, DoitMain

import tasks.cli.run  # noqa: F401 (dodo.py asks whether doit has them)
from support import front_door
from tasks.cli import invocation
from tasks.tensors import cuda


class Loader(NamespaceTaskLoader):
    """Takes the tasks from a dodo.py that nobody has loaded yet."""

    def setup(self, opt_values: object) -> None:
        self.namespace = runpy.run_path(str(front_door.REPOSITORY / "dodo.py"))


def doit(folder: Path, *args: str, expect: int | None = 0) -> front_door.Finished:
    """As `front_door.doit`, in this process. `expect` None: whatever the status."""
    before = set(front_door.runs(folder))
    plugins = DoitConfig().load_config_toml(
        str(front_door.REPOSITORY / "pyproject.toml"), "tool.doit"
    )
    main = DoitMain(Loader(), config_filenames=(), extra_config=plugins)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    invocation.locked = invocation.lean = invocation.read_only = False
    invocation.remotes.clear()
    out, err = io.StringIO(), io.StringIO()
    # This process goes on, with CUDA as it is.
    alone = mock.patch.multiple(cuda, begin=mock.DEFAULT, leave=mock.DEFAULT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), alone:
            status = main.run([*args, f"models={folder / 'models.toml'}"]) or 0
    finally:
        for remote in invocation.remotes:
            remote.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.unfreeze()
    assert expect is None or status == expect, (
        f"doit {' '.join(args)}: exit status {status}, not {expect}\n{out.getvalue()}\n"
        f"{err.getvalue()}"
    )
    entries = [entry for entry in front_door.log(folder) if entry["run"] not in before]
    return front_door.Finished([*args], status, out.getvalue(), err.getvalue(), entries)

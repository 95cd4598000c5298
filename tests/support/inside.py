"""inside: doit without a process of its own, for tests that call it a hundred times."""

import contextlib
import gc
import io
from pathlib import Path
from unittest import mock

from doit.doit_cmd import DoitConfig, DoitMain

from support import front_door
from tasks.cli.loader import InstalledLoader
from tasks.cli.session import Session
from tasks.config import reader
from tasks.tensors import cuda


def session(folder: Path) -> Session:
    """What doit opens before any task."""
    return Session.open(reader.load(folder / "models.toml"))


def doit(folder: Path, *args: str, expect: int | None = 0) -> front_door.Finished:
    """As `front_door.doit`, in this process. `expect` None: whatever the status."""
    before = set(front_door.runs(folder))
    status, out, err = run(folder, *args)
    assert expect is None or status == expect, (
        f"doit {' '.join(args)}: exit status {status}, not {expect}\n{out}\n{err}"
    )
    entries = [entry for entry in front_door.log(folder) if entry["run"] not in before]
    return front_door.Finished([*args], status, out, err, entries)


def run(folder: Path, *args: str) -> tuple[int, str, str]:
    """Run doit; return its exit status, and what it wrote to stdout and stderr."""
    plugins = DoitConfig().load_config_toml(
        str(front_door.REPOSITORY / "pyproject.toml"), "tool.doit"
    )
    main = DoitMain(InstalledLoader(), config_filenames=(), extra_config=plugins)
    out, err = io.StringIO(), io.StringIO()
    # This process goes on, with CUDA as it is.
    alone = mock.patch.object(cuda, "begin")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), alone:
            status = main.run([*args, f"models={folder / 'models.toml'}"]) or 0
    finally:
        gc.unfreeze()
    return status, out.getvalue(), err.getvalue()

"""running: processes of the tests, a build as one: to be watched, held and killed while it runs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support.front_door import REPOSITORY
from support.projects import Project, hooked

DEADLINE_SECONDS = 60

_spawned: list[subprocess.Popen] = []


def spawn(command: list[str], **options: Any) -> subprocess.Popen:
    """Start a process that `reap` ends, should its test not come so far."""
    process = subprocess.Popen(command, **options)
    _spawned.append(process)
    return process


def reap() -> None:
    """End what was spawned and still runs."""
    while _spawned:
        process = _spawned.pop()
        process.kill()
        process.wait()


def heed_interrupts() -> None:
    """Have what is started heed SIGINT, even if this process was started with it ignored.

    As nohup's and a shell's background jobs are. What is ignored stays ignored in a child, unlike
    what is handled; this process, which nobody wants to interrupt, handles it by doing nothing.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)


def start(
    project: Project,
    *args: str,
    hook: dict | None = None,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen:
    """Start doit on a project, with pipes for what it says unless the options name others."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return spawn(
        [sys.executable, "-m", "doit", *args, f"models={project.folder / 'models.toml'}"],
        cwd=REPOSITORY,
        env={**os.environ, **hooked(hook), **(env or {})},
        **(pipes | options),
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until a condition holds or the process has ended."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.001)


def temporary(folder: Path) -> list[str]:
    """What is left of files that were being written; what is being removed goes by itself."""
    paths = [path.relative_to(folder) for path in folder.rglob(".tmp-*")]
    return [str(path) for path in paths if "trash" not in path.parts]

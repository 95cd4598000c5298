"""running: a build as a process of its own, to be watched, held and killed while it runs."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.front_door import REPOSITORY
from support.projects import Project, hooked

DEADLINE_SECONDS = 60


def start(project: Project, *args: str, hook: dict | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "doit", *args, f"models={project.folder / 'models.toml'}"],
        cwd=REPOSITORY,
        env={**os.environ, **hooked(hook)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until a condition holds or the process has ended."""
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.001)


def temporary(folder: Path) -> list[str]:
    """What is left of files that were being written; what is being removed goes by itself."""
    found = [path.relative_to(folder) for path in folder.rglob(".tmp-*")]
    return [str(path) for path in found if "trash" not in path.parts]

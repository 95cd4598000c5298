"""front_door: run mlx-make as its user does, `python -m doit models=…`, and read what it logged."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Finished(subprocess.CompletedProcess):
    """A finished call of doit, and the lines that it added to the build log."""

    args: list[str]
    returncode: int
    stdout: str
    stderr: str
    entries: list[dict]

    @property
    def computed(self) -> set[str]:
        """The tasks that this call computed: none, if all were up to date or in the cache."""
        return _tasks(self.entries, "computed")


def doit(
    folder: Path, *args: str, expect: int = 0, env: Mapping[str, str] | None = None
) -> Finished:
    """Run doit on `folder/models.toml` from the repository's root.

    Args:
        folder: Holds `models.toml`; the state and the built models lie in it too.
        args: What follows `doit`: a command, tasks, options.
        expect: The exit status that the call must have; None: any.
        env: Laid over this process's environment.

    Raises:
        AssertionError: The exit status is another one; the message holds all output.
    """
    before = set(runs(folder))
    call = [sys.executable, "-m", "doit", *args, f"models={folder / 'models.toml'}"]
    done = subprocess.run(
        call,
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expect is None or done.returncode == expect, (
        f"{' '.join(call)}\nexit status {done.returncode}, not {expect}\n"
        f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
    )
    entries = [entry for entry in log(folder) if entry["run"] not in before]
    return Finished(call, done.returncode, done.stdout, done.stderr, entries)


def log(folder: Path) -> list[dict]:
    """The build log's lines, oldest first; without the last one if a killed run tore it."""
    path = folder / ".mlx-make" / "log.jsonl"
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # torn by a kill, or on a full disk
            entries.append(json.loads(line))
    return entries


def runs(folder: Path) -> list[str]:
    """The ids of the runs that logged anything, oldest first."""
    return list(dict.fromkeys(entry["run"] for entry in log(folder)))


def computed(folder: Path, run: int = -1) -> set[str]:
    """The tasks that were computed in a run: the last, or that of this index in `runs(folder)`.

    A run that finds all tasks up to date logs nothing and so is none of these: ask
    `doit(…).computed` about that one.
    """
    wanted = runs(folder)[run]
    return _tasks([entry for entry in log(folder) if entry["run"] == wanted], "computed")


def _tasks(entries: list[dict], outcome: str) -> set[str]:
    return {entry["task"] for entry in entries if entry["outcome"] == outcome}

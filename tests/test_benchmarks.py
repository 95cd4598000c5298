"""The benchmarks still run. What they measure is no test's to judge."""

import subprocess
import sys
from pathlib import Path

from front_door import REPOSITORY


def ran(script: str, *args: str | Path) -> str:
    """Run a benchmark; what it prints."""
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / script, *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_simulated_giant(tmp_path: Path) -> None:
    """It stands in for stages, and so is told when they change."""
    out = ran("giant.py", "--targets", "1", "--repeats", "1", "--scratch", tmp_path)
    assert "| 1 | a build of 517 tasks, simulated |" in out
    assert "| 1 | nothing to do: `doit` |" in out

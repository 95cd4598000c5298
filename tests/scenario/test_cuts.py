"""A handful of what benchmarks/cuts.py does by the hundred."""

import shutil
import subprocess
import sys

import pytest

from support.front_door import REPOSITORY


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("gcc"), reason="its library is Linux's, made by gcc"
)
def test_the_next_build_is_whole() -> None:
    command = [sys.executable, "benchmarks/cuts.py", "--count", "2", "--first", "1"]
    harms = ["SIGKILL", "SIGTERM", "EIO", "short", "power"]
    done = subprocess.run(
        [*command, "--harms", *harms], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * len(harms)} in " in done.stdout

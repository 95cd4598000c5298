"""The benchmarks still run. What they measure is no test's to judge."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from support.front_door import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="they measure by /proc")
SMALL = {"layers": 2, "hidden": 128, "intermediate": 256, "heads": 4, "kv-heads": 2, "vocab": 512}


def ran(script: str, *args: str | Path) -> str:
    """Run a benchmark; what it prints."""
    done = start(script, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / script, *args],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_simulated_giant(tmp_path: Path) -> None:
    """It stands in for stages, and so is told when they change."""
    out = ran("giant.py", "--targets", "1", "--repeats", "1", "--scratch", tmp_path)
    assert "| 1 | a build of 517 tasks, simulated |" in out
    assert "| 1 | nothing to do: `doit` |" in out


def test_a_comparison(tmp_path: Path) -> None:
    """With a goal's figures, but for what mlx_lm.convert is run for; one side alone has none."""
    df = subprocess.run(["df", "--output=fstype", tmp_path], capture_output=True, check=True)
    if b"tmpfs" in df.stdout:
        pytest.skip("no byte counts as written in memory (tmpfs)")
    told = [*(f"--{name}={n}" for name, n in SMALL.items()), "--repeats", "1"]
    told += ["--scratch", str(tmp_path)]
    out = ran("compare.py", "changed-shard-size", "limit", *told)
    assert re.search(r"^\| changed max_shard_size: .* \| ≤ 1\.50× \| ", out, re.M)
    assert re.search(r"^\| changed max_shard_size: peak RSS \| \d+ MB \| .* \| met \|$", out, re.M)
    assert re.search(r"^\|  \| mx\.quantize alone, on all cores \| \d", out, re.M)
    out = ran("compare.py", "cold-safetensors", "changed-shard-size", "--only", "doit", *told)
    assert len(re.findall(r"^\| (cold|max_shard_size).* \| doit \| \d", out, re.M)) == 2
    assert "peak RSS |" not in out.partition("| scenario")[0]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs to be refused")
def test_no_comparison_in_memory() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        done = start("compare.py", "limit", "--scratch", folder)
        assert done.returncode == 1
        assert "is in memory (tmpfs)" in done.stderr
        assert not any(Path(folder).iterdir())


def test_a_goal_is_exact_beside_any_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import compare

    goal = compare.Goal("wall", compare.ratio("seconds"), 1.5)
    rows = [*compare.reached([(goal, 0.253), (goal, 12.3)])]
    assert rows[2:] == ["| wall | 0.25× | ≤ 1.50× | met |", "| wall | 12× | ≤ 1.50× | **missed** |"]


def test_the_pictures_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the text, which is what a run shows, but for figures; and of the record."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import picture

    text = picture.TEXT.read_text("utf-8")
    assert picture.drawn(text) == picture.PICTURE.read_text("utf-8")
    assert picture.figure(picture.RECORD.read_text("utf-8")) == picture.FIGURE.read_text("utf-8")
    assert "https://" not in re.sub("<!--.*?-->", "", picture.drawn(text), flags=re.DOTALL)
    assert shape(picture.record()) == shape(text)


def shape(text: str) -> list[str]:
    """A text's lines without figures, units of time and memory, and the spaces around them."""
    figures = re.compile(r"(?<![\w-])[\d.,:]+( [kMG]?B| s|(?= ))?")
    return [" ".join(figures.sub("N", line).split()) for line in text.splitlines()]

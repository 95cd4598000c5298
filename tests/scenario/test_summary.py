"""tests of tasks/cli/commands/summary.py: what a build did, told in Markdown."""

import errno
import re
import shutil
import time
from pathlib import Path
from statistics import median

import pytest

from support import front_door, projects
from support.projects import Project
from tasks.execution import pack

OUTCOMES = ("computed", "reused", "fetched", "failed")


def tables(markdown: str) -> dict[str, dict[str, str]]:
    """Each table's rows as {column: cell}, by their first cell."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        found |= {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    return found


def counts(row: dict[str, str]) -> dict[str, int]:
    return {outcome: int(row[outcome]) for outcome in OUTCOMES if row[outcome]}


def check(project: Project, done: front_door.Finished, *, size: bool = True) -> str:
    """Compare a summary's tables with the log; return its last line."""
    said = project.doit("summary").stdout
    found = tables(said)
    of_target: dict[str, int] = {}
    for stage in (*projects.STAGES, "pack"):
        entries = [entry for entry in done.entries if entry["task"].startswith(f"{stage}:")]
        outcomes = [entry["outcome"] for entry in entries]
        assert counts(found[stage]) == {name: outcomes.count(name) for name in {*outcomes}}
        assert found[stage]["work"] == f"{sum(entry['seconds'] for entry in entries):.1f} s"
        for name in {*outcomes}:
            of_target[name] = of_target.get(name, 0) + outcomes.count(name)
    assert counts(found["model"]) == of_target
    if size:
        built = project.folder / "build" / "model"
        total = sum(path.stat().st_size for path in built.rglob("*") if path.is_file())
        assert found["model"]["size"] == f"{total / 1e3:.3g} kB"
    return said.splitlines()[-1]


def forget(project: Project) -> None:
    """Leave what another machine would have: the cache and the log."""
    shutil.rmtree(project.folder / "build")
    shutil.rmtree(project.state / "manifests")
    (project.state / "doit.json").unlink()


def test_summary(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", "huggingface", **projects.FOUR_BIT)
    assert project.doit("summary").stdout == "### mlx-make\n\nNo task ran.\n"

    first = project.doit()
    assert {entry["outcome"] for entry in first.entries} == {"computed"}
    assert check(project, first) == "Time saved: none, all was computed."

    forget(project)
    second = project.doit()
    assert {entry["outcome"] for entry in second.entries} == {"reused"}
    # A killed run's torn line is none of the log's.
    with (project.state / "log.jsonl").open("a") as file:
        file.write('{"run": "torn')
    took = {
        stage: median(
            entry["seconds"] for entry in first.entries if entry["task"].startswith(f"{stage}:")
        )
        for stage in (*projects.STAGES, "pack")
    }
    saved = sum(took[e["task"].split(":")[0]] - e["seconds"] for e in second.entries)
    assert check(project, second).startswith(f"Time saved: {max(saved, 0.0):.1f} s of work")

    (project.state / "log.jsonl").unlink()
    forget(project)
    assert "unknown" in check(project, project.doit())

    project.configure(quantize={"bits": 8})
    started = time.time()
    project.doit()
    project.configure(quantize={"bits": 6})
    project.doit()
    both = tables(project.doit("summary", "--since", str(started)).stdout)
    assert counts(both["pack"]) == {"computed": 2}
    assert set(both) == {"model", "quantize", "pack"}
    assert "No task ran." in project.doit("summary", "--since", str(time.time())).stdout

    reported = project.doit("report")
    said = tables(project.doit("summary").stdout)
    assert counts(said["report"]) == {"computed": 2}
    of_stages = [counts(said[stage])["computed"] for stage in ("measure", "report")]
    assert sum(of_stages) == len(reported.computed)


def failing_disk(folder: Path) -> None:
    raise OSError(errno.EIO, "Input/output error", str(folder))


def test_failures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = projects.create(tmp_path / "project", "huggingface", **projects.FOUR_BIT)
    monkeypatch.setattr(pack, "sync_tree", failing_disk)
    done = project.doit(expect=1)
    check(project, done, size=False)
    said = project.doit("summary").stdout
    assert re.search(r"^- failed: `pack:model`$", said, re.MULTILINE)

"""A run of more tasks than memory is to hold builds a part of its targets after another."""

import gc
from pathlib import Path
from typing import Any

import pytest

from support import front_door, projects
from support.projects import FOUR_BIT, Project, outcomes
from tasks.cli import parts
from tasks.cli.run import Run
from tasks.core.errors import BuildError
from tasks.execution.pack import Packing
from tasks.planning.node import Node

TARGETS = ("model", "b", "c", "d", "e")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Of five targets, of which two are built at once."""
    monkeypatch.setattr(parts, "MOST_TASKS", 60)
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    for bits, target in enumerate(TARGETS[1:], 3):
        project.configure(target, quantize={"bits": bits, "group_size": 32})
    return project


def test_all_is_built_and_little_of_it_is_in_memory(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget, left = Run._forget, []

    def count(run: Run) -> None:
        forget(run)
        left.append(sum(type(each) is Node for each in gc.get_objects()))

    monkeypatch.setattr(Run, "_forget", count)
    gc.collect()
    before = sum(type(each) is Node for each in gc.get_objects())
    done = project.doit()
    assert outcomes(done).keys() <= {"computed", "reused"}
    assert {f"pack:{target}" for target in TARGETS} <= done.computed
    assert left == [before] * 4
    told = ["1 to 2 of 5 targets", "3 to 4 of 5 targets", "5 to 5 of 5 targets"]
    assert [line for line in done.stdout.splitlines() if " of 5 targets" in line] == told
    assert done.stdout.endswith("5 targets are up to date\n")
    assert len(front_door.runs(project.folder)) == 1
    for target in TARGETS:
        assert project.built(target) == project.anew(target)
    assert project.doit().stdout == "nothing to do: 5 targets are up to date\n"
    project.configure("c", quantize={"bits": 2})
    assert "of 5" not in project.doit().stdout
    assert project.built("c") == project.anew("c")


def test_reports(project: Project) -> None:
    said = project.folder / "said"
    assert project.doit("-o", str(said), "report").stdout == ""
    lines = said.read_text().splitlines()
    assert "5 to 5 of 5 targets" in lines
    packed = {line for line in lines if line.endswith(": pack")}
    assert packed == {f"{target}: pack" for target in TARGETS}  # of all parts
    pages = {path.name for path in (project.folder / "reports").glob("*.html")}
    assert pages == {"index.html", *(f"{target}.html" for target in TARGETS)}
    assert project.doit("report").entries == []


@pytest.mark.parametrize("goes_on", [False, True])
def test_what_fails(project: Project, monkeypatch: pytest.MonkeyPatch, goes_on: bool) -> None:
    """Ends the run with its part, unless it is to go on; what is refused never does."""
    run = Packing.run

    def fail(packing: Packing, *args: Any) -> Any:
        if packing.plan.target.name == "b":
            raise BuildError("it cannot be")
        return run(packing, *args)

    project.configure("e", max_shard_size="1B", source="nowhere")
    done = project.doit(expect=1)
    assert "nowhere does not exist" in done.stderr + done.stdout
    assert {path.name for path in (project.folder / "build").iterdir()} == {*TARGETS} - {"e"}
    for target in TARGETS[:4]:
        project.configure(target, quantize={"bits": 2})
    monkeypatch.setattr(Packing, "run", fail)
    done = project.doit(*["--continue"] * goes_on, expect=None)
    assert done.returncode
    assert "pack:b: it cannot be" in done.stdout
    assert ("pack:d" in done.computed) == goes_on

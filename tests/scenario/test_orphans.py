"""Targets that are in models.toml no more: what was built of them is named, and can be removed."""

import shutil
from pathlib import Path

import pytest

from support import checkpoints
from support.inside import doit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `one` and `two` were built, and `two` is named no more; nor is there any other."""
    checkpoints.make("llama-tied", tmp_path / "checkpoint")
    says(tmp_path, "one", "two")
    doit(tmp_path)
    says(tmp_path, "one")
    (tmp_path / "build" / "mine").mkdir()
    (tmp_path / "build" / "mine" / "thesis.txt").write_text("years of work")
    return tmp_path


def says(folder: Path, *targets: str, file: str = "models.toml") -> None:
    tables = [f'[models.{target}]\nsource = "checkpoint"\n' for target in targets]
    (folder / file).write_text("".join(tables))


def built(folder: Path) -> set[str]:
    return {path.name for path in (folder / "build").iterdir()}


def test_they_are_named_and_removed(folder: Path) -> None:
    said = doit(folder, "list")
    assert f"{folder}/build/two was built here" in said.stderr
    assert said.stderr.count("clean --orphans") == 1
    assert doit(folder, "list", "pack:one").stderr == ""

    assert f"would remove {folder}/build/two" in doit(folder, "clean", "-n", "--orphans").stdout
    assert built(folder) == {"one", "two", "mine"}
    doit(folder, "clean", "--orphans", "one", expect=3)
    assert built(folder) == {"one", "two", "mine"}
    done = doit(folder, "clean", "--orphans")
    assert done.stdout == f"removing {folder}/build/two\n"
    assert built(folder) == {"one", "mine"}
    assert doit(folder, "list").stderr == ""
    assert doit(folder, "clean", "--orphans").stdout == ""
    assert doit(folder).entries == []


def test_what_people_put_there_stays(folder: Path) -> None:
    (folder / "build" / "two" / "notes.txt").write_text("mine")
    (folder / "build" / "two" / "config.json").write_text("{}")
    said = doit(folder, "clean", "--orphans").stdout
    assert "config.json, notes.txt left there, since not built here" in said
    left = {path.name for path in (folder / "build" / "two").iterdir()}
    assert left == {"config.json", "notes.txt"}


@pytest.mark.parametrize("lost", ["", "other.toml", "other.lock"])
def test_those_of_another_file_are_none(folder: Path, lost: str) -> None:
    """Files that list models beside each other have one build/."""
    says(folder, "two", file="other.toml")
    shutil.copy(folder / "models.lock", folder / "other.lock")
    (folder / "uv.lock").write_text("version = 1\n")
    (folder / "pyproject.toml").write_text("[project]\n")
    (folder / lost).unlink() if lost else None
    assert doit(folder, "list").stderr == ""
    assert doit(folder, "clean", "--orphans").stdout == ""
    assert built(folder) == {"one", "two", "mine"}


def test_without_a_record_nothing_is(folder: Path) -> None:
    shutil.rmtree(folder / ".mlx-make" / "manifests" / "two")
    assert doit(folder, "list").stderr == ""
    assert doit(folder, "clean", "--orphans").stdout == ""
    assert built(folder) == {"one", "two", "mine"}

"""What is replaced is removed behind the build: nobody waits for the disk, and nothing is left."""

import errno
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

import front_door
import projects
from cache import files
from cache.errors import NoRoom
from projects import FOUR_BIT, Project

SECONDS = 60


def emptied(folder: Path) -> bool:
    """Wait until nothing is left in a folder."""
    end = time.monotonic() + SECONDS
    while any(folder.iterdir()) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(folder.iterdir())


class SlowDisk(NamedTuple):
    """An `rm` that removes nothing until it is told to."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "SlowDisk":
        disk = cls(folder)
        folder.mkdir()
        script = f'#!/bin/sh\nuntil [ -e "{folder}/go" ]; do sleep 0.02; done\nexec {REAL} "$@"\n'
        (folder / "rm").write_text(script, encoding="utf-8")
        (folder / "rm").chmod(0o755)
        return disk

    @property
    def path(self) -> str:
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def go(self) -> None:
        (self.folder / "go").touch()


REAL = shutil.which("rm")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = projects.create(tmp_path / "p", "huggingface", **FOUR_BIT)
    project.doit()
    return project


def test_a_build_does_not_wait_for_what_it_replaces(project: Project, tmp_path: Path) -> None:
    """Nor does who reads all that it prints, to the end."""
    disk = SlowDisk.at(tmp_path / "bin")
    trash = project.state / "trash"
    old = project.built()
    project.configure(max_shard_size="200 kB")
    try:
        front_door.doit(project.folder, env={"PATH": disk.path})
        (left,) = trash.iterdir()
        assert projects.contents(left) == old
        assert project.built() == project.anew()
        assert [path.name for path in (project.folder / "build").iterdir()] == ["model"]
    finally:
        disk.go()
    assert emptied(trash)


def test_what_was_left_is_removed_by_the_next_run(project: Project) -> None:
    """Of a removal that was killed: a run does so even if it has nothing to do."""
    trash = project.state / "trash"
    (trash / "model-1").mkdir(parents=True)
    (trash / "model-1" / "model.safetensors").touch()
    assert project.doit().entries == []
    assert emptied(trash)


def test_without_rm(project: Project, tmp_path: Path) -> None:
    project.configure(max_shard_size="200 kB")
    front_door.doit(project.folder, env={"PATH": str(tmp_path)})
    assert not any((project.state / "trash").iterdir())
    assert project.built() == project.anew()


def test_what_is_being_removed_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk.at(tmp_path / "bin")
    monkeypatch.setenv("PATH", disk.path)
    trash = tmp_path / "trash"

    def usage(_path: Path) -> "shutil._ntuple_diskusage":
        disk.go()  # not before: else all of it might be gone by then
        return shutil._ntuple_diskusage(100, 0, 0 if any(trash.iterdir()) else 100)

    (tmp_path / "model").mkdir()
    files.discard(tmp_path / "model", trash)
    assert [path.name.partition("-")[0] for path in trash.iterdir()] == ["model"]
    monkeypatch.setattr(shutil, "disk_usage", usage)
    files.room(tmp_path, 100)
    with pytest.raises(NoRoom, match="101 bytes are needed, 100 are free"):
        files.room(tmp_path, 101)


def test_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(_path: Path, _target: Path) -> NoReturn:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "rename", rename)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    files.discard(tmp_path / "model", tmp_path / "trash")
    assert not (tmp_path / "model").exists()


def test_what_is_not_there(tmp_path: Path) -> None:
    files.discard(tmp_path / "model", tmp_path / "trash")
    assert not any((tmp_path / "trash").iterdir())

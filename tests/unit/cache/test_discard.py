"""What is replaced is removed behind the build: nobody waits for the disk, and nothing is left."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from cache.errors import NoRoom
from cache.files import atomic
from support import front_door, projects
from support.projects import FOUR_BIT, Project
from tasks.execution import pack

SECONDS = 60


def emptied(folder: Path, but: Sequence[str] = ()) -> bool:
    """Wait until nothing else is left in a folder."""
    end = time.monotonic() + SECONDS
    while set(os.listdir(folder)) != set(but) and time.monotonic() < end:
        time.sleep(0.01)
    return set(os.listdir(folder)) == set(but)


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
    for name in (".tmp-model-1", ".tmp-model-2", "mine"):
        (trash / name).mkdir(parents=True)
        (trash / name / "model.safetensors").touch()
    assert project.doit().entries == []
    assert emptied(trash, but=["mine"])
    assert (trash / "mine" / "model.safetensors").exists()


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

    (tmp_path / ".tmp-model").mkdir()
    atomic.discard(tmp_path / ".tmp-model", trash)
    assert [path.name.rpartition("-")[0] for path in trash.iterdir()] == [".tmp-model"]
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with ThreadPoolExecutor(8) as pool:  # one that comes while another waits, waits as well
        list(pool.map(lambda _: atomic.room(tmp_path, 100), range(8)))
    assert not any(trash.iterdir())
    with pytest.raises(NoRoom, match="101 bytes are needed, 100 are free"):
        atomic.room(tmp_path, 101)


def test_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(_path: Path, _target: Path) -> NoReturn:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "rename", rename)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    atomic.discard(tmp_path / "model", tmp_path / "trash")
    assert not (tmp_path / "model").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    atomic.discard(tmp_path / "model", tmp_path / "trash")
    assert not (tmp_path / "model").is_symlink()
    assert (tmp_path / "elsewhere").is_dir()


def test_nothing_of_the_build_is_held(tmp_path: Path) -> None:
    """No file that whoever called it had open for it: a lock, or a pipe that is read to its end."""
    disk = SlowDisk.at(tmp_path / "bin")
    (tmp_path / ".tmp-model").mkdir()
    script = (
        "import os, sys; from pathlib import Path; from cache.files import atomic;"
        "atomic.discard(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    read, write = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / ".tmp-model"), str(tmp_path / "trash")],
            env={**os.environ, "PATH": disk.path},
            cwd=front_door.REPOSITORY,
            pass_fds=[write],
            check=True,
            timeout=SECONDS,
        )
        os.close(write)
        os.set_blocking(read, False)
        assert os.read(read, 1) == b""  # BlockingIOError if somebody still could write
        assert any((tmp_path / "trash").iterdir())
    finally:
        os.close(read)
        disk.go()
    assert emptied(tmp_path / "trash")


def test_what_is_not_there(tmp_path: Path) -> None:
    atomic.discard(tmp_path / "model", tmp_path / "trash")
    assert not any((tmp_path / "trash").iterdir())


def test_folders_change_places_where_the_system_has_no_step_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_exchange_in_one", lambda _new, _old: False)
    for name in (".tmp-model", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    pack._exchange(tmp_path / ".tmp-model", tmp_path / "model")
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*")} == {
        "model/.tmp-model",
        ".tmp-model/model",
    }

"""What is replaced is removed beside the build: nobody waits for the disk, and nothing is left."""

import errno
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from cache.errors import NoRoom
from cache.files import space, trash
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


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = projects.create(tmp_path / "p", "huggingface", **FOUR_BIT)
    project.doit()
    return project


def test_what_a_build_replaced_is_gone_when_it_ends(project: Project) -> None:
    project.configure(max_shard_size="200 kB")
    front_door.doit(project.folder)
    assert not any((project.state / "trash").iterdir())
    assert project.built() == project.anew()
    assert [path.name for path in (project.folder / "build").iterdir()] == ["model"]


def test_what_was_left_is_removed_by_the_next_run(project: Project) -> None:
    """Of a removal that was killed: a run does so even if it has nothing to do."""
    trash = project.state / "trash"
    for name in (".tmp-model-1", ".tmp-model-2", "mine"):
        (trash / name).mkdir(parents=True)
        (trash / name / "model.safetensors").touch()
    assert project.doit().entries == []
    assert emptied(trash, but=["mine"])
    assert (trash / "mine" / "model.safetensors").exists()


def test_a_build_does_not_wait_for_what_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its room, where there is none else; and Python's end waits."""
    go = threading.Event()
    remove = trash.remove

    def slowly(path: Path) -> None:
        assert go.wait(SECONDS)
        remove(path)

    monkeypatch.setattr(trash, "remove", slowly)
    left = tmp_path / "trash"

    def usage(_path: Path) -> "shutil._ntuple_diskusage":
        go.set()  # not before: else all of it might be gone by then
        return shutil._ntuple_diskusage(100, 0, 0 if any(left.iterdir()) else 100)

    (tmp_path / ".tmp-model").mkdir()
    trash.discard(tmp_path / ".tmp-model", left)
    assert not (tmp_path / ".tmp-model").exists()
    assert [path.name.rpartition("-")[0] for path in left.iterdir()] == [".tmp-model"]
    assert not any(thread.daemon for thread in trash._removers)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with ThreadPoolExecutor(8) as pool:  # one that comes while another waits, waits as well
        list(pool.map(lambda _: space.require_free(tmp_path, 100), range(8)))
    assert not any(left.iterdir())
    with pytest.raises(NoRoom, match="101 bytes are needed, 100 are free"):
        space.require_free(tmp_path, 101)


def test_on_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(_path: Path, _target: Path) -> NoReturn:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "rename", rename)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    trash.discard(tmp_path / "model", tmp_path / "trash")
    assert not (tmp_path / "model").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    trash.discard(tmp_path / "model", tmp_path / "trash")
    assert not (tmp_path / "model").is_symlink()
    assert (tmp_path / "elsewhere").is_dir()


def test_what_is_not_there(tmp_path: Path) -> None:
    trash.discard(tmp_path / "model", tmp_path / "trash")
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

"""Disks that fail: one line with the path, its cause and what to do; the next run is as ever."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.lock import Lock
from support import checkpoints
from support.projects import FOUR_BIT, Project, create
from support.running import temporary

CAUSES = {
    errno.EIO: "The disk, or what connects it, may be failing",
    errno.EROFS: "Have it writable",
    errno.EACCES: "Have it writable",
    errno.EMFILE: "Let a process open more files (ulimit -n",
    errno.ESTALE: "Mount that file system anew",
}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = create(tmp_path, "huggingface", **FOUR_BIT)
    made.doit()
    return made


def failing(cause: int, path: Path) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(cause, os.strerror(cause), str(path))

    return fail


def one_line(project: Project, path: Path, cause: int) -> None:
    done = project.doit(expect=None)
    assert done.returncode not in (0, 1), done
    said = [line for line in done.stderr.splitlines() if line]
    assert len(said) == 1, said
    assert said[0].startswith(f"ERROR: {path}: {os.strerror(cause)}. {CAUSES[cause]}")


@pytest.mark.parametrize("cause", CAUSES)
def test_a_manifest_that_cannot_be_read(
    cause: int, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project.manifest("quantize", "norm")
    project.configure(quantize={"bits": 8})
    with monkeypatch.context() as patch:
        patch.setattr("tasks.cli.doit_database._content_digest", failing(cause, path))
        one_line(project, path, cause)
    project.doit()
    assert project.built() == project.anew()


@pytest.mark.parametrize("cause", CAUSES)
def test_a_lock_that_cannot_be_opened(
    cause: int, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project.state / "lock"
    before = project.built()
    with monkeypatch.context() as patch:
        patch.setattr("cache.files.own.open_own", failing(cause, path))
        one_line(project, path, cause)
    assert project.doit().entries == []
    assert project.built() == before


def test_a_file_where_the_state_is(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    shutil.rmtree(project.state)
    project.state.write_text("a file")
    done = project.doit(expect=None)
    assert f"{project.state}: " in done.stderr
    assert "move it away" in done.stderr
    assert "Traceback" not in done.stderr
    project.state.unlink()
    project.doit()


@pytest.mark.parametrize("made", [True, False])
def test_a_cache_that_cannot_be_written_is_locked_all_the_same(
    made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By who reads in it; nobody who sees it so can remove anything."""
    lock = Lock(tmp_path)
    if made:
        with lock.using():
            pass
    system = os.open

    def read_only(path: object, flags: int, *args: object, **keys: object) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY) and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return system(path, flags, *args, **keys)

    monkeypatch.setattr(os, "open", read_only)
    with lock.using():
        pass
    with pytest.raises(OSError, match="Read-only"), lock.alone(lambda: None):
        pass


@pytest.mark.parametrize("linked", [False, True])
def test_an_exchange_that_was_killed(linked: bool, project: Project, tmp_path: Path) -> None:
    """Where two folders take each other's place in three steps, as without renameat2."""
    build = project.folder / "build"
    if linked:
        build.rename(project.folder / "elsewhere")
        build.symlink_to("elsewhere")
    before = project.built()
    aside = build / ".tmp-model~"
    (build / "model").rename(aside)  # killed after the first step
    shutil.copytree(aside, build / ".tmp-model")
    assert project.doit().entries == []
    assert project.built() == before
    shutil.copytree(build / "model", aside)  # killed after the second
    assert project.doit().entries == []
    assert project.built() == before
    assert temporary(build) == []
    assert not aside.exists()


def test_an_exchange_that_was_killed_with_nothing_new(project: Project) -> None:
    """What is nobody's stays: a folder of that name, of no target."""
    other = project.folder / "build" / ".tmp-other~"
    other.mkdir()
    project.doit()
    assert other.exists()


def test_a_report_of_what_a_library_computes(tmp_path: Path) -> None:
    project = Project(tmp_path, "huggingface")
    checkpoints.make("deepseek-v3", project.checkpoint)
    project.configure(**FOUR_BIT)
    project.doit()
    done = project.doit("report")
    assert "Traceback" not in done.stderr
    assert "mlx-lm's sanitize" in (tmp_path / "reports/model.html").read_text().replace(
        "&#39;", "'"
    )

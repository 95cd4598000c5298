"""Disks whose inodes and times move by themselves (sshfs, mergerfs, SMB): a digest, no error."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.files.stamp import Stamp
from support.projects import FOUR_BIT, SOURCES, alter, create, outcomes, touch, weight_files
from tasks.checkpoints import safetensors_file


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have each look at a file find it under another inode, from then on."""

    def move() -> None:
        inodes = itertools.count(1 << 40)

        def of_stat(stat: os.stat_result) -> Stamp:
            return Stamp(stat.st_size, stat.st_mtime_ns, next(inodes))

        monkeypatch.setattr(Stamp, "of_stat", of_stat)

    return move


@pytest.mark.parametrize("source", SOURCES)
def test_inodes_that_move(source: str, moving: Callable[[], None], tmp_path: Path) -> None:
    project = create(tmp_path, source, **FOUR_BIT)
    wanted = project.anew()
    moving()
    assert project.doit().computed == project.tasks()
    assert project.built() == wanted
    again = project.doit("--locked")
    assert again.computed == set()
    assert project.built() == wanted
    project.configure(quantize={"bits": 8})
    project.doit()
    assert project.built() == project.anew()


def test_times_that_move_between_runs(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    wanted = project.built()
    touch(*weight_files(project.checkpoint), *(tmp_path / "build" / "model").iterdir())
    assert project.doit("--locked").computed == set()
    assert project.built() == wanted
    for path in weight_files(project.checkpoint):  # as a second name does: the ctime alone
        path.chmod(0o600)
    done = project.doit()  # the files are digested, and nothing is made or packed anew
    assert outcomes(done) == {"reused": project.tasks(["extract"], pack=False)}
    assert project.built() == wanted


def test_a_time_that_moves_while_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where the client of a network disk is told late: the bytes are the same."""
    project = create(tmp_path, "huggingface", quantize={"bits": 4})
    project.doit()
    project.configure(quantize={"bits": 8})
    wanted = project.anew()
    original, reads = Stamp.of, itertools.count(1)

    def of(path: str | Path | int) -> Stamp:
        number = next(reads) if isinstance(path, int) else 0
        if number in (10, 60):
            touch(*weight_files(project.checkpoint))
        return original(path)

    monkeypatch.setattr(Stamp, "of", of)
    project.doit("-n", "1")
    assert next(reads) > 60
    assert project.built() == wanted


def test_a_file_that_is_written_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was digested before it and what after it may not belong together."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    original, reads = Stamp.of, itertools.count(1)

    def of(path: str | Path | int) -> Stamp:
        if isinstance(path, int) and next(reads) == 20:
            alter(project.checkpoint, "model.layers.3.mlp.up_proj.weight")
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(Stamp, "of", of)
        done = project.doit("-n", "1", expect=1)
    assert "changed while it was read. Run doit again when it is whole" in done.stdout
    project.accept()
    project.doit()
    assert project.built() == project.anew()


CHANGED = "model.layers.1.mlp.up_proj.weight"


def alter_unseen(checkpoint: Path) -> None:
    """Change tensors of a file, whose size, time and inode stay."""
    for name in (CHANGED, "model.layers.2.mlp.up_proj.weight"):
        ((path, stat),) = (
            (path, path.stat()) for path in weight_files(checkpoint) if has(path, name)
        )
        alter(checkpoint, name)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert Stamp.of(path) == Stamp.of_stat(stat)


def has(path: Path, name: str) -> bool:
    return any(stored.name == name for stored in safetensors_file.read(path))


def test_a_checkpoint_that_changes_unseen(has_ctime: bool, tmp_path: Path) -> None:
    """Never a model of both: not even of a setting that only one layer is made again for."""
    project = create(tmp_path, "huggingface", quantize={"bits": 4})
    project.doit()
    assert "nothing to do" in project.doit().stdout
    before = project.built()
    alter_unseen(project.checkpoint)
    said = project.doit(expect=1 if has_ctime else 0).stdout
    assert ("is not what models.lock has" if has_ctime else "nothing to do") in said
    assert project.built() == before
    project.configure(quantize={"bits": 4, "rules": [{"match": CHANGED[:-7], "bits": 8}]})
    said = project.doit(expect=1).stdout
    assert ("is not what models.lock has" if has_ctime else "comes out differently now") in said
    project.doit(expect=1)
    project.accept()
    project.doit()
    assert project.built() == project.anew()


@pytest.mark.parametrize("at", [24, 36, 48])
def test_a_checkpoint_that_changes_unseen_while_it_is_read(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = create(tmp_path, "huggingface", quantize={"bits": 4})
    original, reads = Stamp.of, itertools.count(1)

    def of(path: str | Path | int) -> Stamp:
        if isinstance(path, int) and next(reads) == at:
            alter_unseen(project.checkpoint)
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(Stamp, "of", of)
        done = project.doit("-n", "1", expect=None)
    if done.returncode:
        assert "changed while it was read" in done.stdout or "comes out differently" in done.stdout
        project.doit()
    assert project.built() == project.anew()

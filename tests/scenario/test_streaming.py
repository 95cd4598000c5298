"""A checkpoint whose bytes come from elsewhere: fetched once, used by all, and gone again."""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache import fetched
from cache.store import Store
from support import inside, projects, tar_source
from support.projects import FOUR_BIT, Project
from support.tar_source import TarSource
from tasks.checkpoints import safetensors_file
from tasks.checkpoints.sources import SOURCES
from tasks.core.errors import CheckpointError
from tasks.execution.resources import DiskBudget
from tasks.execution.streaming.copies import Copies
from tasks.execution.streaming.whole_files import WholeFile


class Reads:
    """What was read of weight files, in ranges.

    Attributes:
        ranges: file, first byte, end.
        on_read: called with each piece before it is given.
    """

    def __init__(self) -> None:
        self.ranges: list[tuple[str, int, int]] = []
        self.on_read: Callable[[bytes], None] = lambda _: None

    @property
    def nbytes(self) -> int:
        return sum(stop - start for _, start, stop in self.ranges)

    def twice(self) -> set[tuple[str, int, int]]:
        """The ranges that have bytes in common with an earlier one."""
        found = set()
        for index, (name, start, stop) in enumerate(self.ranges):
            for other, begin, end in self.ranges[:index]:
                if other == name and max(start, begin) < min(stop, end):
                    found.add((name, start, stop))
        return found


@pytest.fixture
def reads(project: Project, monkeypatch: pytest.MonkeyPatch) -> Reads:
    """All reads but those of headers, which the toy does not remember."""
    found = Reads()
    files = projects.weight_files(project.checkpoint)
    weights = {p.name: min(s.offset for s in safetensors_file.read(p)) for p in files}
    read = TarSource.read

    def counted(self: TarSource, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        at = start
        try:
            for data in read(self, name, start, nbytes):
                if start >= weights.get(name, start + 1):
                    found.on_read(data)
                at += len(data)
                yield data
        finally:
            if start >= weights.get(name, at):
                found.ranges.append((name, start, at))

    monkeypatch.setitem(SOURCES, tar_source.PREFIX, tar_source)
    monkeypatch.setattr(TarSource, "read", counted)
    return found


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = projects.create(tmp_path / "project", "huggingface", **FOUR_BIT)
    archive(made)
    made.configure(source="tar:checkpoint.tar")
    return made


def archive(project: Project) -> None:
    with tarfile.open(project.folder / "checkpoint.tar", "w") as tar:
        for path in sorted(project.checkpoint.iterdir()):
            tar.add(path, path.name)


def weights_nbytes(project: Project) -> int:
    """The size of the checkpoint's tensors, all of them."""
    return sum(
        stored.nbytes
        for path in projects.weight_files(project.checkpoint)
        for stored in safetensors_file.read(path)
    )


def bytes_of_tensors(project: Project) -> set[Path]:
    """The cache's files of tensors' bytes, but for the built weight files."""
    built = {path.stat().st_ino for path in (project.folder / "build").rglob("*.safetensors")}
    blobs = (path for path in (project.store / "blobs").rglob("*") if path.is_file())
    return {p for p in blobs if p.suffix != ".parts" and p.stat().st_ino not in built}


# What is larger than the limit waits until nothing else is reserved.
ONE_AT_A_TIME = property(lambda _: 1, lambda *_: None)
VARIANTS = {
    "model": {"dtype": None, "quantize": {"bits": 4}},
    "eight": {"quantize": {"bits": 8}},
    "half": {"dtype": "float16", "quantize": {"bits": 4}},
    "plain": {},
}


def test_each_byte_once_for_all_targets_and_none_is_left(project: Project, reads: Reads) -> None:
    """Four variants, quantized, cast, and as the checkpoint has it, are those of the folder."""
    for name, keys in VARIANTS.items():
        project.configure(name, **{"source": "tar:checkpoint.tar", **keys})
    inside.doit(project.folder)
    assert reads.twice() == set()
    assert reads.nbytes == weights_nbytes(project)
    assert bytes_of_tensors(project) == set()
    assert {name: project.built(name) for name in VARIANTS} == {
        name: project.anew(name) | {"README.md": project.built(name)["README.md"]}
        for name in VARIANTS
    }
    assert inside.doit(project.folder).entries == []


def test_what_changed_is_fetched_again(project: Project, reads: Reads) -> None:
    inside.doit(project.folder)
    fetched = reads.nbytes
    older = {*project.packs.iterdir()}
    project.configure(quantize={"bits": 8})
    del reads.ranges[:]
    inside.doit(project.folder)
    assert reads.twice() == set()
    assert 0.9 * fetched < reads.nbytes <= fetched  # but for what is passed on
    assert bytes_of_tensors(project) == older


def test_what_is_kept_is_not(project: Project, reads: Reads) -> None:
    project.keep = ["extract"]
    project.configure()
    inside.doit(project.folder)
    project.configure(quantize={"bits": 8})
    reads.ranges.clear()
    inside.doit(project.folder)
    assert reads.nbytes == 0
    project.keep = None
    project.configure(quantize={"bits": 6})
    inside.doit(project.folder)
    assert reads.nbytes == 0


def test_a_disk_that_is_too_small(project: Project, reads: Reads) -> None:
    """Nothing is fetched; with what the error asks for, all that is reserved has room."""
    for name, keys in VARIANTS.items():
        project.configure(name, **{"source": "tar:checkpoint.tar", **keys})
    project.disk = "1MB"
    project.configure()
    refused = inside.doit(project.folder, expect=3)
    assert reads.nbytes == 0
    assert refused.entries == []
    project.disk = re.search(r'set disk = "(\d+MB)"', refused.stderr)[1]
    project.configure()
    inside.doit(project.folder)
    assert {name: project.built(name) for name in VARIANTS} == {
        name: project.anew(name) | {"README.md": project.built(name)["README.md"]}
        for name in VARIANTS
    }


@pytest.mark.parametrize("threads", ["0", "4"])
def test_layers_wait_for_room(
    project: Project, reads: Reads, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    """Where there is room for one layer, threads wait for it, and never for each other."""
    held = []
    reserve = DiskBudget.reserve

    def watched(self: DiskBudget, need: int, waits: Callable[[], None]) -> None:
        reserve(self, need, waits)
        held.append((self.reserved, need))

    monkeypatch.setattr(DiskBudget, "reserve", watched)
    monkeypatch.setattr(DiskBudget, "limit", ONE_AT_A_TIME, raising=False)
    for name, keys in VARIANTS.items():
        project.configure(name, **{"source": "tar:checkpoint.tar", **keys})
    inside.doit(project.folder, "-n", threads, "pack", "report")
    assert [reserved for reserved, _ in held] == [need for _, need in held]
    assert len(held) == len(projects.STORED["huggingface"])
    assert reads.twice() == set()


def test_another_task_fails_while_layers_wait_for_room(
    project: Project, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiskBudget, "limit", ONE_AT_A_TIME, raising=False)

    def cut(_: bytes) -> None:
        raise CheckpointError("the line is dead")

    reads.on_read = cut
    failed = inside.doit(project.folder, "-n", "4", expect=1)
    assert "the line is dead" in failed.stdout
    assert "it waited for room on the disk" not in failed.stdout


def hashes(project: Project) -> dict[str, list]:
    return {
        path.name: [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in projects.weight_files(project.checkpoint)
    }


def say(project: Project, hashes: dict[str, list]) -> None:
    (project.folder / "checkpoint.hashes").write_text(json.dumps(hashes))


def unverified(project: Project) -> list[str]:
    lock = json.loads((project.folder / "models.lock").read_bytes())
    return lock["sources"]["tar:checkpoint.tar"].get("unverified", [])


def test_whole_files_are_verified(project: Project, reads: Reads) -> None:
    """Bytes that are no tensor's pass, too; with one wrong sha256 nothing is built."""
    right = hashes(project)
    wrong = dict(right)
    bad = min(wrong)
    wrong[bad] = [wrong[bad][0], "0" * 64]
    say(project, wrong)
    refused = inside.doit(project.folder, expect=1)
    assert f"{bad} of tar:" in refused.stdout
    assert not (project.folder / "build" / "model").exists()
    assert not (project.folder / "models.lock").exists()
    say(project, right)
    reads.ranges.clear()
    inside.doit(project.folder)
    assert max(right) not in {name for name, *_ in reads.ranges}  # all of that is on record
    assert unverified(project) == []
    assert project.built() == project.anew() | {"README.md": project.built()["README.md"]}


def test_a_build_that_was_cut_off(
    project: Project, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came is not fetched again; what nobody held against a sha256, models.lock names."""
    monkeypatch.setattr(fetched, "PIECE_BYTES", 1000)
    say(project, hashes(project))
    left = [0]

    def cut(data: bytes) -> None:
        left[0] -= len(data)
        if left[0] < 0:
            raise CheckpointError("the line is dead")

    reads.on_read = cut
    for _ in range(5):
        left[0] = weights_nbytes(project) // 7
        inside.doit(project.folder, expect=1)
    left[0] = 10**9
    inside.doit(project.folder)
    assert reads.nbytes <= 1.05 * sum(size for size, _ in hashes(project).values())
    assert unverified(project)
    assert project.built() == project.anew() | {"README.md": project.built()["README.md"]}
    project.configure(quantize={"bits": 8})  # all bytes pass again
    inside.doit(project.folder)
    assert unverified(project) == []


def test_what_a_power_cut_left_of_copies(project: Project, reads: Reads, tmp_path: Path) -> None:
    """Their sizes, and nothing of their bytes: no file is taken for another because of them."""
    say(project, hashes(project))
    checkpoint = inside.session(project.folder).plans["model"].checkpoint
    store = Store.at(tmp_path / "store")
    copies = Copies(store)
    name, (_, sha256) = min(hashes(project).items())
    keys = [key for key, stored in checkpoint.stored.items() if stored.file == name]
    for key in keys:
        copies.fetch(copies.of(checkpoint, key))
    lost = tmp_path / "store" / "blobs" / "packs" / copies.of(checkpoint, keys[0]).name
    lost.write_bytes(bytes(lost.stat().st_size))
    file = WholeFile(checkpoint, name, sha256)
    file.advance(store.blobs, copies, lambda copy: True)
    assert file.actual == sha256
    assert [*file.digests] == [keys[0]]
    assert not lost.exists()

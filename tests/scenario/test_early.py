"""Weight files that are begun while layers are still made.

A build is held at its last layer: by then all that comes before it in the files can be there.
Layers that are made now write into the files themselves; of those that are on record the blobs are
copied.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import checkpoints, front_door
from support.projects import FOUR_BIT, LAYERS, Project, Stored, contents, create, flip, outcomes
from support.running import DEADLINE_SECONDS, start, temporary, wait_for

SUFFIXES = (".safetensors", ".npz")


@dataclass
class Held:
    """A build that waits where it first opens a file, by default at the end of its last layer.

    That layer's manifest is looked at when its blobs are there, just before it is written.
    """

    project: Project
    at: str = os.sep.join(["", "quantize", "lm_head.json"])
    args: tuple[str, ...] = ()
    cores: int = 4

    def __post_init__(self) -> None:
        self._there = {*self.project.packs.glob("*")}
        self._mark, self._go = self.project.folder / "mark", self.project.folder / "go"
        self._mark.unlink(missing_ok=True)
        self._go.unlink(missing_ok=True)
        hook = {"hold": [self.at, str(self._mark), str(self._go)], "cores": self.cores}
        self.process = start(self.project, *self.args, hook=hook)
        self.until(self._mark.exists)

    def until(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, self.process)
        assert self.process.poll() is None, self.process.communicate()

    def written(self, least: float) -> set[int]:
        """Wait until the weight files that are begun have this many bytes; their inodes.

        A link keeps each, so that no other file can get its inode.
        """
        begun: list[Path] = []

        def enough() -> bool:
            begun[:] = self.packs() or weight_files(self.project, ".tmp-model")
            headed = all(beginning(path).strip(b"\0") for path in begun)
            return headed and sum(path.stat().st_size for path in begun) >= least

        self.until(enough)
        inodes = {path.stat().st_ino: path for path in begun}
        for inode, path in inodes.items():
            os.link(path, self.project.folder / f"inode-{inode}")
        return set(inodes)

    def done_with(self, layers: set[str]) -> None:
        """Wait until the build has told of layers, their manifests written."""
        wanted = {f"quantize:model:{layer}" for layer in layers}

        def told() -> bool:
            entries = front_door.log(self.project.folder)
            last = [entry["task"] for entry in entries if entry["run"] == entries[-1]["run"]]
            return wanted <= {*last}

        self.until(told)

    def packs(self) -> list[Path]:
        """The files that layers write into."""
        return sorted({*self.project.packs.glob("*")} - self._there)

    def go_on(self, status: int = 0) -> str:
        self._go.touch()
        output = "".join(self.process.communicate(timeout=DEADLINE_SECONDS))
        assert self.process.returncode == status, output
        assert "Traceback" not in output
        return output


def weight_files(project: Project, folder: str) -> list[Path]:
    """The weight files in a folder of build/."""
    paths = (project.folder / "build" / folder).glob("*.*")
    return [path for path in paths if path.suffix in SUFFIXES]


def beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def packed(project: Project) -> set[int]:
    """The inodes of the packed weight files, and of those in the cache that they share blocks with.

    Which is what they do where the file system can; else these are the same files.
    """
    built = project.built()
    wanted = {built[path.name] for path in weight_files(project, "model")}
    cached = contents(project.packs).items()
    shared = [project.packs / name for name, digest in cached if digest in wanted]
    return {path.stat().st_ino for path in (*weight_files(project, "model"), *shared)}


def put_on_record(project: Project) -> None:
    """Make the layers, and have doit forget that they are there."""
    project.doit("quantize:model")
    project.doit("forget", "quantize:model")


def blobs_of(project: Project, layer: str) -> list[Stored]:
    """The blobs of what quantize made of a layer."""
    manifest = json.loads(project.manifest("quantize", layer).read_bytes())
    return [project.stored("quantize", layer, name) for name, *_ in manifest["tensors"]]


def all_but_the_last(project: Project, *last: str) -> int:
    """Build a project; bytes of the weight files, but for those of the last layers' tensors."""
    project.doit()
    whole = sum(path.stat().st_size for path in weight_files(project, "model"))
    blobs = (blob for layer in last for blob in blobs_of(project, layer))
    return whole - sum(blob.length for blob in blobs)


@pytest.mark.parametrize("on_record", [False, True])
@pytest.mark.parametrize(
    ("kind", "last", "keys"),
    [
        ("huggingface", "lm_head", {}),
        ("huggingface", "lm_head", {"max_shard_size": "300kB"}),
        ("meta", "output", {"layout": "mlx-examples"}),
    ],
)
def test_all_but_the_last_layer_is_written_meanwhile(
    kind: str, last: str, keys: dict, on_record: bool, tmp_path: Path
) -> None:
    other = create(tmp_path / "other", kind)
    project = create(tmp_path / "project", kind)
    before: dict[str, str] = {}
    for bits in (4, 8):  # at first there is nothing, then what stays until all is written
        settings = {"dtype": "float16", "quantize": {"bits": bits}, **keys}
        other.configure(**settings)
        project.configure(**settings)
        least = 0.99 * all_but_the_last(other, last)
        if on_record:
            put_on_record(project)
        held = Held(project, os.sep.join(["", "quantize", f"{last}.json"]))
        begun = held.written(least)
        assert (begun == {path.stat().st_ino for path in held.packs()}) != on_record
        assert project.built() == before
        held.go_on()
        assert begun <= packed(project), "it was written anew"
        before = project.built()
        assert before == project.anew()
        assert temporary(project.folder) == []
        assert project.doit().entries == []


def test_a_head_that_is_made_first_is_written_last(tmp_path: Path) -> None:
    """It is large; all that comes before the layer that is waited for is there meanwhile."""
    other, project = (create(tmp_path / n, "huggingface", **FOUR_BIT) for n in ("other", "project"))
    for each in (other, project):
        checkpoints.make("llama", each.checkpoint, vocab_size=2048)
    least = 0.99 * all_but_the_last(other, "layers.3", "norm", "lm_head")
    put_on_record(project)
    held = Held(project, os.sep.join(["", "quantize", "layers.3.json"]))
    begun = held.written(least)
    held.go_on()
    assert begun <= packed(project), "it was written anew"
    assert project.built() == project.anew()


def test_nothing_is_begun_that_was_not_asked_for(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    held = Held(project, args=("quantize:model",))
    held.go_on()
    assert not (tmp_path / "build").exists()
    project.doit("pack:model")
    assert project.built() == project.anew()


def test_two_cores_are_left_to_the_layers(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    held = Held(project, cores=2)
    time.sleep(0.5)
    assert not (tmp_path / "build").exists()
    held.go_on()
    assert project.built() == project.anew()


@pytest.mark.parametrize("copied", [True, False])
def test_blobs_that_are_damaged_meanwhile(copied: bool, tmp_path: Path) -> None:
    """Those that were copied already matter no more; the others are made again."""
    other = create(tmp_path / "other", "huggingface", **FOUR_BIT)
    least = all_but_the_last(other, "lm_head")  # every byte of it
    project = create(tmp_path / "project", "huggingface", **FOUR_BIT)
    put_on_record(project)
    held = Held(project)
    begun = held.written(least)
    last = {stored.blob.relative_to(other.store) for stored in blobs_of(other, "lm_head")}
    assert len(last) == 3
    changed = 0
    for blob in (project.store / "blobs").glob("??/*"):
        if blob.suffix != ".parts" and (blob.relative_to(project.store) in last) != copied:
            flip(blob)
            changed += 1
    assert changed >= 3
    held.go_on()
    assert project.built() == project.anew()
    assert (begun <= packed(project)) == copied
    assert temporary(project.folder) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_a_file_that_is_damaged_before_it_is_whole(damage: str, tmp_path: Path) -> None:
    """What layers have written there is looked at as all that is packed."""
    other = create(tmp_path / "other", "huggingface", **FOUR_BIT)
    last = all_but_the_last(other, "lm_head")  # where that begins
    project = create(tmp_path / "project", "huggingface", **FOUR_BIT)
    held = Held(project)
    held.written(0.99 * last)
    held.done_with({*LAYERS["huggingface"]} - {"lm_head"})
    (pack,) = held.packs()
    if damage == "flipped":
        flip(pack, last + 1000)
    elif damage == "cut":
        os.truncate(pack, last // 2)
    else:
        pack.unlink()
    held.go_on()
    assert project.built() == project.anew()
    assert temporary(project.folder) == []
    assert project.doit().entries == []


def test_a_file_that_is_removed_meanwhile(tmp_path: Path) -> None:
    settings = {**FOUR_BIT, "max_shard_size": "300kB"}
    least = 0.99 * all_but_the_last(
        create(tmp_path / "other", "huggingface", **settings), "lm_head"
    )
    project = create(tmp_path / "project", "huggingface", **settings)
    put_on_record(project)
    held = Held(project)
    held.written(least)
    first, *_ = sorted((project.folder / "build" / ".tmp-model").glob("*.safetensors"))
    first.unlink()
    held.go_on()
    assert project.built() == project.anew()


def test_nowhere_to_begin(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    (tmp_path / "build").touch()
    done = project.doit(expect=3)
    assert f"{tmp_path}/build is in the way: it is a file. Move it away." in done.stderr
    assert done.entries == []
    assert "Traceback" not in done.stdout + done.stderr


def test_a_target_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    other = create(tmp_path / "other", "huggingface", dtype="float16", quantize={"bits": 8})
    least = 0.99 * all_but_the_last(other, "lm_head")
    project = create(tmp_path / "project", "huggingface", **FOUR_BIT)
    project.doit()
    before = project.built()
    project.configure(quantize={"bits": 8})
    held = Held(project)
    held.written(least)
    held.done_with({*LAYERS["huggingface"]} - {"lm_head", "norm"})
    manifests = project.state / "manifests" / "model" / "quantize"
    shutil.rmtree(manifests)
    manifests.touch()  # so that the last one cannot be written
    assert "ERROR" in held.go_on(status=1)
    assert project.built() == before
    assert temporary(project.folder / "build") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("where", ["layers", "pack"])
def test_an_end_before_the_time(where: str, number: signal.Signals, tmp_path: Path) -> None:
    """It comes at once, whatever is being written: each thread that the hook holds stays held."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    before = project.built()
    project.configure(quantize={"bits": 8})
    if where == "layers":
        held = Held(project)
        held.written(1)
    else:
        held = Held(project, os.sep.join([".tmp-model", "config.json"]))
    held.process.send_signal(number)
    held.process.communicate(timeout=DEADLINE_SECONDS / 6)
    assert held.process.returncode == (130 if number == signal.SIGINT else -number)
    assert project.built() == before
    project.configure(**FOUR_BIT)  # taken back: there is nothing to pack, and nothing is left
    assert "pack:model" not in outcomes(project.doit()).get("computed", set())
    assert temporary(tmp_path / "build") == []
    assert project.built() == before


def test_what_is_others_stays(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    mine = tmp_path / "build" / ".tmp-mine" / "file"
    mine.parent.mkdir(parents=True)
    mine.touch()
    project.doit()
    assert mine.exists()

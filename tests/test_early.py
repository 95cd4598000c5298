"""Weight files that are begun while layers are still made.

A build is held at its last layer: by then all that comes before it in the files can be there.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from projects import FOUR_BIT, Project, create, outcomes
from running import DEADLINE_SECONDS, start, temporary, wait_for

SUFFIXES = (".safetensors", ".npz")


@dataclass
class Held:
    """A build that waits at the end of its last layer."""

    project: Project
    last: str = "lm_head"
    args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._mark, self._go = self.project.folder / "mark", self.project.folder / "go"
        self._mark.unlink(missing_ok=True)
        self._go.unlink(missing_ok=True)
        # The manifest is looked at when the layer is made, just before it is written.
        part = os.sep.join(["", "quantize", f"{self.last}.json"])
        hook = {"hold": [part, str(self._mark), str(self._go)]}
        self.process = start(self.project, *self.args, hook=hook)
        self.until(self._mark.exists)

    def until(self, condition: Callable[[], bool]) -> None:
        wait_for(condition, self.process)
        assert self.process.poll() is None, self.process.communicate()

    def written(self) -> int:
        """Bytes of the weight files that are begun."""
        return sum(
            path.stat().st_size
            for path in (self.project.folder / "build").glob(".tmp-model/*.*")
            if path.suffix in SUFFIXES
        )

    def go_on(self, status: int = 0) -> str:
        self._go.touch()
        output = "".join(self.process.communicate(timeout=DEADLINE_SECONDS))
        assert self.process.returncode == status, output
        assert "Traceback" not in output
        return output


def all_but_the_last(project: Project, last: str) -> int:
    """Build a project; bytes of the weight files, but for those of the last layer's tensors."""
    project.doit()
    files = (project.folder / "build" / "model").glob("*.*")
    whole = sum(path.stat().st_size for path in files if path.suffix in SUFFIXES)
    manifest = json.loads(project.manifest("quantize", last).read_bytes())
    names = [name for name, *_ in manifest["tensors"]]
    blobs = [project.blob("quantize", last, name) for name in names]
    return whole - sum(blob.stat().st_size for blob in blobs)


@pytest.mark.parametrize(
    ("kind", "last", "keys"),
    [
        ("huggingface", "lm_head", {}),
        ("huggingface", "lm_head", {"max_shard_size": "300kB"}),
        ("meta", "output", {"layout": "mlx-examples"}),
    ],
)
def test_all_but_the_last_layer_is_written_meanwhile(
    kind: str, last: str, keys: dict, tmp_path: Path
) -> None:
    keys = FOUR_BIT | keys
    least = 0.99 * all_but_the_last(create(tmp_path / "other", kind, **keys), last)
    project = create(tmp_path / "project", kind, **keys)
    held = Held(project, last)
    held.until(lambda: held.written() >= least)
    assert not (project.folder / "build" / "model").exists()
    held.go_on()
    assert project.built() == project.anew()
    assert temporary(project.folder) == []
    assert project.doit().entries == []
    # The same over what is there, which stays until all is written.
    before = project.built()
    project.configure(quantize={"bits": 8})
    held = Held(project, last)
    held.until(lambda: held.written() >= least)
    assert project.built() == before
    held.go_on()
    assert project.built() == project.anew()
    assert temporary(project.folder) == []


def test_nothing_is_begun_that_was_not_asked_for(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    held = Held(project, args=("quantize:model",))
    held.go_on()
    assert not (tmp_path / "build").exists()
    project.doit("pack:model")
    assert project.built() == project.anew()


def test_what_changes_meanwhile_is_packed_as_it_is(tmp_path: Path) -> None:
    """Blobs that were copied or not, lost or damaged; nothing wrong is ever packed."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    held = Held(project)
    held.until(lambda: held.written() > 0)
    project.blob("quantize", "layers.0", "model.layers.0.mlp.up_proj.weight").unlink()
    for blob in (project.store / "blobs").glob("*/*"):
        if blob.stat().st_size > 4096 and blob.suffix != ".parts":
            data = bytearray(blob.read_bytes())
            data[0] ^= 1
            blob.write_bytes(data)
    held.go_on()
    assert project.built() == project.anew()
    assert temporary(project.folder) == []


def test_a_target_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    before = project.built()
    project.configure(quantize={"bits": 8})
    held = Held(project)
    held.until(lambda: held.written() > 0)
    shutil.rmtree(project.state / "manifests" / "model" / "quantize")
    (project.state / "manifests" / "model" / "quantize").touch()  # so that it cannot be written
    assert "ERROR" in held.go_on(status=1)
    assert project.built() == before
    assert temporary(project.folder / "build") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_end_before_the_time(number: signal.Signals, tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    before = project.built()
    project.configure(quantize={"bits": 8})
    held = Held(project)
    held.until(lambda: held.written() > 0)
    held.process.send_signal(number)
    held.process.communicate(timeout=DEADLINE_SECONDS)
    assert bool(temporary(tmp_path / "build")) == (number == signal.SIGKILL)
    assert project.built() == before
    project.configure(**FOUR_BIT)  # taken back: there is nothing to pack, and nothing is left
    assert "pack:model" not in outcomes(project.doit()).get("computed", set())
    assert temporary(tmp_path / "build") == []
    assert project.built() == before

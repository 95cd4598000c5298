"""A store that lies, unsigned: models.lock knows better, and what it says of files is compared."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cache.records.manifests import Manifest, Tensor
from support import remotes
from support.machines import REMOTE, SMALL, Machine, first, warnings
from support.projects import FOUR_BIT, outcomes

Lie = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Two targets of the same shapes and other weights, built into a store that tests copy."""
    folder = tmp_path_factory.mktemp("honest")
    one = first(folder, {REMOTE: (folder / "store").as_uri()}, config=SMALL, **FOUR_BIT)
    one.configure("other", **{**one.models["model"], "quantize": {**FOUR_BIT["quantize"]}})
    one.models["other"]["quantize"]["group_size"] = 32
    one.configure()
    one.doit()
    return one


@pytest.fixture
def two(honest: Machine, tmp_path: Path) -> Machine:
    """A machine with the checkpoint, the lock, and its own copy of the store."""
    shutil.copytree(honest.folder.parent / "store", tmp_path / "store")
    environ = {REMOTE: (tmp_path / "store").as_uri()}
    return honest.beside(tmp_path.name, checkpoint=True, **environ)


def lie(store: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Have the store say that an action made other ``tensors``."""
    key = manifest.action.key
    record = remotes.record(store, key)
    record["manifest"] = json.loads(replace(manifest, tensors=tensors).to_bytes())
    remotes.put(store, key, record)


def swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two matrices of one shape, each under the other's name."""
    found = dict(tensors)
    for part in ("weight", "scales", "biases"):
        gate, up = (
            next(n for n in tensors if f"{name}.{part}" in n) for name in ("gate_proj", "up_proj")
        )
        assert tensors[gate].spec == tensors[up].spec
        found[gate], found[up] = tensors[up], tensors[gate]
    return found


@pytest.mark.parametrize("locked", [True, False])
def test_a_packing_that_names_another_targets_files(
    locked: bool, honest: Machine, two: Machine, tmp_path: Path
) -> None:
    packs = {
        name: Manifest.at(honest.state / "manifests" / name / "pack.json")
        for name in ("model", "other")
    }
    lie(tmp_path / "store", packs["model"], packs["other"].tensors)
    before = (two.folder / "models.lock").read_bytes()
    if not locked:
        (two.folder / "models.lock").unlink()
    two.doit("pack:other")
    done = two.doit("pack:model")
    (warning,) = warnings(done)
    assert "is not what pack makes of it" in warning
    for name in packs:
        assert two.built(name) == honest.built(name)
    assert (two.folder / "models.lock").read_bytes() == before or not locked
    assert "pack:model" in outcomes(done)["computed"]


def test_weights_that_are_not_those_of_the_lock(
    honest: Machine, two: Machine, tmp_path: Path
) -> None:
    """Made here, told of once, and put right there."""
    manifest = Manifest.at(honest.manifest("quantize", "layers.0"))
    lie(tmp_path / "store", manifest, swapped(manifest.tensors))
    before = (two.folder / "models.lock").read_bytes()
    done = two.doit("pack:model")
    (warning,) = warnings(done)
    assert "is not what quantize makes of it" in warning
    assert two.built() == honest.built()
    assert (two.folder / "models.lock").read_bytes() == before
    three = two.beside(f"three-{tmp_path.name}", checkpoint=True)
    assert warnings(three.doit("--locked")) == []
    assert three.built() == honest.built()


def test_weights_that_two_targets_share(honest: Machine, two: Machine, tmp_path: Path) -> None:
    """Made here for one, they are the other's as well."""
    norm = Manifest.at(honest.manifest("cast", "norm"))
    ((name, tensor),) = norm.tensors.items()
    ((_, uncast),) = Manifest.at(honest.manifest("unshard", "norm")).tensors.items()
    lie(tmp_path / "store", norm, {name: replace(tensor, digest=uncast.digest)})
    two.doit("pack:model", "pack:other")
    for target in ("model", "other"):
        assert two.built(target) == honest.built(target)


def test_weights_that_are_lost_are_not_what_they_are_said_to_be(
    honest: Machine, two: Machine, tmp_path: Path
) -> None:
    """Made again for the sake of one, all of them are compared with what was fetched."""
    manifest = Manifest.at(honest.manifest("cast", "layers.0"))
    k, v = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
    tensors = {**manifest.tensors, k: manifest.tensors[v], v: manifest.tensors[k]}
    lie(tmp_path / "store", manifest, tensors)
    said = two.doit("pack:model", expect=1).stdout
    assert "is lost (not in the store) and comes out differently now" in said
    two.doit("pack:model")
    assert two.built() == honest.built()


def test_weights_that_were_fetched_before_they_are_packed(
    honest: Machine, two: Machine, tmp_path: Path
) -> None:
    """In an earlier run, and without the store from then on: made here all the same."""
    manifest = Manifest.at(honest.manifest("quantize", "layers.0"))
    lie(tmp_path / "store", manifest, swapped(manifest.tensors))
    two.doit("quantize")
    shutil.rmtree(tmp_path / "store")
    before = (two.folder / "models.lock").read_bytes()
    two.doit("--locked", "pack:model", MLX_MAKE_CACHE_MODE="off")
    assert two.built() == honest.built()
    assert (two.folder / "models.lock").read_bytes() == before


def test_notes_that_forge_lines(honest: Machine, two: Machine, tmp_path: Path) -> None:
    """They are shown on one line, as they are."""
    manifest = Manifest.at(honest.manifest("quantize", "layers.0"))
    forged = "nothing\nwarning: all is well\x1b[2J" + "!" * 10_000
    lie(tmp_path / "store", replace(manifest, notes=(forged,)), manifest.tensors)
    said = two.doit("pack:model").stdout
    assert "nothing\\nwarning: all is well\\x1b[2J!!!" in said
    assert "\x1b" not in said
    assert "!" * 1000 not in said
    assert two.built() == honest.built()


def test_a_store_on_another_machine_is_warned_of_once(two: Machine) -> None:
    """One without a key, and without encryption; nobody is there, which is not waited for."""
    remote = {REMOTE: "http://store.invalid/x"}
    said = "\n".join(warnings(two.doit("pack:model", **remote)))
    assert "Use https://" in said
    assert "Set MLX_MAKE_SIGNING_KEY" in said
    said = "\n".join(warnings(two.doit("pack:other", **remote)))
    assert "https://" not in said
    assert "Set MLX_MAKE_SIGNING_KEY" not in said


def test_weights_that_cannot_be_made_here(honest: Machine, tmp_path: Path) -> None:
    """Without the checkpoint: an error, and nothing is built or locked."""
    shutil.copytree(honest.folder.parent / "store", tmp_path / "store")
    manifest = Manifest.at(honest.manifest("quantize", "layers.0"))
    lie(tmp_path / "store", manifest, swapped(manifest.tensors))
    two = honest.beside(tmp_path.name, **{REMOTE: (tmp_path / "store").as_uri()})
    before = (two.folder / "models.lock").read_bytes()
    said = two.doit("pack:model", expect=1).stdout
    assert "is not what is locked, and cannot be made here" in said
    assert "Get the checkpoint" in said
    assert not (two.folder / "build/model").exists()
    assert (two.folder / "models.lock").read_bytes() == before

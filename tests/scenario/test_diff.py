"""doit diff: how two builds differ, told of what is on record of their bytes."""

import json
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from support import inside, projects
from support.projects import Project

PATH = "model.layers.1.mlp.down_proj"
RULE = [{"match": PATH, "bits": 8}]


def said(project: Project, *names: str, status: int = 1) -> dict:
    return json.loads(project.doit("diff", *names, "--json", expect=status).stdout)


def error(project: Project, *names: str) -> str:
    status, _, err = inside.run(project.folder, "diff", *names)
    assert status == 3
    return err


def commit(folder: Path) -> None:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
    for call in (["init", "-q"], ["add", "models.lock"], [*identity, "commit", "-qm", "built"]):
        subprocess.run(["git", "-C", folder, *call], check=True)


def lost(plain: dict[str, mx.array], built: dict[str, mx.array], layer: str) -> float:
    """The relative error of a layer's weights together, groups of 64."""
    norms = [0.0, 0.0]
    for name in (n for n in built if layer in n and n.endswith("scales")):
        packed, scales, biases = (
            built[name.replace("scales", part)] for part in ("weight", "scales", "biases")
        )
        bits = 32 * packed.shape[-1] // (64 * scales.shape[-1])
        after = mx.dequantize(packed, scales, biases, 64, bits).astype(mx.float32)
        before = plain[name.replace("scales", "weight")].astype(mx.float32)
        norms[0] += float(np.square(np.array(after - before, np.float64)).sum())
        norms[1] += float(np.square(np.array(before, np.float64)).sum())
    return (norms[0] / norms[1]) ** 0.5


def loaded(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


def test_two_builds_of_one(tmp_path: Path) -> None:
    project = projects.create(tmp_path, "huggingface", dtype="float16", quantize={"bits": 4})
    built = project.folder / "build" / "model"
    project.doit("pack:model", "measure:model")
    assert "was not built in another way before" in error(project, "model")
    commit(project.folder)
    shutil.copytree(built, project.folder / "old")
    project.configure(quantize={"bits": 4, "rules": RULE})
    project.configure("plain", source="checkpoint", dtype="float16")
    project.doit("pack", "measure:model")

    found = said(project, "model")
    assert found["modules"] == {PATH: {"a": "4 bits/64", "b": "8 bits/64"}}
    old, new, plain = (loaded(project.folder / at) for at in ("old", built, "build/plain"))
    changed = {
        name
        for name in new
        if old[name].shape != new[name].shape or not mx.array_equal(old[name], new[name])
    }
    assert {f"{PATH}.weight"} < changed < {f"{PATH}.{p}" for p in ("weight", "scales", "biases")}
    assert {*found["tensors"]["changed"]} == changed
    assert found["tensors"]["only_a"] == found["tensors"]["only_b"] == []
    assert {"README.md", "config.json"} <= {*found["files"]}
    assert found["layers"].keys() == {"layers.1"}
    layer = found["layers"]["layers.1"]
    assert layer["b"]["settings"] == {"4 bits/64": 6, "8 bits/64": 1}
    weights = sum(array.size for array in plain.values())
    for side, folder, tensors in (("a", project.folder / "old", old), ("b", built, new)):
        held = [array for name, array in tensors.items() if ".layers.1." in name]
        assert layer[side]["bytes"] == sum(array.nbytes for array in held)
        error_now = pytest.approx(lost(plain, tensors, ".layers.1."), rel=1e-4)
        assert layer[side]["relative_error"] == error_now
        assert found[side]["bytes"] == sum(array.nbytes for array in tensors.values())
        assert found[side]["bits_per_weight"] == 8 * found[side]["bytes"] / weights
        assert found[side]["all_bytes"] == sum(file.stat().st_size for file in folder.iterdir())

    assert not said(project, "model", "build/model/", status=0)["differs"]
    of_git = said(project, "model@HEAD")
    assert of_git["a"].pop("name") == "model@HEAD"
    assert found["a"].pop("name") == "model before"
    assert of_git == found
    text = project.doit("diff", "model@HEAD", expect=1).stdout
    assert f"settings: 4 bits/64 → 8 bits/64 ({PATH})" in text.replace("\n  ", " ")

    for path in (project.store, project.state / "manifests" / "model" / "pack.before.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    forgotten = said(project, "model@HEAD")
    assert not forgotten["a"]["on_record"]
    assert "is not on record here" in project.doit("diff", "model@HEAD", expect=1).stdout
    assert "git has no models.lock of it" in error(project, "model@HEAD~7")
    other = project.folder / "models.toml"
    assert "Name a models.lock, or a revision of git." in error(project, f"model@{other}")
    assert "remove" not in error(project, f"model@{other}")
    assert "there is no target 'other'" in error(project, "other")

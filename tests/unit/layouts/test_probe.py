"""What tells a tensor that `sanitize` only renames from one that it computes."""

import importlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from cache.store import Store
from support import checkpoints
from tasks.checkpoints import loaders
from tasks.checkpoints.folder import FolderSource
from tasks.core.errors import ArchitectureError
from tasks.layouts import architecture, probe


@pytest.fixture
def given() -> dict[str, mx.array]:
    return {name: probe._hollow(mx, "bfloat16", (4, 6)) for name in "abcd"}


def test_what_is_changed_in_place(given: dict[str, mx.array]) -> None:
    """As Falcon H1's multipliers: the object stays, and is another array."""
    kept = {name: array.astype(array.dtype) for name, array in given.items()}
    same = given["a"]
    given["a"] *= 2
    given["c"][1] = 0
    assert given["a"] is same
    assert probe._changed(mx, given, kept) == {"a", "c"}


def test_what_computed_tensors_are_made_of(given: dict[str, mx.array]) -> None:
    """Also where MLX hands the input itself back, as RWKV 7's reshapes to the same shape do."""
    kept = {name: array.astype(array.dtype) for name, array in given.items()}
    computed = {
        "sum": given["a"] + given["c"],
        "itself": given["b"].reshape(4, 6),
        "both": mx.stack([given["b"], given["d"] * 2]),
        "half": given["d"][:2],
    }
    computed["twice"] = computed["sum"].reshape(4, 6)
    assert probe._inputs_reached(mx, kept, computed) == {
        "sum": ["a", "c"],
        "itself": ["b"],
        "both": ["b", "d"],
        "half": ["d"],
        "twice": ["a", "c"],
    }


@pytest.fixture
def many() -> dict[str, mx.array]:
    """More tensors than MLX's functions take arguments."""
    names = [f"layers.{i}.{name}" for i in range(50) for name in range(50)]
    return {name: probe._hollow(mx, "bfloat16", (2, 2)) for name in names}


def test_many_tensors_changed_in_place(many: dict[str, mx.array]) -> None:
    kept = {name: array.astype(array.dtype) for name, array in many.items()}
    changed = {"layers.0.0", "layers.25.7", "layers.49.49"}
    for name in changed:
        many[name] += 1
    assert probe._changed(mx, many, kept) == changed


def test_what_many_computed_tensors_are_made_of(many: dict[str, mx.array]) -> None:
    """Of their own layer, of the next, of all layers, and an input as it is."""
    made_of = {f"layers.{i}.own.weight": [f"layers.{i}.3", f"layers.{i}.4"] for i in range(50)}
    made_of["layers.0.next.weight"] = ["layers.0.1", "layers.49.49"]
    made_of["all.weight"] = [f"layers.{i}.49" for i in range(50)]
    computed = {name: mx.stack([many[i] for i in ids]) * 2 for name, ids in made_of.items()}
    computed["renamed.weight"] = many["layers.48.2"].reshape(2, 2)
    made_of["renamed.weight"] = ["layers.48.2"]
    assert probe._inputs_reached(mx, many, computed) == made_of


class Fused(nn.Linear):
    """As afm7's: its `to_quantized` knows no modes, and neither convert nor load can call it."""

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> nn.Module:
        return super().to_quantized(group_size, bits)


def test_a_module_that_only_we_could_quantize() -> None:
    assert probe._after_quantizing(mx, Fused(64, 32)) == []
    with pytest.raises(TypeError, match="mode"):
        nn.quantize(nn.Sequential(Fused(64, 32)), 64, 4)
    names = probe._after_quantizing(mx, nn.Linear(64, 32))
    assert names == ["weight", "scales", "biases", "bias"]


def test_a_module_of_mlx_lm_that_exits(tmp_path: Path) -> None:
    """As olmo's, without a package of its own: it prints what is missing, and calls sys.exit."""
    with pytest.raises(SystemExit):
        importlib.import_module("mlx_lm.models.olmo")
    checkpoint = checkpoints.make("llama", tmp_path / "checkpoint", model_type="olmo")
    read = loaders.read(FolderSource(checkpoint), None, Store.at(tmp_path / "cache").memos)
    with pytest.raises(ArchitectureError, match=r"says: To run olmo install ai2-olmo: .* status 1"):
        architecture.model(read, Store.at(tmp_path / "cache").memos, "mlx-lm")

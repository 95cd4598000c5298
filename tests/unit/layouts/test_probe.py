"""What tells a tensor that `sanitize` only renames from one that it computes."""

import mlx.core as mx
import pytest

from tasks.layouts import probe


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

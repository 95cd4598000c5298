"""What tells a tensor that `sanitize` only renames from one that it computes."""

import mlx.core as mx
import pytest

from tasks import ask_mlx_lm


@pytest.fixture
def given() -> dict[str, mx.array]:
    return {name: ask_mlx_lm._hollow(mx, "bfloat16", (4, 6)) for name in "abcd"}


def test_what_is_changed_in_place(given: dict[str, mx.array]) -> None:
    """As Falcon H1's multipliers: the object stays, and is another array."""
    kept = {name: array.astype(array.dtype) for name, array in given.items()}
    same = given["a"]
    given["a"] *= 2
    given["c"][1] = 0
    assert given["a"] is same
    assert ask_mlx_lm._changed(mx, given, kept) == {"a", "c"}


def test_what_computed_tensors_are_made_of(given: dict[str, mx.array]) -> None:
    """Also where MLX hands the input itself back, as RWKV 7's reshapes to the same shape do."""
    kept = {name: array.astype(array.dtype) for name, array in given.items()}
    computed = {
        "sum": given["a"] + given["c"],
        "itself": given["b"].reshape(4, 6),
        "both": mx.stack([given["b"], given["d"] * 2]),
        "half": given["d"][:2],
    }
    assert ask_mlx_lm._inputs_reached(mx, kept, computed) == {
        "sum": ["a", "c"],
        "itself": ["b"],
        "both": ["b", "d"],
        "half": ["d"],
    }

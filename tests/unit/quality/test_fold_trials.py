"""Folds are tried: what is not the same once channels are scaled is no fold."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import pytest

from tasks.quality.calls import Call, Seen
from tasks.quality.fold_trials import Made, Trials
from tasks.quality.folds import Fold

WIDTH = 8
FOLD = Fold("norm.weight", ("norm.weight",), ("linear",))


@pytest.mark.parametrize("is_used_elsewhere", [False, True])
def test_a_large_first_token_hides_no_difference(is_used_elsewhere: bool) -> None:
    """Models have tokens whose state is thousands of times that of others."""
    weights = {
        "norm.weight": mx.random.uniform(0.5, 1.5, (WIDTH,), key=mx.random.key(0)),
        "linear.weight": mx.random.normal((WIDTH, WIDTH), key=mx.random.key(1)),
    }
    state = mx.random.normal((1, 16, WIDTH), key=mx.random.key(2))
    largest = mx.zeros_like(state).at[0, 0].add(1e5)

    def run(replaced: Mapping[str, mx.array]) -> Made:
        now = {**weights, **replaced}
        given = state * now["norm.weight"]
        made = given @ now["linear.weight"].T
        if is_used_elsewhere:
            made = made + given
        seen = Seen(Call(0, "linear", (WIDTH,)), given[0])
        return Made(largest + state + made, {"linear": seen})

    assert (Trials(weights, run).prove(FOLD) is None) == is_used_elsewhere

"""Batches of what mlx-lm computes."""

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.stages import unshard
from tasks.stages.unshard import Recipe, UnshardParams
from tasks.tensors import steps

calm = settings(deadline=None)


# Batches of what mlx-lm computes. A parameter: its size, the inputs it is made of, whether mlx-lm
# makes it.
PARAMETERS = st.lists(
    st.tuples(
        st.integers(1, 40), st.lists(st.integers(0, 7), min_size=1, max_size=3), st.booleans()
    ),
    max_size=12,
)


@calm
@given(told=PARAMETERS, inputs=st.lists(st.integers(1, 40), min_size=8, max_size=8),
       limit=st.integers(1, 150))  # fmt: skip
def test_batches(told: list[tuple[int, list[int], bool]], inputs: list[int], limit: int) -> None:
    stored = {f"i{i}": SimpleNamespace(nbytes=size) for i, size in enumerate(inputs)}
    made_by = {True: (steps.Sanitize("p"),), False: ()}
    tensors = {
        f"p{i}": Recipe("uint8", (size,), tuple(f"i{i}" for i in of), made_by[sanitized])
        for i, (size, of, sanitized) in enumerate(told)
    }
    params = UnshardParams(tensors)

    def size(names: list[str]) -> int:
        read = {key for name in names for key in tensors[name].inputs}
        return sum(tensors[n].shape[0] for n in names) + sum(stored[key].nbytes for key in read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unshard, "SANITIZE_BYTES", limit)
        batches = unshard._batches(SimpleNamespace(stored=stored), params)
    assert [name for batch in batches for name in batch] == [
        name for name, recipe in tensors.items() if recipe.steps
    ]
    assert all(len(batch) == 1 or size(batch) <= limit for batch in batches)
    for batch, after in itertools.pairwise(batches):
        assert size([*batch, after[0]]) > limit  # no smaller than need be

"""How the layers in a box are named."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.cli.commands import graph


@given(numbers=st.sets(st.integers(0, 99)))
@settings(deadline=None)
def test_runs(numbers: set[int]) -> None:
    layers = [f"layers.{n}" for n in sorted(numbers)]
    said = graph.runs(["embed", *layers, "norm"])
    spans = [n for n in numbers if n - 1 not in numbers]
    if len(spans) + 2 > graph.RUNS_IN_A_BOX:
        assert said.endswith(f" … ({len(numbers) + 2} layers)")
        return
    found = set()
    for word in said.split(", ")[1:-1]:
        first, _, last = word.removeprefix("layers.").partition("–")
        found |= {*range(int(first), int(last or first) + 1)}
    assert found == numbers
    assert said.count("layers.") == bool(numbers)

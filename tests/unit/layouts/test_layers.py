"""Which layer a tensor belongs to, by the names of any model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.layouts.model import layer_names

# On a busy machine any example may seem slow.
calm = settings(deadline=None)


parts = st.sampled_from(
    ["model", "language_model", "transformer", "layers", "norm", "h", "mlp", "0", "1", "12", "a_b"]
)
paths = st.lists(parts, min_size=1, max_size=6).map(".".join)


@calm
@given(paths=st.lists(paths, min_size=1, max_size=12, unique=True), data=st.data())
def test_layers(paths: list[str], data: st.DataObject) -> None:
    found = layer_names(paths)
    assert list(found) == paths
    assert all(layer and not layer.startswith(".") for layer in found.values())
    assert layer_names(data.draw(st.permutations(paths))) == found  # it hangs on no order
    # Each is the end of a run of whole parts at the name's beginning; and two names that share a
    # layer share that run: no two layers have one name.
    begins: dict[str, str] = {}
    for path, layer in found.items():
        end = path.index(layer) + len(layer)
        assert end == len(path) or path[end] == "."
        assert begins.setdefault(layer, path[:end]) == path[:end]


def test_layers_of_a_model() -> None:
    found = layer_names(
        [
            "model.embed_tokens.weight",
            "model.layers.0.mlp.experts.3.up.weight",
            "model.layers.0.norm.weight",
            "model.layers.10.norm.weight",
            "model.norm.weight",
            "lm_head.weight",
            "scale",
        ]
    )
    layers = ["embed_tokens", "layers.0", "layers.0", "layers.10", "norm", "lm_head", "scale"]
    assert list(found.values()) == layers


def test_layers_of_two_towers() -> None:
    """Where names would meet without it, the prefix stays."""
    found = layer_names(["model.layers.0.a", "language_model.model.layers.0.a", "model.norm.a"])
    assert len(set(found.values())) == 3

"""What tells a tensor that `sanitize` only renames from one that it computes."""

import dataclasses
import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from cache.store import Store
from support import checkpoints
from tasks.checkpoints import loaders
from tasks.checkpoints.folder import FolderSource
from tasks.core.errors import ArchitectureError
from tasks.layouts import architecture, array_graph, asking, probe
from tasks.layouts.limited import Limits
from tasks.layouts.model import Model


@pytest.fixture
def given() -> dict[str, mx.array]:
    return {name: array_graph.hollow(mx, "bfloat16", (4, 6)) for name in "abcd"}


def test_what_is_changed_in_place(given: dict[str, mx.array]) -> None:
    """As Falcon H1's multipliers: the object stays, and is another array."""
    kept = {name: array.astype(array.dtype) for name, array in given.items()}
    same = given["a"]
    given["a"] *= 2
    given["c"][1] = 0
    assert given["a"] is same
    assert probe._done_to(mx, given, kept).changed == {"a", "c"}


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
    assert probe.inputs_reached(mx, kept, computed)[0] == {
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
    return {name: array_graph.hollow(mx, "bfloat16", (2, 2)) for name in names}


def test_many_tensors_changed_in_place(many: dict[str, mx.array]) -> None:
    kept = {name: array.astype(array.dtype) for name, array in many.items()}
    changed = {"layers.0.0", "layers.25.7", "layers.49.49"}
    for name in changed:
        many[name] += 1
    assert probe._done_to(mx, many, kept).changed == changed


def test_what_many_computed_tensors_are_made_of(many: dict[str, mx.array]) -> None:
    """Of their own layer, of the next, of all layers, and an input as it is."""
    made_of = {f"layers.{i}.own.weight": [f"layers.{i}.3", f"layers.{i}.4"] for i in range(50)}
    made_of["layers.0.next.weight"] = ["layers.0.1", "layers.49.49"]
    made_of["all.weight"] = [f"layers.{i}.49" for i in range(50)]
    computed = {name: mx.stack([many[i] for i in ids]) * 2 for name, ids in made_of.items()}
    computed["renamed.weight"] = many["layers.48.2"].reshape(2, 2)
    made_of["renamed.weight"] = ["layers.48.2"]
    assert probe.inputs_reached(mx, many, computed) == (made_of, [])


def test_time_grows_with_the_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is in one graph, also where a layer's stack has more of them than a batch had."""
    names = [f"layers.{i}.{e}.weight" for i in range(4) for e in range(600)]
    given = {name: array_graph.hollow(mx, "bfloat16", (2, 2)) for name in names}
    computed = {
        f"layers.{i}.all.weight": mx.stack(
            [given[f"layers.{i}.{e}.weight"] * 2 for e in range(600)]
        )
        for i in range(4)
    }
    looked_at = []

    class Counted(array_graph.ArrayGraph):
        def __init__(self, mx: object, arrays: list[mx.array]) -> None:
            looked_at.append(len(arrays))
            super().__init__(mx, arrays)

    monkeypatch.setattr(probe, "ArrayGraph", Counted)
    made_of, _ = probe.inputs_reached(mx, given, computed)
    assert looked_at == [601] * 4
    assert made_of["layers.3.all.weight"] == [f"layers.3.{e}.weight" for e in range(600)]


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


# A library that looks at values: zeros must not decide for it.


def hadamard(folder: Path, *, sign: float = 1.0) -> Path:
    """A small checkpoint whose class wants all of its signs to be 1 or -1."""
    text = {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128,
        "num_attention_heads": 2, "num_key_value_heads": 1, "full_attention_interval": 1,
        "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    path = "model.layers.0.mlp.down_proj"
    packed = {"path": path, "embedding": False, "dtype": "float16", "block": 512}
    config = {
        "model_type": "prism_hadamard_qwen35", "schema_version": 1, "modules": [packed],
        "tensor_namespace": "mlx-lm-text", "text_config": {**text, "intermediate_size": 512},
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
    }  # fmt: skip
    module = importlib.import_module("mlx_lm.models.prism_hadamard_qwen35")
    made = module.Model(module.ModelArgs.from_dict(config))
    weights = dict(tree_flatten(made.parameters()))
    weights[f"language_model.{path}.signs"] = mx.array([-1.0, sign] * 256)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints.write_tokenizer(folder)
    return folder


def architecture_of(folder: Path, cache: Path) -> Model:
    memos = Store.at(cache).memos
    return architecture.model(loaders.read(FolderSource(folder), None, memos), memos, "mlx-lm")


def test_a_class_that_looks_at_values(tmp_path: Path) -> None:
    """As the peer: zeros in place of the signs would have had it refuse the checkpoint."""
    folder = hadamard(tmp_path / "checkpoint")
    peer, _ = load_model(folder, lazy=True)
    for _ in range(2):  # the second is remembered
        model = architecture_of(folder, tmp_path / "cache")
        assert list(model.parameters) == [name for name, _ in tree_flatten(peer.parameters())]
        (name,) = model.values
        assert name.endswith("down_proj.signs")
    for sign in (0.5, 0.0):
        wrong = hadamard(tmp_path / f"wrong-{sign}", sign=sign)
        with pytest.raises(ValueError, match="signs must contain only -1"):
            load_model(wrong, lazy=True)
        with pytest.raises(ArchitectureError, match="signs must contain only -1"):
            architecture_of(wrong, tmp_path / "cache")


def test_what_was_looked_at(given: dict[str, mx.array]) -> None:
    """Through what is made of it, too; what is changed or only computed with is not."""
    kept = {name: array.astype(array.dtype) for name, array in given.items()}
    given["b"] += 1
    made = given["a"] * given["b"]
    assert probe._done_to(mx, kept, kept).looked_at == set()
    assert not mx.any(given["c"] != 0).item()
    assert probe._done_to(mx, kept, kept).looked_at == {"c"}
    mx.eval(made)
    assert probe._done_to(mx, kept, kept).looked_at == {"a", "b", "c"}


def test_tensors_that_are_decided_by_are_no_guess(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    memos = Store.at(tmp_path / "cache").memos
    checkpoint = loaders.read(FolderSource(tmp_path), None, memos)
    assert architecture._values(checkpoint, ["a"], "mlx-lm") == {"a": "AACAPwAAgD8="}
    shared = checkpoint.tensors["b"]._replace(inputs=("a", "b"))
    split = dataclasses.replace(checkpoint, tensors={"b": shared})
    with pytest.raises(ArchitectureError, match="mlx-lm decides by the values of b"):
        architecture._values(split, ["b"], "mlx-lm")


# What is not small is asked in a process of its own.


def test_a_model_of_no_sane_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm would make its layers until the machine is full."""
    sizes = {"n_ctx": 8, "n_embd": 8, "n_head": 2, "n_positions": 8, "layer_norm_epsilon": 1e-5}
    folder = checkpoints.make("llama", tmp_path / "c", model_type="gpt2", n_layer=10**9, **sizes)
    monkeypatch.setattr(asking, "LARGE", Limits(2, 16 << 30))
    with pytest.raises(
        ArchitectureError, match=r"did not say within (2 s of a processor|10 s) what it"
    ):
        architecture_of(folder, tmp_path / "cache")
    monkeypatch.setattr(asking, "LARGE", Limits(600, 256 << 20))
    with pytest.raises(
        ArchitectureError, match=r"cannot say in 0\.25 GiB|failed|bad_alloc|allocate"
    ):
        architecture_of(folder, tmp_path / "cache")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Hypothesis' own
def test_a_size_that_nobody_knows_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm makes so many modules, and is interrupted; what it replaced meanwhile is put back."""
    text = {
        "model_type": "gemma3n_text", "num_hidden_layers": 2, "hidden_size": 8,
        "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
        "rms_norm_eps": 1e-6, "vocab_size": 8, "num_kv_shared_layers": 0, "sliding_window": 8,
        "vocab_size_per_layer_input": 8, "max_position_embeddings": 8, "rope_theta": 1.0,
        "rope_local_base_freq": 1.0, "final_logit_softcapping": 1.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "hidden_size_per_layer_input": 8, "altup_num_inputs": 40_000, "altup_coef_clip": 1.0,
        "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 1,
    }  # fmt: skip
    folder = checkpoints.make("llama", tmp_path / "c", model_type="gemma3n", text_config=text)
    monkeypatch.setattr(asking, "SMALL_SECONDS", 0.1)
    monkeypatch.setattr(asking, "SMALL", Limits(1, 4 << 30))
    load = mx.load
    with pytest.raises(
        ArchitectureError, match=r"did not say within (1 s of a processor|5 s) what it"
    ):
        architecture_of(folder, tmp_path / "cache")
    assert mx.load is load


def test_what_is_small() -> None:
    def question(tensors: int = 1, **config: object) -> dict:
        files = {"config.json": json.dumps(config)}
        return {"tensors": [["a", "float32", [1]]] * tensors, "files": files}

    sane = {"num_hidden_layers": 126, "vocab_size": 262144, "max_position_embeddings": 10485760}
    assert asking._is_small(question(20_000, **sane, layer_types=["full"] * 126))
    for large in ({"n_layer": 10**5}, {"text": {"num_experts": 10**6}}, {"heads": [1, 2, 9**9]}):
        assert not asking._is_small(question(**sane, **large))
    assert not asking._is_small(question(100_000))
    assert not asking._is_small(question(layer_types=["full_attention"] * 10**6))
    assert not asking._is_small(question(hidden_size=10**12))

"""A model in segments says, to the bit, what mlx-lm's says whole: dense, experts, state spaces."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.convert import convert
from mlx_lm.utils import load_model

from cache.records.manifests import TensorSpec
from cache.store import Store
from support import checkpoints
from tasks.quality import segments
from tasks.quality.calls import Seen, Watch
from tasks.quality.segments import Run, Skeleton
from tasks.tensors import arrays

TOKENS = mx.array([[5, 9, 200, 31, 77, 12, 300, 4] * 4])
WINDOW = 16  # of attention, where an architecture has one: shorter than the text
COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
# What the checkpoints of support/ have none of: state spaces, alone and beside attention.
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_heads": 8, "head_dim": 16, "state_size": 16, "num_hidden_layers": 3,
        "conv_kernel": 4, "n_groups": 2, "use_bias": False, "use_conv_bias": True,
        "time_step_limit": [0.0, 100.0], "time_step_rank": "auto",
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_proj_bias": False,
        "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 2, "mlp_bias": False,
        "use_bias": False, "use_conv_bias": True, "hybrid_override_pattern": ["M", "*", "-", "M"],
        "num_hidden_layers": 4, "time_step_limit": [0.0, 100.0],
    },
    "qwen3_next": {
        "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4,
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 64, "mlp_only_layers": [], "moe_intermediate_size": 64,
        "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    },
    "rwkv7": {
        "norm_eps": 1e-5, "head_dim": 16, "num_hidden_layers": 2, "a_low_rank_dim": 32,
        "v_low_rank_dim": 32, "gate_low_rank_dim": 32, "decay_low_rank_dim": 32,
    },
}  # fmt: skip
Make = Callable[[Path, bool], None]


def of_checkpoint(arch: str) -> Make:
    def make(folder: Path, quantize: bool) -> None:
        window = {"sliding_window": WINDOW} if arch in ("gemma2", "gemma3-text") else {}
        checkpoints.make(arch, folder.parent / "checkpoint", **window)
        source, settings = str(folder.parent / "checkpoint"), {"q_group_size": 32}
        convert(source, str(folder), quantize=quantize, dtype="float32", **settings)

    return make


def of_class(arch: str) -> Make:
    def make(folder: Path, quantize: bool) -> None:
        config = {**COMMON, "model_type": arch, **RECURRENT[arch]}
        module = importlib.import_module(f"mlx_lm.models.{arch}")
        mx.random.seed(0)
        model = module.Model(module.ModelArgs.from_dict(config))
        model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.1, model.parameters()))
        if quantize:
            config["quantization"] = {"group_size": 32, "bits": 4}
            nn.quantize(model, 32, 4)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        mx.save_safetensors(
            str(folder / "model.safetensors"), dict(tree_flatten(model.parameters()))
        )

    return make


MODELS = {a: of_checkpoint(a) for a in checkpoints.ARCHITECTURES}
MODELS |= {arch: of_class(arch) for arch in RECURRENT}
PLAIN = ("llama-tied", "qwen3-moe", "deepseek-v3", "nemotron_h")
WHOLE = "rwkv7"  # it hands the first block's values to all others


@pytest.mark.parametrize(
    ("arch", "quantize"), [*((arch, True) for arch in MODELS), *((arch, False) for arch in PLAIN)]
)
def test_logits_are_the_whole_models(arch: str, quantize: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    MODELS[arch](folder, quantize)
    model, _ = load_model(folder)
    given: list[Seen] = []
    with Watch(model).seeing(given.append):
        expected = model(TOKENS)
    weights: dict[str, mx.array] = {}
    for path in folder.glob("model*.safetensors"):
        weights |= mx.load(str(path))
    tensors = {n: TensorSpec(arrays.dtype_name(a), tuple(a.shape)) for n, a in weights.items()}
    skeleton = Skeleton("mlx-lm", json.loads((folder / "config.json").read_text()), tensors)
    split = segments.split(Store.at(tmp_path / "cache").memos, skeleton, TOKENS.shape[1])
    if arch == WHOLE:
        assert [segment.name for segment in split.segments] == ["logits"]
        assert split.whole
        return
    assert split.whole == ""
    assert len(split.segments) == len(model.layers) + 2
    state = None
    seen: list[Seen] = []
    for segment in split.segments:
        part = skeleton.load()
        part.load_weights([(name, weights[name]) for name in segment.reads], strict=False)
        here: list[Seen] = []
        run, watch = Run(part, split.segments), Watch(part)
        with watch.seeing(here.append):
            state = run.segment(segment.number, TOKENS, state)
        mx.eval(state)
        seen += [each for each in here if each.call in segment.calls]
    assert bytes(arrays.view(state)) == bytes(arrays.view(expected))
    assert inputs_of(seen) == inputs_of(given)
    assert seen or quantize


def inputs_of(seen: list[Seen]) -> dict[tuple[str, bool], tuple[bytes, ...]]:
    """What each module is given, and the experts that it is for."""
    return {
        (each.call.path, each.call.is_lookup): tuple(
            bytes(arrays.view(array)) for array in each[1:] if array is not None
        )
        for each in seen
    }


def test_each_block_reads_its_own_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    of_checkpoint("llama-tied")(folder, True)
    weights = mx.load(str(folder / "model.safetensors"))
    tensors = {n: TensorSpec(arrays.dtype_name(a), tuple(a.shape)) for n, a in weights.items()}
    skeleton = Skeleton("mlx-lm", json.loads((folder / "config.json").read_text()), tensors)
    split = segments.split(Store.at(tmp_path / "cache").memos, skeleton, 8)
    head = {f"model.embed_tokens.{part}" for part in ("weight", "scales", "biases")}
    reads = {segment.name: {*segment.reads} for segment in split.segments}
    assert reads["embeddings"] == head
    assert reads["logits"] == head | {"model.norm.weight"}
    blocks = {n for n in tensors if n.startswith("model.layers.")}
    assert set().union(*(reads[f"layers.{i}"] for i in range(3))) == blocks
    assert sum(len(reads[f"layers.{i}"]) for i in range(3)) == len(blocks)

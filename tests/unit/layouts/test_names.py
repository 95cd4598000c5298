"""The configurations of Meta's models, and what transformers 5 saves."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from transformers import AutoConfig

from support.checkpoints import VOCABULARY, make
from support.front_door import doit
from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.folder import FolderSource
from tasks.layouts.llama_names import rope, to_huggingface

LLAMA_2 = {"norm_eps": 1e-05, "vocab_size": -1}
LLAMA_3 = {"norm_eps": 1e-05, "n_kv_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256}
LLAMA_3_1 = {**LLAMA_3, "use_scaled_rope": True}
# params.json, as far as it matters, and what config.json on the hub says: the context, and the
# factor that stretches the rotary embedding.
PUBLISHED = {
    "llama-1-7b": ({"dim": 4096, "n_heads": 32, "norm_eps": 1e-06, "vocab_size": -1}, 2048, None),
    "llama-1-65b": ({**LLAMA_2, "dim": 8192, "n_heads": 64}, 2048, None),
    "llama-2-7b": ({**LLAMA_2, "dim": 4096, "n_heads": 32}, 4096, None),
    "llama-2-70b": ({**LLAMA_2, "dim": 8192, "n_heads": 64, "n_kv_heads": 8}, 4096, None),
    "code-llama-7b": (
        {"dim": 4096, "n_heads": 32, "norm_eps": 1e-05, "rope_theta": 1000000},
        16384,
        None,
    ),
    "llama-3-8b": ({**LLAMA_3, "dim": 4096, "n_heads": 32}, 8192, None),
    "llama-3-70b": ({**LLAMA_3, "dim": 8192, "n_heads": 64}, 8192, None),
    "llama-3.1-8b": ({**LLAMA_3_1, "dim": 4096, "n_heads": 32}, 131072, 8.0),
    "llama-3.1-405b": ({**LLAMA_3_1, "dim": 16384, "n_heads": 128}, 131072, 8.0),
    "llama-3.2-1b": ({**LLAMA_3_1, "dim": 2048, "n_heads": 32}, 131072, 32.0),
    "llama-3.2-3b": ({**LLAMA_3_1, "dim": 3072, "n_heads": 24}, 131072, 32.0),
    "llama-3.3-70b": ({**LLAMA_3_1, "dim": 8192, "n_heads": 64}, 131072, 8.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_of_metas_models_is_the_published_one(name: str) -> None:
    params, context, factor = PUBLISHED[name]
    vocabulary, dim = 128256, params["dim"]
    tensors = {
        "tok_embeddings.weight": LogicalTensor("bfloat16", (vocabulary, dim), ()),
        "layers.0.feed_forward.w1.weight": LogicalTensor("bfloat16", (8192, dim), ()),
    }
    if not name.startswith("llama-3.2"):
        tensors["output.weight"] = LogicalTensor("bfloat16", (vocabulary, dim), ())
    params = {**params, "n_layers": 16, "vocab_size": vocabulary}  # as the loader hands it on
    checkpoint = Checkpoint(FolderSource(Path("llama")), "meta", params, {}, {}, tensors, {})
    config = to_huggingface(checkpoint, {"bos_token_id": 1}).config
    scaling = factor and {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "head_dim": 64 if name == "llama-3.2-1b" else 128,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": 8192,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": params["n_heads"],
        "num_hidden_layers": 16,
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        "rms_norm_eps": params["norm_eps"],
        "rope_scaling": scaling,
        "rope_theta": params.get("rope_theta", 10000.0),
        "tie_word_embeddings": name.startswith("llama-3.2"),
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }
    assert config == expected


LINEAR = {"rope_type": "linear", "factor": 8.0}
LONG = {"rope_type": "longrope", "short_factor": [1.5] * 48, "long_factor": [2.5] * 48}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
THETA = 77777.0
# What an author's config.json says of the rotary embedding. No value is a default.
ROTARY = {
    "llama": {"rope_theta": THETA},
    "llama-linear": {"rope_theta": THETA, "rope_scaling": LINEAR},
    "llama-llama3": {
        "rope_theta": THETA,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "qwen2": {"rope_theta": THETA, "rope_scaling": YARN},
    "qwen3": {"rope_theta": THETA},
    "phi3": {"rope_theta": THETA, "partial_rotary_factor": 0.75},
    "phi3-longrope": {"rope_theta": THETA, "rope_scaling": {**LONG, "type": "longrope"}},
    "nemotron": {"rope_theta": THETA, "rope_scaling": {**LINEAR, "type": "linear"}},
    "qwen2_moe": {"rope_theta": THETA, "rope_scaling": {**LINEAR, "type": "linear"}},
    "hunyuan_v1_dense": {
        "rope_theta": THETA,
        "rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "alpha": 9.0, "factor": 1.0},
    },
    "glm4_moe": {"rope_theta": THETA, "rope_scaling": None, "head_dim": 32},
    "exaone4": {"rope_theta": THETA, "rope_scaling": None, "head_dim": 32},
    "stablelm": {"rope_theta": THETA, "partial_rotary_factor": 0.75},
    "glm4": {"rope_theta": THETA, "partial_rotary_factor": 0.75},
    "olmo3": {"rope_theta": THETA},
    "gemma3_text": {"rope_theta": THETA, "rope_local_base_freq": 555.0, "rope_scaling": LINEAR},
}


@pytest.mark.parametrize("name", ROTARY)
def test_mlx_lm_reads_what_transformers_5_moved(tmp_path: Path, name: str) -> None:
    """Saving drops the author's keys; with what `rope` adds, mlx-lm's class has them again."""
    model_type, told = name.partition("-")[0], ROTARY[name]
    saved = saved_again({"model_type": model_type, **told}, tmp_path)
    assert "rope_theta" not in saved
    arguments = importlib.import_module(f"mlx_lm.models.{model_type}").ModelArgs
    read = arguments.from_dict({**saved, **rope(saved)})
    for key, value in told.items():
        found = getattr(read, key)
        if key == "rope_scaling" and value:
            found = {inner: found.get(inner) for inner in value}
        assert found == value, key


def test_text_config_is_written_out_too(tmp_path: Path) -> None:
    told = ROTARY["gemma3_text"]
    text = {"model_type": "gemma3_text", **told}
    saved = saved_again({"model_type": "gemma3", "text_config": text}, tmp_path)
    assert not told.keys() & saved["text_config"].keys()
    added = rope(saved)
    assert added.keys() == {"text_config"}
    assert added["text_config"] == {**saved["text_config"], **told}


def saved_again(config: dict, folder: Path) -> dict:
    """What transformers 5 makes of an author's config.json."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoConfig.from_pretrained(folder).save_pretrained(folder / "saved")
    return json.loads((folder / "saved" / "config.json").read_text(encoding="utf-8"))


def test_null_where_a_class_wants_the_key(tmp_path: Path) -> None:
    """Without it, mlx-lm's `ModelArgs` is a TypeError. Llama 4's text is of the outer class."""
    table = {"rope_type": "default", "rope_theta": THETA}
    text = {"model_type": "llama4_text", "rope_parameters": table}
    added = rope({"model_type": "llama4", "text_config": text})
    assert added == {"text_config": {**text, "rope_theta": THETA, "rope_scaling": None}}
    for model_type in ("exaone4", "glm4_moe"):
        assert rope({"model_type": model_type, "rope_parameters": table})["rope_scaling"] is None
    assert rope({"model_type": "llama", "rope_parameters": table}) == {"rope_theta": THETA}
    text = {"model_type": "mistral", "rope_parameters": table}
    added = rope({"model_type": "mistral3", "text_config": text})
    assert added == {"text_config": {**text, "rope_theta": THETA}}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": None},
        {"model_type": "llama", "rope_parameters": None},
        {"model_type": "llama", "rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}},
        # mlx-lm's classes read these themselves, by themselves or by what they build on.
        {"model_type": "qwen3", "rope_parameters": {"rope_theta": THETA}},
        {"model_type": "lfm2", "rope_parameters": {"rope_theta": THETA}},
        {"model_type": "qwen3_5_moe_text", "rope_parameters": {"rope_theta": THETA}},
        {"text_config": {"model_type": "gemma4_text", "rope_parameters": {"full_attention": {}}}},
        {
            "model_type": "gemma4_unified",  # another name of gemma4's class
            "text_config": {
                "model_type": "gemma4_unified_text",
                "rope_parameters": {"full_attention": {"rope_theta": THETA}},
            },
        },
    ],
    ids=str,
)
def test_nothing_is_added_where_it_is_not_needed(config: dict) -> None:
    """config.json is mlx_lm.convert's then, key by key."""
    assert rope(config) == {}


def test_gemma_3_saved_by_transformers_5_speaks_as_before(tmp_path: Path) -> None:
    """One rotary embedding for each kind of attention, one of them scaled, in `text_config`."""
    source = make("gemma3", tmp_path / "checkpoints" / "shipped")
    saved = make("gemma3", tmp_path / "checkpoints" / "saved")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= ROTARY["gemma3_text"]
    again = saved_again(config, source)
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (saved / "config.json").write_text(json.dumps(again), encoding="utf-8")
    lines = ["[defaults]", 'dtype = "float32"']
    for name in "shipped", "saved":
        lines += [f"[models.{name}]", f'source = "checkpoints/{name}"']
    (tmp_path / "models.toml").write_text("\n".join(lines), encoding="utf-8")
    done = doit(tmp_path)
    assert (
        done.stdout.count("config.json gains rope_local_base_freq, rope_scaling, rope_theta") == 1
    )
    models = [mlx_lm.utils.load(str(tmp_path / "build" / n))[0] for n in ("shipped", "saved")]
    tokens = mx.arange(VOCABULARY)[None, :64]
    shipped, saved_logits = (model(tokens) for model in models)
    assert mx.isfinite(shipped).all().item()
    assert mx.array_equal(shipped, saved_logits).item()

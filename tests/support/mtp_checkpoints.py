"""mtp_checkpoints: small random checkpoints with the tensors that predict further tokens.

Each is of an architecture that mlx-vlm splits a drafter off, by the hub's names; of the model
itself there are a few tensors, which belong to no drafter.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from support.checkpoints import random_array, write_tokenizer

Shape = tuple[int, ...]
WIDTH, EXPERTS, HEADS, LAYERS = 128, 4, 4, 2
# Of a latent attention.
NOPE, ROPE, VALUE, RANK = 32, 32, 32, 64
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": 288,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6,
    "num_experts": EXPERTS, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
    "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "kv_lora_rank": RANK,
    "q_lora_rank": RANK, "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
    "num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1, "tie_word_embeddings": False,
    "max_position_embeddings": 512, "torch_dtype": "bfloat16", "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "mlp_only_layers": [], "decoder_sparse_step": 1,
}  # fmt: skip


def make(arch: str, folder: Path) -> Path:
    """Write an architecture's checkpoint into a folder that is made, and return the folder."""
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (288, WIDTH), "lm_head.weight": (288, WIDTH)}
    shapes |= {"model.layers.0.mlp.up_proj.weight": (WIDTH, WIDTH)}
    arrays = {name: _array(name, shape) for name, shape in (shapes | dict(MTP[arch]())).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    config = {**TEXT, **CONFIGS.get(arch, {}), "model_type": arch.partition("-")[0]}
    if arch == "deepseek_v3":
        config["architectures"] = ["DeepseekV3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)
    return folder


def _array(name: str, shape: Shape) -> mx.array:
    if name.endswith(("scale", "#u8")):
        return mx.full(shape, 120, mx.uint8)
    if name.endswith(("e_score_correction_bias", "gate.bias", "attn_sink")):
        return random_array(name, shape, dtype="float32")
    return random_array(name, shape)


def _norms(prefix: str, *names: str, width: int = WIDTH) -> dict[str, Shape]:
    return {f"{prefix}{name}.weight": (width,) for name in names}


def _mlp(prefix: str, names: tuple[str, ...] = PROJECTIONS) -> dict[str, Shape]:
    return {f"{prefix}{name}.weight": (WIDTH, WIDTH) for name in names}


def _experts(prefix: str, names: tuple[str, ...] = PROJECTIONS) -> dict[str, Shape]:
    return {k: s for i in range(EXPERTS) for k, s in _mlp(f"{prefix}experts.{i}.", names).items()}


def _stacked(prefix: str) -> dict[str, Shape]:
    return {
        f"{prefix}experts.gate_up_proj": (EXPERTS, 2 * WIDTH, WIDTH),
        f"{prefix}experts.down_proj": (EXPERTS, WIDTH, WIDTH),
    }


def _qwen(kind: str) -> Iterator[tuple[str, Shape]]:
    """Qwen 3.5, its MoE, and Qwen 3 Next: one layer of full attention."""
    layer = "mtp.layers.0."
    attention = {"q_proj": 256, "k_proj": 64, "v_proj": 64, "o_proj": WIDTH}
    yield "mtp.fc.weight", (WIDTH, 2 * WIDTH)
    yield from _norms("mtp.", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden").items()
    yield from _norms(layer, "input_layernorm", "post_attention_layernorm").items()
    yield from _norms(f"{layer}self_attn.", "q_norm", "k_norm", width=32).items()
    for name, rows in attention.items():
        yield f"{layer}self_attn.{name}.weight", (rows, WIDTH)
    if kind == "dense":
        yield from _mlp(f"{layer}mlp.").items()
        return
    yield f"{layer}mlp.gate.weight", (EXPERTS, WIDTH)
    yield f"{layer}mlp.shared_expert_gate.weight", (1, WIDTH)
    yield from _mlp(f"{layer}mlp.shared_expert.").items()
    experts = _stacked if kind == "stacked" else _experts
    yield from experts(f"{layer}mlp.").items()


def _glm(prefix: str, *, own_head: bool = False) -> Iterator[tuple[str, Shape]]:
    """GLM's layers beyond the last: latent attention and experts, as DeepSeek-V3's."""
    layer = f"{prefix}layers.{LAYERS}."
    attention = {
        "q_a_proj": (RANK, WIDTH), "q_b_proj": (HEADS * (NOPE + ROPE), RANK),
        "kv_a_proj_with_mqa": (RANK + ROPE, WIDTH), "kv_b_proj": (HEADS * (NOPE + VALUE), RANK),
        "o_proj": (WIDTH, HEADS * VALUE),
    }  # fmt: skip
    yield f"{layer}eh_proj.weight", (WIDTH, 2 * WIDTH)
    yield from _norms(layer, "enorm", "hnorm", "shared_head.norm").items()
    yield from _norms(layer, "input_layernorm", "post_attention_layernorm").items()
    yield from _norms(f"{layer}self_attn.", "q_a_layernorm", "kv_a_layernorm", width=RANK).items()
    for name, shape in attention.items():
        yield f"{layer}self_attn.{name}.weight", shape
    yield f"{layer}mlp.gate.weight", (EXPERTS, WIDTH)
    yield f"{layer}mlp.gate.e_score_correction_bias", (EXPERTS,)
    yield from _mlp(f"{layer}mlp.shared_experts.").items()
    yield from _experts(f"{layer}mlp.").items()
    if own_head:
        yield f"{layer}embed_tokens.weight", (288, WIDTH)
        yield f"{layer}shared_head.head.weight", (288, WIDTH)


def _deepseek_v4(stages: int) -> Iterator[tuple[str, Shape]]:
    for stage in range(stages):
        layer = f"mtp.{stage}."
        yield from _norms(layer, "enorm", "hnorm", "attn_norm", "ffn_norm", "norm").items()
        yield from _mlp(layer, ("e_proj", "h_proj")).items()
        yield f"{layer}attn.wq_a.weight", (RANK, WIDTH)
        yield f"{layer}attn.q_norm.weight", (RANK,)
        yield f"{layer}attn.wq_b.weight", (WIDTH, RANK)
        yield f"{layer}attn.wkv.weight", (32, WIDTH)
        yield f"{layer}attn.wo_a.weight", (8 * 64, 64)
        yield f"{layer}attn.wo_b.weight", (WIDTH, 512)
        yield f"{layer}attn.attn_sink", (HEADS,)
        yield f"{layer}ffn.gate.weight", (EXPERTS, WIDTH)
        yield f"{layer}ffn.gate.bias", (EXPERTS,)
        yield from _experts(f"{layer}ffn.", ("w1", "w2", "w3")).items()
        yield from _mlp(f"{layer}ffn.shared_experts.", ("w1", "w2", "w3")).items()
        for part in ("hc_attn", "hc_ffn"):
            yield f"{layer}{part}_fn", (24, 512)
            yield f"{layer}{part}_base", (24,)
    yield "mtp.0.hc_head_fn", (4, 512)
    if stages > 1:
        yield "mtp.0.main_proj.weight", (WIDTH, WIDTH)
        yield "mtp.1.markov_head.weight", (WIDTH, WIDTH)


def _hy_v4() -> Iterator[tuple[str, Shape]]:
    """Its weights are MXFP8, which the drafter keeps."""
    layer = "model.mtp_layers.0."
    yield from _norms(layer, "enorm", "hnorm", "final_layernorm", "input_layernorm").items()
    yield f"{layer}eh_proj.weight", (WIDTH, 2 * WIDTH)
    yield f"{layer}mlp.gate.weight", (EXPERTS, WIDTH)
    yield f"{layer}mlp.gate.e_score_correction_bias", (EXPERTS,)
    yield from _mlp(f"{layer}mlp.shared_experts.").items()


def _nemotron_h() -> Iterator[tuple[str, Shape]]:
    for number, kind in enumerate("*E"):
        layer = f"mtp.layers.{number}."
        yield f"{layer}norm.weight", (WIDTH,)
        if kind == "*":
            for name, rows in {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": WIDTH}.items():
                yield f"{layer}mixer.{name}.weight", (rows, WIDTH)
        else:
            yield f"{layer}mixer.gate.weight", (EXPERTS, WIDTH)
            yield f"{layer}mixer.gate.e_score_correction_bias", (EXPERTS,)
            yield from _experts(f"{layer}mixer.", ("up_proj", "down_proj")).items()
            yield from _mlp(f"{layer}mixer.shared_experts.", ("up_proj", "down_proj")).items()


def _qwen4_exp() -> Iterator[tuple[str, Shape]]:
    for name, shape in _qwen("stacked"):
        if not name.endswith("mtp.fc.weight"):
            yield name, shape
    yield from _mlp("mtp.", ("fc_embedding", "fc_hidden")).items()
    yield "mtp.layers.0.attn_hyper_connection.block_inject_weight.weight", (4, 512)


def _inkling() -> Iterator[tuple[str, Shape]]:
    layer = "model.mtp.layers.0."
    yield f"{layer}input_proj.weight", (WIDTH, 2 * WIDTH)
    yield from _norms(layer, "embed_norm", "hidden_norm").items()
    block = f"{layer}transformer_block."
    yield from _norms(block, "attn_norm", "mlp_norm").items()
    for name in ("attn.wq_du", "attn.wk_dv", "attn.wv_dv", "attn.wr_du", "attn.wo_ud"):
        yield f"{block}{name}.weight", (WIDTH, WIDTH)
    yield f"{block}attn.k_sconv.weight", (WIDTH, 1, 4)
    yield f"{block}mlp.w13_dn.weight", (2 * WIDTH, WIDTH)
    yield f"{block}mlp.w2_md.weight", (WIDTH, WIDTH)
    yield "model.llm.norm.weight", (WIDTH,)


MTP = {
    "qwen3_5": lambda: _qwen("dense"),
    "qwen3_5_moe": lambda: _qwen("stacked"),
    "qwen3_next": lambda: _qwen("experts"),
    "qwen4_exp": _qwen4_exp,
    "deepseek_v4": lambda: _deepseek_v4(1),
    "deepseek_v4-dspark": lambda: _deepseek_v4(2),
    "glm4_moe_lite": lambda: _glm("model.", own_head=True),
    "glm_moe_dsa": lambda: _glm("model."),
    "glm5_next": lambda: _glm("model.language_model."),
    "hy_v4": _hy_v4,
    "inkling": _inkling,
    "nemotron_h": _nemotron_h,
    "deepseek_v3": lambda: _glm("model."),  # which mlx-vlm has no drafter of
}
LATENT = {"num_key_value_heads": HEADS, "topk_method": "noaux_tc"}
CONFIGS = {
    "deepseek_v4-dspark": {"dspark_target_layer_ids": [0, 1], "dspark_block_size": 4},
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "glm5_next": {
        **LATENT, "index_topk": 64, "index_kpool": 16, "qk_rope_head_dim": 0,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M*", "mtp_hybrid_override_pattern": "*E",
        "layer_norm_epsilon": 1e-5, "attention_bias": False, "mamba_num_heads": 4,
        "mamba_head_dim": 32, "mamba_proj_bias": False, "ssm_state_size": 16, "conv_kernel": 4,
        "n_groups": 1, "mlp_bias": False, "use_bias": False, "use_conv_bias": False,
        "moe_shared_expert_intermediate_size": WIDTH, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    },
}  # fmt: skip

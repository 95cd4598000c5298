"""vlm_names: what mlx-vlm's classes do not tell of a checkpoint: the hub's names, some settings."""

from typing import Any, NamedTuple


class Renamed(NamedTuple):
    """What the hub has instead of parameters of mlx-vlm's.

    Attributes:
        pattern: over mlx-vlm's names.
        name: what the match is on the hub; with `{expert}` in it, each of a stack by itself. None:
            nothing, since it is a half of another.
        halves: how many of such a stack of experts are in one, turned, as (expert, in, out).
        turned: whether a matrix is turned there, as (in, out).
        times: how many of it are in one there, of which the rest belong to no parameter.
    """

    pattern: str
    name: str | None
    halves: int = 0
    turned: bool = False
    times: int = 1


LM_HEAD = Renamed(r"^language_model\.lm_head", "lm_head")
QWEN_2 = (
    Renamed(r"^vision_tower\.", "visual."),
    Renamed(r"^language_model\.model\.", "model."),
    LM_HEAD,
)
QWEN_3 = (
    Renamed(r"^language_model\.model\.", "model.language_model."),
    Renamed(r"^vision_tower\.", "model.visual."),
    LM_HEAD,
)
EXPERTS = Renamed(r"switch_mlp\.(\w+)\.weight$", r"experts.{expert}.\1.weight")
PIXTRAL = (Renamed(r"^vision_tower\.vision_model\.", "vision_tower."),)


def fused(prefix: str, path: str, hub: str = "") -> tuple[Renamed, ...]:
    """Experts whose gates and ups are one tensor: the hub's names of them begin with `hub`."""
    start = rf"^{prefix}(.*){path}\."
    to = rf"{hub or prefix}\1experts."
    return (
        Renamed(start + r"gate_proj(\.weight)?$", to + "gate_up_proj", halves=2),
        Renamed(start + r"up_proj(\.weight)?$", None),
        Renamed(start + r"down_proj(\.weight)?$", to + "down_proj", halves=1),
    )


# By architecture; of those that have the same names as the hub, convolutions are turned alone.
HUB: dict[str, tuple[Renamed, ...]] = {
    "deepseek_vl_v2": (
        Renamed(r"^language_model(.*)switch_mlp\.(\w+)\.", r"language\1experts.{expert}.\2."),
        Renamed(r"^language_model\.", "language."),
        Renamed(r"^vision\.vision_tower\.", "vision."),
    ),
    "gemma3": (),
    "gemma4": (
        Renamed(r"^language_model\.model\.", "model.language_model."),
        Renamed("^", "model."),
    ),
    "falcon_perception": (
        Renamed(r"cross_attn\.q_proj\.", "cross_attn.attention.in_proj_", times=3),
        Renamed(r".*cross_attn\.k_proj\..*", None),
        Renamed(r"^(itok_upsampler\.\w+encoder|itok_upsampler\.aggregation)\.conv\.", r"\1.0."),
        Renamed(r"cross_decode\.conv\.", "cross_decode.conv2d."),
        Renamed(r"^(itok_upsampler\.\w+)\.lfu\.basis$", r"\1.0.basis"),
        *(
            Renamed(
                rf"^(itok_upsampler\.\w+)\.blocks\.{block}\.{own}\.",
                rf"\1.{block + 1}.{hub}.",
            )
            for block in range(4)
            for own, hub in {
                "norm1": "block.0",
                "conv1": "block.2",
                "norm2": "block.3",
                "conv2": "block.5",
                "shortcut": "shortcut",
            }.items()
        ),
    ),
    "gpt2": (
        Renamed(
            r"^language_model\.model\.(.*\.(?:c_attn|c_proj|c_fc)\.weight)$", r"\1", turned=True
        ),
        Renamed(r"^language_model\.model\.", ""),
    ),
    "gpt_neox": (
        Renamed(r"^language_model\.model\.h\.", "gpt_neox.layers."),
        Renamed(r"^language_model\.model\.embed_out", "embed_out"),
        Renamed(r"^language_model\.model\.", "gpt_neox."),
    ),
    "idefics3": (
        LM_HEAD,
        Renamed(r"^language_model\.", "model.text_model."),
        Renamed("^", "model."),
    ),
    "internvl_chat": (),
    "kimi_vl": (
        EXPERTS,
        Renamed(r"^vision_tower\.blocks\.(\d+)\.attn\.", r"vision_tower.encoder.blocks.\1."),
        Renamed(r"^vision_tower\.blocks", "vision_tower.encoder.blocks"),
    ),
    "lfm2_colbert": (Renamed(r"^projection\.", "1_Dense.linear."), Renamed(r"^model\.", "")),
    "llama4": fused(r"language_model\.model\.layers\.", r"experts", "language_model.model.layers."),
    "llava": (),
    "minicpm": (Renamed(r"^language_model\.", ""),),
    "mistral3": PIXTRAL,
    "molmo": (
        Renamed(r"^language_model\.model\.", "model.transformer."),
        Renamed(r"^vision_tower\.", "model.vision_backbone."),
    ),
    "paligemma": (),
    "phi3_v": (),
    "pixtral": PIXTRAL,
    "qwen2_5_vl": QWEN_2,
    "qwen2_vl": QWEN_2,
    "qwen3_omni_moe": (EXPERTS,),
    "qwen3_vl": QWEN_3,
    "qwen3_vl_moe": (
        *fused(r"language_model\.model\.", r"(?:switch_mlp|experts)", "model.language_model."),
        *QWEN_3,
    ),
    "rt_detr_v2": (),
    "recurrent_gemma": (Renamed("lm_head", None), Renamed(r"^language_model\.", "")),
}

# By architecture: what its configuration must say besides small sizes.
CLIP: dict[str, Any] = {
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model"},
}
HYBRID = {
    "hybrid_override_pattern": ["M", "*", "-", "E"], "time_step_limit": [0.0, float("inf")],
    "time_step_min": 0.001, "time_step_max": 0.1, "moe_intermediate_size": 128, "n_group": 1,
    "moe_shared_expert_intermediate_size": 128, "n_routed_experts": 4, "n_shared_experts": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}  # fmt: skip
KDA = {
    "linear_attn_config": {
        "kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4, "head_dim": 32,
        "short_conv_kernel_size": 4,
    }
}  # fmt: skip
GLM_5 = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "index_topk": 64, "index_kpool": 16,
    "qk_rope_head_dim": 0, "mla_use_nope": True,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_proj_bias": False, "mamba_d_state": 16,
    "mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True, "num_local_experts": 4,
    "num_experts_per_tok": 2, "shared_intermediate_size": 128,
}  # fmt: skip
MODERN_BERT = {
    "model_type": "modernbert", "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 4,
    "intermediate_size": 128, "num_attention_heads": 4,
}  # fmt: skip
STACK = [128, 64, 32, 32, 32]  # widths of convolutions


def convolutions(**own: Any) -> dict[str, Any]:
    """What a stack of MoGe's convolutions is."""
    resamplers = [*["conv_transpose"] * 3, "bilinear"]
    norms = {"res_block_in_norm": "none", "res_block_hidden_norm": "none"}
    blocks = {"num_res_blocks": [0, 1, 1, 1, 0], "resamplers": resamplers}
    return {"dim_in": STACK, "dim_res_blocks": STACK, **norms, **blocks, **own}


MUSE = {"rope_parameters": {"rope_theta": 10000.0}, "layer_rope_theta": [10000.0] * 4}
KIMI_3 = {
    **KDA, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "num_experts": 4, "moe_intermediate_size": 128, "attn_res_block_size": 2,
    "routed_expert_hidden_size": 128, "activation_situ_beta": 1.0,
    "activation_situ_linear_beta": 1.0,
}  # fmt: skip
MIMO = {"moe_layer_freq": [0, 1, 1, 1], "hybrid_layer_pattern": [0, 1, 1, 0]}
SETTINGS: dict[str, dict[str, Any]] = {
    "prism_hadamard_qwen35": {
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": f"model.{path}", "embedding": "embed" in path, "dtype": "float16", "block": 0}
            for path in ("embed_tokens", "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")
        ],
    },
    "baichuan_m1": {"sliding_window_layers": [1, 3], "conv_window": 2},
    "clef": {
        "head_config": {
            "hidden_size": 128,
            "width": 64,
            "routing_layers": 1,
            "layers": 1,
            "heads": 2,
            "feedforward": 128,
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseekocr_2": {
        "vision_config": {"width": {"qwen2-0-5b": {"dim": 128}, "sam_vit_b": {}}, "params": {}}
    },
    "exaone4": {"sliding_window_pattern": "LLLG"},
    "exaone_moe": {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "is_moe_layer": [False, True, True, True],
    },
    "gemma3n": {
        "text_config": {
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "intermediate_size": [128] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        }
    },
    "glm5_next": {**GLM_5, "text_config": GLM_5},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, **MAMBA},
    "hunyuan": {"rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"}},
    "jamba": {"layers_block_type": ["mamba", "attention"] * 2},
    "kimi_k3": {**KIMI_3, "text_config": KIMI_3},
    "kimi_linear": KDA,
    "laya": {"encoder_config": MODERN_BERT, "decision_config": {}},
    "limite": {"rope_n_pairs": 8},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "llava": CLIP,
    "llava_next": CLIP,
    "mellum": {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {
            kind: {"rope_theta": 10000.0, "rope_type": "default"}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "mimo_v2": {**MIMO, "text_config": MIMO},
    "mimo_v2_flash": {**MIMO, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "moge3": {
        "encoder": {
            "embed_dim": 128,
            "depth": 4,
            "num_heads": 4,
            "ffn": "mlp",
            "dim_out": 128,
            "intermediate_layers": [0, 1, 2, 3],
        },
        "neck": convolutions(dim_in=[130, 2, 2, 2, 2], dim_out=None),
        "points_head": convolutions(dim_out=[*[None] * 4, 3]),
        "mask_head": convolutions(dim_out=[*[None] * 4, 1]),
        "normal_head": convolutions(dim_out=[*[None] * 4, 3]),
        "scale_head": {"dims": [128, 128, 1]},
        "refiner": {
            "encoder_channels": 130,
            "model_channels": [32, 64, 128],
            "downsample_factors": [2, 2],
            "encoder_downsample": 4,
        },
    },
    "multi_modality": {
        "vision_config": {"params": {}, "cls": "CLIPVisionTower", "model_type": "vision"},
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {
                "depth": 2,
                "input_dim": 128,
                "n_embed": 128,
                "projector_type": "mlp_gelu",
            },
        },
    },
    "muse_spark": {**MUSE, "text_config": MUSE},
    "nemotron_h": HYBRID,
    "nemotron_h_nano_omni": {"text_config": HYBRID, "llm_config": HYBRID},
    "nemotron_nas": {
        "block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 4
    },
    "nemotron_voicechat": {"text_config": HYBRID, "llm_config": HYBRID},
    "openelm": {"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4, "ffn_multipliers": [1.0] * 4},
    "paddleocr_vl": {"head_dim": 32, "text_config": {"head_dim": 32}},
    "phi3_v": {"num_key_value_heads": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
}

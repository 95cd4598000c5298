"""audio_configs: what config.json says of small models, where mlx-audio's classes do not tell.

By `DOMAIN-NAME`; None, no such key.
"""

from typing import Any

Config = dict[str, Any]
LLAMA = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "vocab_size": 320, "max_position_embeddings": 128, "rope_theta": 10000.0,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
QWEN_2 = {
    "model_type": "qwen2", "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_3 = {**QWEN_2, "model_type": "qwen3", "head_dim": 32}
LLAMA_ROPE = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
    "original_max_position_embeddings": 128,
}  # fmt: skip
CODEBOOKS = {
    **LLAMA, "rope_scaling": LLAMA_ROPE, "num_codebooks": 4, "attention_dropout": 0.0,
    "backbone_hidden_size": 128, "hidden_act": "silu", "initializer_range": 0.02,
    "use_cache": True,
}  # fmt: skip
ALBERT = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 192,
    "max_position_embeddings": 128,
}  # fmt: skip
ISTFTNET = {
    "upsample_kernel_sizes": [20, 12], "upsample_rates": [10, 6], "gen_istft_hop_size": 5,
    "gen_istft_n_fft": 20, "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "resblock_kernel_sizes": [3, 7, 11], "upsample_initial_channel": 128,
}  # fmt: skip
KOKORO = {
    "plbert": ALBERT, "istftnet": ISTFTNET, "hidden_dim": 128, "style_dim": 64, "n_token": 178,
    "max_conv_dim": 128, "n_layer": 2, "n_mels": 80, "max_dur": 50, "text_encoder_kernel_size": 5,
}  # fmt: skip
NEMO = "nemo.collections.asr.models."
CONFORMER: Config = {
    "preprocessor": {
        "sample_rate": 16000, "normalize": "per_feature", "window_size": 0.025,
        "window_stride": 0.01, "window": "hann", "features": 80, "n_fft": 512, "dither": 0.0,
    },
    "encoder": {
        "feat_in": 80, "n_layers": 2, "d_model": 128, "n_heads": 4, "ff_expansion_factor": 2,
        "subsampling_factor": 8, "self_attention_model": "rel_pos", "conv_kernel_size": 9,
        "subsampling": "dw_striding", "subsampling_conv_channels": 64, "pos_emb_max_len": 256,
    },
}  # fmt: skip
TOKENIZER: Config = {  # of sounds
    "encoder_n_filters": 4, "encoder_depths": "1-1-1-1-1-1-1", "decoder_n_filters": 4,
}  # fmt: skip
MING_TEXT = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "q_lora_rank": 64,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 2,
    "topk_group": 1, "moe_shared_expert_intermediate_size": 64,
}  # fmt: skip
MING: Config = {
    "text_config": MING_TEXT,
    "audio_config": {
        "n_mels": 16, "n_audio_ctx": 64, "n_audio_state": 128, "n_audio_head": 4,
        "n_audio_layer": 2, "whisper_chunk_size": 64,
    },
}  # fmt: skip
BACKBONE = {**QWEN_2, "is_causal": True}
MING_SOUNDS: Config = {
    "sample_rate": 24000, "patch_size": -1,
    "enc_kwargs": {"backbone": BACKBONE, "input_dim": 64, "hop_size": 64, "latent_dim": 32},
    "dec_kwargs": {"backbone": BACKBONE, "output_dim": 64, "latent_dim": 32},
}  # fmt: skip
FLOW = {"hidden_size": 128, "depth": 2, "num_heads": 4}
MING_OMNI: Config = {
    "llm_config": QWEN_2, "audio_tokenizer_config": MING_SOUNDS,
    "ditar_config": {"patch_size": 4, **FLOW}, "aggregator_config": FLOW,
}  # fmt: skip
GRANITE_MULTIPLIERS = {
    "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
    "residual_multiplier": 0.2,
}  # fmt: skip
LFM_2 = {
    "model_type": "lfm2", "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 128, "block_ff_dim": 192,
    "block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}  # fmt: skip
QWEN_3_5 = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"], "attn_output_gate": True,
    "hidden_act": "silu", "layernorm_zero_centered_gamma": True, "rotary_interleaved": False,
    "shared_expert_gate": True, "use_qk_norm": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}  # fmt: skip
# What the class's own names are not on the hub: a pattern over them, and what it is there.
NAMES = {"stt-mimo_v2_asr": (r"^model\.", "")}
CONFIGS: dict[str, Config] = {
    "tts-llama": LLAMA,
    "tts-kokoro": {**KOKORO, "dim_in": 64, "dropout": 0.2, "multispeaker": True, "vocab": {"a": 1}},
    "tts-kitten_tts": {**KOKORO, "asr_res_dim": 64, "decoder_out_dim": 128},
    "tts-sesame": {
        **LLAMA, "rope_scaling": LLAMA_ROPE, "depth_decoder_config": CODEBOOKS,
        "text_vocab_size": 320, "audio_vocab_size": 64, "audio_num_codebooks": 4,
        "backbone_flavor": "", "decoder_flavor": "",
    },
    "tts-soprano": {"decoder_config": None},
    "tts-breeze_tts": {
        "num_codebooks": 4, "backbone_config": QWEN_3, "depth_decoder_config": CODEBOOKS,
        "text_encoder_config": {**QWEN_3, "query_pre_attn_scalar": 32, "sliding_window": 64},
    },
    "tts-echo_tts": {
        "dit": {
            "latent_size": 16, "model_size": 128, "text_model_size": 128, "adaln_rank": 32,
            "speaker_model_size": 128,
        },
    },
    "tts-kugelaudio": {"acoustic_tokenizer_config": TOKENIZER},
    "tts-vibevoice": {
        "acoustic_tokenizer_config": TOKENIZER, "semantic_tokenizer_config": TOKENIZER,
    },
    "stt-vibevoice_asr": {
        "acoustic_tokenizer_config": TOKENIZER, "semantic_tokenizer_config": TOKENIZER,
    },
    "tts-longcat_audiodit": {"vae_config": {"channels": 16}},
    "tts-omnivoice": {"llm_config": QWEN_3},
    "tts-voxcpm": {"audio_vae_config": {"encoder_dim": 16, "decoder_dim": 64}},
    "tts-voxcpm2": {"audio_vae_config": {"encoder_dim": 16, "decoder_dim": 64}},
    "tts-melotts": {
        "inter_channels": 64, "hidden_channels": 64, "filter_channels": 128,
        "upsample_initial_channel": 64,
    },
    "tts-bailingmm": MING_OMNI,
    "tts-dense": MING_OMNI,
    "tts-lingv3_tts": {
        "llm_config": MING_TEXT, "audio_config": MING_SOUNDS, "tts_config": {"latent_dim": 32},
        "flow_config": FLOW, "aggregator_config": FLOW,
    },
    "tts-fish_drama3": {
        "text_config": QWEN_3_5, "semantic_start_token_id": 100, "semantic_end_token_id": 163,
        "eos_token_id": 2, "audio_decoder_config": {
            "dim": 128, "n_head": 4, "n_local_heads": 2, "head_dim": 32, "intermediate_size": 192,
            "vocab_size": 64, "num_codebooks": 10, "shared_enrichment_layers": 1,
            "vq_backbone_codebooks": 10,
        },
    },
    "tts-indextts": {
        "tokenizer_name": "tokenizer", "bigvgan": {
            "num_mels": 80, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8],
            "upsample_initial_channel": 64, "resblock": "1", "resblock_kernel_sizes": [3, 7],
            "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5]], "activation": "snakebeta",
            "snake_logscale": True, "gpt_dim": 128, "speaker_embedding_dim": 64,
        },
        "gpt": {
            "model_dim": 128, "heads": 4, "layers": 2, "max_mel_tokens": 64, "max_text_tokens": 64,
            "number_text_tokens": 64, "number_mel_codes": 64, "start_mel_token": 1,
            "stop_mel_token": 2, "start_text_token": 1, "stop_text_token": 2,
            "use_mel_codes_as_input": True, "mel_length_compression": 4,
            "condition_type": "conformer_perceiver",
            "condition_module": {
                "output_size": 128, "num_blocks": 2, "linear_units": 128, "attention_heads": 4,
                "input_layer": "conv2d2",
            },
        },
    },
    "stt-whisper": {  # as the hub has it
        "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "vocab_size": 320, "num_mel_bins": 80,
        "max_source_positions": 64, "max_target_positions": 32,
    },
    "stt-parakeet": {
        **CONFORMER, "target": f"{NEMO}rnnt_bpe_models.EncDecRNNTBPEModel",
        "model_defaults": {"tdt_durations": [0, 1, 2, 3, 4]},
        "decoding": {"model_type": "tdt", "durations": [0, 1, 2, 3, 4], "greedy": None},
        "decoder": {
            "blank_as_pad": True, "vocab_size": 64,
            "prednet": {"pred_hidden": 64, "pred_rnn_layers": 2},
        },
        "joint": {
            "num_classes": 64, "vocabulary": ["a"] * 64, "num_extra_outputs": 5,
            "jointnet": {
                "joint_hidden": 64, "activation": "relu", "encoder_hidden": 128, "pred_hidden": 64,
            },
        },
    },
    "stt-nemotron_asr": {
        "encoder": {
            "n_layers": 2, "d_model": 128, "n_heads": 4, "ff_expansion_factor": 2,
            "subsampling_conv_channels": 64, "pos_emb_max_len": 256,
        },
        "prompt": {"num_prompts": 8, "prompt_hidden": 128}, "vocabulary": ["a"] * 64,
        "decoder": {"pred_hidden": 64, "vocab_size": 64},
        "joint": {"joint_hidden": 64, "encoder_hidden": 128, "pred_hidden": 64, "num_classes": 64},
    },
    "stt-qwen3_forced_aligner": {
        "audio_config": {
            "num_mel_bins": 128, "encoder_layers": 2, "encoder_attention_heads": 4, "d_model": 128,
            "encoder_ffn_dim": 128, "output_dim": 128, "downsample_hidden_size": 128,
        },
        "text_config": QWEN_3,
    },
    "stt-ming_v3_asr": MING,
    "sts-ming_v3_audio": MING,
    "stt-granite_speech_nar": {
        "encoder_config": {
            "num_layers": 2, "hidden_dim": 128, "num_heads": 4, "dim_head": 32, "input_dim": 160,
            "output_dim": 64, "bpe_output_dim": 128, "bpe_pooling_window": 4,
            "conv_kernel_size": 15, "conv_expansion_factor": 2, "feedforward_mult": 2,
            "max_pos_emb": 64, "context_size": 32, "self_conditioning_layer": 1,
            "blank_token_id": 0, "dropout": 0.1, "pred_dropout": 0.1, "initializer_range": 0.02,
        },
        "projector_config": {
            "num_layers": 2, "num_encoder_layers": 2, "hidden_size": 128, "num_heads": 4,
            "block_size": 15, "downsample_rate": 5, "encoder_dim": 128, "llm_dim": 128,
            "mlp_ratio": 2, "mlp_bias": True, "attn_bias": True, "dropout_prob": 0.1,
            "layernorm_eps": 1e-6,
        },
        "text_config": {
            **LLAMA, **GRANITE_MULTIPLIERS, "rope_parameters": {"rope_theta": 10000.0},
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        "encoder_layer_indices": [0, 1], "blank_token_id": 0, "scale_projected_embeddings": True,
        "min_edit_sequence_length": 8, "tie_word_embeddings": True,
    },
    "sts-lfm_audio": {
        "lfm": LFM_2, "codebooks": 2, "audio_vocab_size": 64, "adapter_hidden_dims": [128],
        "encoder": {"n_layers": 2, "d_model": 128, "n_heads": 4, "subsampling_conv_channels": 64},
        "depthformer": {"layers": 2, "dim": 128, "num_heads": 4, "num_kv_heads": 2},
    },
}  # fmt: skip

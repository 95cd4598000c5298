"""embeddings_checkpoints: a small random checkpoint of any architecture that mlx-embeddings has."""

import json
import pkgutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from support.checkpoints import random_array, write_tokenizer

Config = dict[str, Any]
WIDTH = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 320, "intermediate_size": 192}
HEADS = {"num_attention_heads": 4}
TEXT = {**WIDTH, **HEADS, "num_key_value_heads": 2, "head_dim": 32}
NORM = {"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-6, "max_position_embeddings": 64}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}, "rope_theta": 10000.0}
SIGHT = {
    "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192, **HEADS,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
QWEN_2_SIGHT = {
    "model_type": "qwen2_5_vl", "depth": 2, "hidden_size": 128, "intermediate_size": 192,
    "out_hidden_size": 128, "num_heads": 4, "patch_size": 14, "spatial_patch_size": 14,
    "fullatt_block_indexes": [1],
}  # fmt: skip
QWEN_3_SIGHT = {
    "model_type": "qwen3_vl", "depth": 2, "hidden_size": 128, "intermediate_size": 192,
    "out_hidden_size": 128, "num_heads": 4, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1],
}  # fmt: skip
QWEN_2_TEXT = {**TEXT, **NORM, **ROPE, "model_type": "qwen2_5_vl", "rms_norm_eps": 1e-6}
QWEN_3_TEXT = {**TEXT, **NORM, **ROPE, "model_type": "qwen3_vl"}
# config.json by architecture, as far as it differs from the classes' own defaults.
CONFIGS: dict[str, Config] = {
    "bert": {**WIDTH, **HEADS, **NORM},
    "xlm_roberta": {**WIDTH, **HEADS, **NORM, "type_vocab_size": 1},
    "modernbert": {**WIDTH, **HEADS, **NORM, "architectures": ["ModernBertModel"]},
    "qwen3": {**TEXT, **NORM},
    "gemma3_text": {**TEXT, **NORM, "sliding_window": 16, "sliding_window_pattern": 2},
    "lfm2": {
        **TEXT, **NORM, "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 128,
        "block_ff_dim": 192, "block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1], "rope_theta": 1000000.0,
    },
    "llama_bidirec": {**TEXT, **NORM},
    "siglip": {
        "text_config": {**WIDTH, **HEADS, "max_position_embeddings": 16},
        "vision_config": SIGHT,
    },
    "llama_nemotron_vl": {
        "llm_config": {**TEXT, **NORM}, "vision_config": SIGHT, "force_image_size": 64,
    },
    "colqwen2_5": {
        "vlm_config": {
            "model_type": "qwen2_5_vl", "text_config": QWEN_2_TEXT, "vision_config": QWEN_2_SIGHT,
            **QWEN_2_TEXT,
        },
    },
    "qwen3_vl": {"text_config": QWEN_3_TEXT, "vision_config": QWEN_3_SIGHT, "image_token_id": 7},
}  # fmt: skip


def architectures() -> list[str]:
    """Return the architectures that mlx-embeddings has a class for."""
    import mlx_embeddings.models

    names = (module.name for module in pkgutil.iter_modules(mlx_embeddings.models.__path__))
    return sorted(name for name in names if name != "base")


def make(arch: str, folder: Path, settings: Config | None = None) -> Path:
    """Write a checkpoint of an architecture into a folder, and return the folder.

    It has the names that the class has, which each takes beside its author's, and convolutions as
    PyTorch lays them out.
    """
    from mlx.utils import tree_flatten

    config = json.loads(
        json.dumps({**CONFIGS.get(arch, {}), **(settings or {}), "model_type": arch})
    )
    flat = tree_flatten(_model(json.loads(json.dumps(config))).parameters())
    folder.mkdir(parents=True)
    arrays = {}
    for name, array in flat:
        floats = mx.issubdtype(array.dtype, mx.floating)
        shape = array.shape
        if len(shape) > 3 and name.endswith("weight"):
            shape = (shape[0], shape[-1], *shape[1:-1])
        arrays[name] = random_array(name, shape) if floats else mx.zeros_like(array)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": ""}]')
    write_tokenizer(folder)
    return folder


def _model(config: Config) -> Any:
    """Return the model as mlx-embeddings' loader makes it."""
    from mlx_embeddings import utils

    kind, arguments, text, vision = utils._get_classes(config)
    made = arguments.from_dict(config)
    if text is not None:
        made.text_config = text(**made.text_config)
        made.vision_config = vision(**made.vision_config)
    return kind(made)

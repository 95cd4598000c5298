"""adapters: small random adapters of the models that `checkpoints` makes."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from support import checkpoints

KEYS = {
    "lora": ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens"],
    "dora": ["self_attn.q_proj", "self_attn.o_proj"],
    "experts": ["mlp.switch_mlp.up_proj", "mlp.gate"],
}


def make(source: Path, folder: Path, kind: str, seed: int = 0) -> Path:
    """Write an adapter of random weights as `mlx_lm.lora` saves it."""
    folder.mkdir()
    model, _ = load_model(source)
    settings = {"rank": 4, "scale": 7.5, "dropout": 0.0, "keys": KEYS[kind]}
    linear_to_lora_layers(model, 2, settings, use_dora=kind == "dora")
    weights = {
        name: checkpoints.random_array(name, array.shape, seed=seed, dtype="float32")
        for name, array in tree_flatten(model.parameters())
        if name.endswith((".lora_a", ".lora_b", ".m"))
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {
        "fine_tune_type": "dora" if kind == "dora" else "lora",
        "num_layers": 2,
        "lora_parameters": settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder

"""audio_checkpoints: a small random checkpoint of any architecture that mlx-audio converts.

Its configuration is made of the fields of mlx-audio's own classes, every size a small one, and its
tensors are those that the class then has, by its own names: convolutions as PyTorch lays them out
where the class takes them so.
"""

import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from support.audio_peer import quiet
from support.checkpoints import random_array, write_tokenizer
from support.vlm_checkpoints import _fields, _merged, _plain

Config = dict[str, Any]
MOST_WEIGHTS = 45_000_000
LLAMA = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 192,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "vocab_size": 320, "max_position_embeddings": 128, "rope_theta": 10000.0,
    "attention_bias": False, "mlp_bias": False,
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
# What a class's own fields do not say of config.json, or what makes it small; None, no such key.
CONFIGS: dict[str, Config] = {
    "tts-llama": LLAMA,
    "tts-kokoro": {
        "plbert": ALBERT, "istftnet": ISTFTNET, "dim_in": 64, "hidden_dim": 128, "style_dim": 64,
        "max_conv_dim": 128, "n_token": 178, "n_layer": 2, "n_mels": 80, "max_dur": 50,
        "text_encoder_kernel_size": 5, "dropout": 0.2, "multispeaker": True, "vocab": {"a": 1},
    },
    "tts-sesame": {
        **LLAMA, "depth_decoder_config": {
            **LLAMA, "rope_scaling": None, "num_codebooks": 4, "attention_dropout": 0.0,
            "backbone_hidden_size": 128, "hidden_act": "silu", "initializer_range": 0.02,
            "use_cache": True,
        },
        "text_vocab_size": 320, "audio_vocab_size": 64, "audio_num_codebooks": 4,
        "backbone_flavor": "", "decoder_flavor": "",
    },
    "tts-soprano": {"decoder_config": None},
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
}  # fmt: skip


def architectures() -> list[str]:
    """Return the architectures that mlx-audio's convert looks for, each with its domain."""
    convert = importlib.import_module("mlx_audio.convert")
    return [
        f"{d.value}-{each}" for d in convert.Domain for each in sorted(convert.get_model_types(d))
    ]


def make(arch: str, folder: Path, settings: Config | None = None) -> Path:
    """Write a checkpoint of an architecture, `DOMAIN-NAME`, into a folder, and return the folder.

    Raises:
        ValueError: no small configuration of it was found, or it does not take its own weights.
    """
    module, config = _configured(arch, {**CONFIGS.get(arch, {}), **(settings or {})})
    model = _made(module, config, folder)
    flat = _flat(model)
    count = sum(array.size for array in flat.values())
    if count > MOST_WEIGHTS:
        raise ValueError(f"it has {count:,} weights still")
    arrays = _taken(lambda: _made(module, config, folder), flat)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text('{"feature_size": 80}')
    write_tokenizer(folder)
    return folder


def _configured(arch: str, settings: Config) -> tuple[Any, Config]:
    domain, _, name = arch.partition("-")
    with quiet():
        module = importlib.import_module(f"mlx_audio.{domain}.models.{name}")
    kind = getattr(module, "ModelConfig", None)
    config = _plain(_fields(kind, name)) if dataclasses.is_dataclass(kind) else {}
    config = {**_merged(config, settings), "model_type": name}
    unsaid = {"model_path", *(key for key, value in settings.items() if value is None)}
    return module, {key: value for key, value in config.items() if key not in unsaid}


def _made(module: Any, config: Config, folder: Path) -> Any:
    """Return the model as mlx-audio's convert makes it."""
    config = json.loads(json.dumps(config))
    with quiet():
        if hasattr(module, "prepare_config"):
            config = module.prepare_config(config, folder)
        kind = getattr(module, "ModelConfig", None)
        made = kind.from_dict(config) if kind else config
        if hasattr(made, "model_path"):
            made.model_path = folder
        return module.Model(made)


def _taken(make: Callable[[], Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Return random tensors for parameters, such as the model takes.

    Convolutions are as PyTorch lays them out, but for those that the class does not turn.

    Raises:
        ValueError: it does not take them so either.
    """
    turned = {name for name, array in parameters.items() if array.ndim > 2}
    arrays = {name: _random(name, array, name in turned) for name, array in parameters.items()}
    while True:
        model, weights = make(), dict(arrays)
        try:
            if hasattr(model, "sanitize"):
                weights = model.sanitize(weights)
            model.load_weights(list(weights.items()))
            return arrays
        except ValueError as error:
            refused = re.search(r"for parameter (\S+?)\.?$", str(error))
            if not refused or refused[1] not in turned:
                raise
            turned.remove(refused[1])
            arrays[refused[1]] = _random(refused[1], parameters[refused[1]], False)


def _flat(model: Any) -> dict[str, Any]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


def _random(name: str, array: Any, turned: bool) -> Any:
    shape = array.shape
    if turned and len(shape) > 2:
        shape = (shape[0], shape[-1], *shape[1:-1])
    floats = mx.issubdtype(array.dtype, mx.floating)
    return random_array(name, shape) if floats else mx.zeros(shape, array.dtype)

"""llama_names: a Llama by Meta's names and by Hugging Face's, tensors and configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tasks.checkpoints import llama
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError

META_TO_HUGGINGFACE = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HUGGINGFACE_TO_META = {new: old for old, new in META_TO_HUGGINGFACE.items()}
BUFFER = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # worked out again by every implementation
# What a model's code imports of other models': a module and names of it, or modules.
BUILDS_ON = re.compile(
    r"^from (?:\.+|\w+\.(?:\w+\.)*?models\b\.?)(\w*)(?:\.\w+)* import (.+)$", re.MULTILINE
)
# config.json's names for what params.json says.
LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def to_huggingface(checkpoint: Checkpoint, token_ids: Mapping[str, Any]) -> Checkpoint:
    """Return Meta's ``checkpoint`` as Hugging Face would ship it.

    Rows of wq and wk go from interleaved to half-split rotary order, as in transformers'
    ``convert_llama_weights_to_hf.py``.

    Args:
        checkpoint: with Meta's names.
        token_ids: config.json's ``bos_token_id`` and ``eos_token_id``.
    """
    params = checkpoint.config
    heads = {"wq": params["n_heads"], "wk": params.get("n_kv_heads") or params["n_heads"]}
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        module = name.rsplit(".", 2)[-2]
        if module in heads:
            tensor = tensor._replace(steps=(*tensor.steps, ["half_split", heads[module]]))
        tensors[_rename(name, META_TO_HUGGINGFACE, "model.layers.")] = tensor
    config = {**_huggingface_config(checkpoint), **token_ids}
    return replace(checkpoint, names="huggingface", config=config, tensors=tensors)


def to_meta(checkpoint: Checkpoint) -> Checkpoint:
    """Return a Hugging Face Llama by Meta's names, rows left in half-split rotary order.

    That is what mlx-examples' ``tiny_llama`` makes; its config says ``rope_traditional`` false.

    Raises:
        CheckpointError: it is no Llama, or one that mlx-examples' llama.py cannot compute.
    """
    config, folder = checkpoint.config, checkpoint.folder
    if config["model_type"] != "llama":
        raise CheckpointError(
            f"{folder} is a {config['model_type']}; layout mlx-examples is for Llama only. "
            'Use layout = "mlx-lm".'
        )
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        if BUFFER.fullmatch(name):
            continue
        try:
            tensors[_rename(name, HUGGINGFACE_TO_META, "layers.")] = tensor
        except KeyError:
            raise CheckpointError(
                f'{folder}: mlx-examples\' llama.py has no place for {name}. Use layout = "mlx-lm".'
            ) from None
    if "output.weight" not in tensors and "tok_embeddings.weight" in tensors:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]  # tied: llama.py has no ties
    try:
        params = _meta_params(checkpoint)
        shapes = llama.shapes(params, hidden=params["hidden_dim"], vocab=params["vocab_size"])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe a Llama: {error!r}. Fetch it again."
        ) from error
    ordered = {name: tensors[name] for name in shapes if name in tensors}
    for name, tensor in ordered.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{folder}: {name} is {tensor.shape}, where config.json calls for {shapes[name]}. "
                "One of them is of another model."
            )
    if mismatches := tensors.keys() ^ shapes.keys():
        name = min(mismatches)
        what = "not expected" if name in tensors else "missing"
        raise CheckpointError(
            f"{folder}: {name} is {what} ({len(mismatches)} such) for a Llama of "
            f"{params['n_layers']} layers. Fetch it again."
        )
    return replace(checkpoint, names="meta", config=params, tensors=ordered)


def rope(config: dict[str, Any], package: str = "mlx_lm", wrapper: str = "") -> dict[str, Any]:
    """Return the rotary settings of config.json that it gives elsewhere only, by their old keys.

    A folder saved by transformers 5 keeps them under ``rope_parameters``, for each kind of
    attention if they differ, and in ``text_config`` for a model that also sees. Most classes of
    mlx-lm do not look there: they would convert without a word and speak nonsense. Those that do
    get nothing.

    Args:
        config: config.json, or its ``text_config``.
        package: whose class reads it, ``mlx_lm`` or one laid out like it.
        wrapper: of a ``text_config``, the model_type of what it is in.
    """
    settings: dict[str, Any] = {}
    inner = config.get("rope_parameters")
    reader = _reader(package, str(config.get("model_type")), wrapper)
    if isinstance(inner, dict) and not reader.looks:
        kinds = {kind: table for kind, table in inner.items() if isinstance(table, dict)}
        table = kinds.get("full_attention", {}) if kinds else inner
        old_keys = {
            "rope_theta": table.get("rope_theta"),
            "rope_local_base_freq": kinds.get("sliding_attention", {}).get("rope_theta"),
            "partial_rotary_factor": None if kinds else table.get("partial_rotary_factor"),
        }
        settings = {k: v for k, v in old_keys.items() if v is not None and k not in config}
        rope_type = table.get("rope_type", "default")
        if rope_type != "default" and not config.get("rope_scaling"):
            scaling = {key: table[key] for key in table if key != "rope_theta"}
            settings["rope_scaling"] = {"type": rope_type, **scaling} if reader.type else scaling
        elif reader.needs_scaling and "rope_scaling" not in config:
            settings["rope_scaling"] = None
    text = config.get("text_config")
    if isinstance(text, dict) and (more := rope(text, package, str(config.get("model_type")))):
        settings["text_config"] = {**text, **more}
    return settings


class _Reader(NamedTuple):
    """How a library's class reads rotary settings.

    Attributes:
        looks: whether it looks into ``rope_parameters`` itself.
        type: whether it asks ``rope_scaling`` for ``type``, as ``rope_type`` was called once.
        needs_scaling: whether it wants ``rope_scaling`` in config.json, if only as null.
    """

    looks: bool = False
    type: bool = False
    needs_scaling: bool = False


@cache
def _reader(package: str, model_type: str, wrapper: str) -> _Reader:
    """Return how a library's class for a model reads rotary settings.

    Told from its source and from the modules that it builds on, since importing them takes
    seconds.
    """
    spec = find_spec(package)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        return _Reader()
    folder = Path(spec.submodule_search_locations[0])
    models, utils = (*folder.glob("models"), *folder.glob("*/models")), folder / "utils.py"
    if not utils.is_file():
        return _Reader()
    text = utils.read_text(encoding="utf-8")
    renamed = dict(re.findall(r'^    "(\S+)": "(\S+)",', text, re.MULTILINE))
    source = ""
    for name in (wrapper, model_type, model_type.removesuffix("_text")):
        if found := _source(models, renamed.get(name, name)):
            source = found
            own = renamed.get(name, name) != renamed.get(wrapper, wrapper)
            if own or "rope_theta" in source:
                break  # else it leaves its text to another class
    if not source:
        return _Reader()
    return _Reader(
        "rope_parameters" in source or "rope_parameters" in _beside(models, source, set()),
        '"type"' in source,
        bool(re.search(r"^    rope_scaling: [^=\n]+$", source, re.MULTILINE)),
    )


def _beside(models: Sequence[Path], source: str, seen: set[str]) -> str:
    """Return the code that a model's builds on: of modules, else of packages with what they use."""
    used = {
        name
        for module, several in BUILDS_ON.findall(source)
        for name in ([module] if module else re.split(r", *", several))
    }
    packages = {name for name in used if name and any((each / name).is_dir() for each in models)}
    texts = []
    for name in sorted((packages or used) - seen):  # of packages, modules beside are tools
        seen.add(name)
        texts.append(text := _source(models, name))
        if packages:
            texts.append(_beside(models, text, seen))
    return "\n".join(texts)


def _source(models: Sequence[Path], name: str) -> str:
    """Return the code of a model's module, or of all that its package has; "" if it is none."""
    files: list[Path] = []
    for path in (each / name for each in models if name):
        files += sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def _rename(name: str, table: dict[str, str], prefix: str) -> str:
    if match := re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(.+)\.weight", name):
        return f"{prefix}{match[1]}.{table[match[2]]}.weight"
    path, _, kind = name.rpartition(".")
    if kind != "weight":
        raise KeyError(name)
    return f"{table[path]}.weight"


def _huggingface_config(checkpoint: Checkpoint) -> dict[str, Any]:
    params, tensors = checkpoint.config, checkpoint.tensors
    heads = params["n_heads"]
    theta = params.get("rope_theta") or 10000.0
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params["dim"],
        "intermediate_size": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "head_dim": params.get("head_dim") or params["dim"] // heads,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": theta,
        "rope_scaling": None,
        "vocab_size": params["vocab_size"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "torch_dtype": tensors["tok_embeddings.weight"].dtype,
    }
    # params.json does not say how long a context was trained; these are the published lengths.
    # Llama 1 differs from 2 in norm_eps, its 65B from 2's 70B in the heads, which are not grouped.
    large = params["dim"] == 8192 and not params.get("n_kv_heads")
    context = 2048 if params["norm_eps"] < 1e-5 or large else 4096
    context = {1e6: 16384, 500000.0: 8192}.get(theta, context)
    if params.get("use_scaled_rope"):
        # Llama 3.1 scales by 8; 3.2's text models, which are narrower, by 32.
        factor = params.get("rope_scaling_factor") or (32.0 if params["dim"] < 4096 else 8.0)
        config["rope_scaling"] = {**LLAMA_3_SCALING, "factor": float(factor)}
        context = 131072
    return {**config, "max_position_embeddings": context}


def _meta_params(checkpoint: Checkpoint) -> dict[str, Any]:
    config, folder = checkpoint.config, checkpoint.folder
    config = {**config, **rope(config)}
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise CheckpointError(
            f"{folder} scales its rotary embedding ({scaling}), which mlx-examples' llama.py does "
            'not: the model would speak nonsense. Use layout = "mlx-lm".'
        )
    heads = config["num_attention_heads"]
    return {
        "dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "n_layers": config["num_hidden_layers"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config.get("rope_theta", 10000.0),
        "rope_traditional": False,
    }

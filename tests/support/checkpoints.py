"""checkpoints: small random Hugging Face checkpoints, one per architecture, as authors ship them.

Each is a folder with `config.json`, weights under the names they have on the hub, and a byte-level
BPE tokenizer. The weights are random but depend on nothing except the seed and the tensor's name.
What differs from one real checkpoint to the next differs here too: one file or several, the dtype
and which key of `config.json` says it, tensors kept in float32, leftovers no loader may pick up.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

Shape = tuple[int, ...]
VOCABULARY = 320
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<end_of_turn>")
FORMS = ("safetensors", "bin")


@dataclass(frozen=True)
class Architecture:
    """How one architecture's checkpoint is made.

    Attributes:
        config: What `config.json` says, as the author wrote it.
        shapes: From the config, each tensor's name and shape, in the author's order.
        dtype: The dtype of the tensors in the files.
        float32: Name endings of the tensors that are float32 whatever `dtype` is.
        files: How many weight files.
        generation: What `generation_config.json` says; None: no such file.
        leftovers: More files, and what they hold.
        stray: Tensors in a `consolidated.safetensors`, which transformers does not load.
        slow_tokenizer: Whether there are also `vocab.json` and `merges.txt`.
    """

    config: Mapping
    shapes: Callable[[Mapping], dict[str, Shape]]
    dtype: str = "bfloat16"
    float32: tuple[str, ...] = ()
    files: int = 1
    generation: Mapping | None = None
    leftovers: Mapping[str, str] = field(default_factory=dict)
    stray: Mapping[str, Shape] = field(default_factory=dict)
    slow_tokenizer: bool = False


def make(
    arch: str,
    folder: Path,
    *,
    seed: int = 0,
    form: str = "safetensors",
    files: int | None = None,
    **config: object,
) -> Path:
    """Write the checkpoint of an architecture into a folder, and return the folder.

    Args:
        arch: One of `ARCHITECTURES`.
        folder: Made, with its parents. Files of the same names in it are overwritten.
        seed: Another seed, other weights.
        form: "safetensors", or "bin" for the same tensors as `pytorch_model.bin`, in which a tied
            head is an alias of the embedding, as `torch.save` of a state dict leaves it.
        files: How many weight files, if not as many as the architecture has by default.
        config: Keys of `config.json` laid over the architecture's, such as another size.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r}: one of {', '.join(FORMS)}")
    architecture = replace(_ARCHITECTURES[arch], config={**_ARCHITECTURES[arch].config, **config})
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, shape in architecture.shapes(architecture.config).items():
        dtype = "float32" if name.endswith(architecture.float32) else architecture.dtype
        arrays[name] = random_array(name, shape, seed=seed, dtype=dtype)
    if form == "bin":
        if architecture.config.get("tie_word_embeddings", False):
            arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
        _write_bin(folder, arrays, files or architecture.files)
    else:
        _write_safetensors(folder, arrays, files or architecture.files)
    if architecture.stray:
        stray = {
            name: random_array(name, shape, seed=seed) for name, shape in architecture.stray.items()
        }
        mx.save_safetensors(str(folder / "consolidated.safetensors"), stray)
    _write_json(folder / "config.json", architecture.config)
    if architecture.generation is not None:
        _write_json(folder / "generation_config.json", architecture.generation)
    for name, text in architecture.leftovers.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_tokenizer(folder, slow=architecture.slow_tokenizer)
    return folder


def random_array(name: str, shape: Shape, *, seed: int = 0, dtype: str = "bfloat16") -> mx.array:
    """The tensor of this name: norms near 1, all else near 0, as spread as in a trained model."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
    if name.endswith("norm.weight"):
        values += np.float32(1)
    return mx.array(values).astype(getattr(mx, dtype))


def write_tokenizer(folder: Path, *, slow: bool = False) -> None:
    """Write a byte-level BPE tokenizer of a few merges; `slow`: in the older files as well."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("e", "r"), ("l", "a"), ("la", "y")]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in merges)]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    if slow:
        model.save(str(folder))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special)
    template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    _write_json(folder / "tokenizer_config.json", special | settings | {"chat_template": template})


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parts(names: list[str], files: int) -> list[list[str]]:
    """The names in `files` runs of about the same length."""
    bounds = [round(i * len(names) / files) for i in range(files + 1)]
    return [names[a:b] for a, b in itertools.pairwise(bounds)]


def _write_parts(
    folder: Path,
    arrays: dict[str, mx.array],
    files: int,
    *,
    stem: str,
    suffix: str,
    save: Callable[[Path, dict[str, mx.array]], None],
) -> None:
    """Write arrays as STEM.SUFFIX, or as numbered files and an index."""
    if files == 1:
        save(folder / f"{stem}.{suffix}", arrays)
        return
    weight_map = {}
    for i, names in enumerate(_parts(list(arrays), files), start=1):
        file = f"{stem}-{i:05d}-of-{files:05d}.{suffix}"
        save(folder / file, {name: arrays[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    total_size = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / f"{stem}.{suffix}.index.json", index)


def _write_safetensors(folder: Path, arrays: dict[str, mx.array], files: int) -> None:
    def save(path: Path, part: dict[str, mx.array]) -> None:
        mx.save_safetensors(str(path), part, metadata={"format": "pt"})

    _write_parts(folder, arrays, files, stem="model", suffix="safetensors", save=save)


def _write_bin(folder: Path, arrays: dict[str, mx.array], files: int) -> None:
    import torch

    def tensor(array: mx.array) -> torch.Tensor:
        dtype = getattr(torch, str(array.dtype).removeprefix("mlx.core."))
        return torch.from_numpy(np.array(array.view(mx.uint8))).view(dtype)

    def save(path: Path, part: dict[str, mx.array]) -> None:
        tensors = {id(array): tensor(array) for array in part.values()}  # an alias stays one
        torch.save({name: tensors[id(array)] for name, array in part.items()}, path)

    _write_parts(folder, arrays, files, stem="pytorch_model", suffix="bin", save=save)


# The shapes. Linear weights are (outputs, inputs).


def _attention(
    c: Mapping, prefix: str, *, bias: bool = False, output_bias: bool = False
) -> dict[str, Shape]:
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    width = c["hidden_size"]
    shapes: dict[str, Shape] = {}
    for name, rows in (
        ("q", heads * head_dim),
        ("k", kv_heads * head_dim),
        ("v", kv_heads * head_dim),
    ):
        shapes[f"{prefix}.{name}_proj.weight"] = (rows, width)
        if bias:
            shapes[f"{prefix}.{name}_proj.bias"] = (rows,)
    shapes[f"{prefix}.o_proj.weight"] = (width, heads * head_dim)
    if output_bias:
        shapes[f"{prefix}.o_proj.bias"] = (width,)
    return shapes


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def _gated(prefix: str, width: int, hidden: int, *, names=GATE_UP_DOWN) -> dict[str, Shape]:
    """A gated MLP, or one expert, under the names its author gave it."""
    gate, up, down = names
    return {
        f"{prefix}.{gate}.weight": (hidden, width),
        f"{prefix}.{up}.weight": (hidden, width),
        f"{prefix}.{down}.weight": (width, hidden),
    }


def _experts(
    prefix: str, count: int, width: int, hidden: int, *, names=GATE_UP_DOWN
) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for i in range(count):
        shapes |= _gated(f"{prefix}.experts.{i}", width, hidden, names=names)
    return shapes


def _norms(prefix: str, width: int, *names: str) -> dict[str, Shape]:
    return {f"{prefix}.{name}.weight": (width,) for name in names}


def _decoder(
    c: Mapping,
    layer: Callable[[str, int], dict[str, Shape]],
    *,
    head: bool,
    norm_bias: bool = False,
) -> dict[str, Shape]:
    """A decoder: embedding, the layers, the final norm and, if it is not tied, the head."""
    width, vocabulary = c["hidden_size"], c["vocab_size"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(c["num_hidden_layers"]):
        shapes |= layer(f"model.layers.{i}", i)
    shapes["model.norm.weight"] = (width,)
    if norm_bias:
        shapes["model.norm.bias"] = (width,)
    if head:
        shapes["lm_head.weight"] = (vocabulary, width)
    return shapes


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _llama(
    c: Mapping,
    *,
    inv_freq: bool = False,
    bias: bool = False,
    head_norms: bool = False,
    norms: tuple[str, ...] = PRE_NORMS,
) -> dict[str, Shape]:
    """Llama and its kin: Qwen2 with biases, Qwen3 with norms on heads, Gemma with more norms."""
    width = c["hidden_size"]

    def layer(prefix: str, _: int) -> dict[str, Shape]:
        shapes = _attention(c, f"{prefix}.self_attn", bias=bias)
        if inv_freq:
            head_dim = c.get("head_dim") or width // c["num_attention_heads"]
            shapes[f"{prefix}.self_attn.rotary_emb.inv_freq"] = (head_dim // 2,)
        if head_norms:
            shapes |= _norms(f"{prefix}.self_attn", c["head_dim"], "q_norm", "k_norm")
        shapes |= _gated(f"{prefix}.mlp", width, c["intermediate_size"])
        return shapes | _norms(prefix, width, *norms)

    return _decoder(c, layer, head=not c.get("tie_word_embeddings", False))


def _qwen3_moe(c: Mapping) -> dict[str, Shape]:
    width, experts = c["hidden_size"], c["num_experts"]

    def layer(prefix: str, i: int) -> dict[str, Shape]:
        shapes = _attention(c, f"{prefix}.self_attn")
        shapes |= _norms(f"{prefix}.self_attn", c["head_dim"], "q_norm", "k_norm")
        if i in c["mlp_only_layers"]:
            shapes |= _gated(f"{prefix}.mlp", width, c["intermediate_size"])
        else:
            shapes[f"{prefix}.mlp.gate.weight"] = (experts, width)
            shapes |= _experts(f"{prefix}.mlp", experts, width, c["moe_intermediate_size"])
        return shapes | _norms(prefix, width, *PRE_NORMS)

    return _decoder(c, layer, head=True)


def _mixtral(c: Mapping) -> dict[str, Shape]:
    width, experts = c["hidden_size"], c["num_local_experts"]

    def layer(prefix: str, _: int) -> dict[str, Shape]:
        moe = f"{prefix}.block_sparse_moe"
        shapes = _attention(c, f"{prefix}.self_attn") | {f"{moe}.gate.weight": (experts, width)}
        shapes |= _experts(moe, experts, width, c["intermediate_size"], names=("w1", "w3", "w2"))
        return shapes | _norms(prefix, width, *PRE_NORMS)

    return _decoder(c, layer, head=True)


def _gemma3(c: Mapping) -> dict[str, Shape]:
    """The multimodal Gemma 3: a language model, a vision tower and a projector between them."""
    text, vision = dict(c["text_config"]), c["vision_config"]
    text |= {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    language = _llama(text, head_norms=True, norms=GEMMA_NORMS)
    shapes = {f"language_model.{name}": shape for name, shape in language.items()}
    width, patch = vision["hidden_size"], vision["patch_size"]
    tower = "vision_tower.vision_model"
    shapes[f"{tower}.embeddings.patch_embedding.weight"] = (width, 3, patch, patch)
    shapes[f"{tower}.embeddings.patch_embedding.bias"] = (width,)
    patches = (vision["image_size"] // patch) ** 2
    shapes[f"{tower}.embeddings.position_embedding.weight"] = (patches, width)
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for name in "q_proj", "k_proj", "v_proj", "out_proj":
            shapes |= _linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}.mlp.fc1", vision["intermediate_size"], width)
        shapes |= _linear(f"{layer}.mlp.fc2", width, vision["intermediate_size"])
        shapes |= _layer_norm(f"{layer}.layer_norm1", width) | _layer_norm(
            f"{layer}.layer_norm2", width
        )
    shapes |= _layer_norm(f"{tower}.post_layernorm", width)
    shapes["multi_modal_projector.mm_input_projection_weight"] = (width, text["hidden_size"])
    return shapes | _norms("multi_modal_projector", width, "mm_soft_emb_norm")


def _linear(prefix: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{prefix}.weight": (outputs, inputs), f"{prefix}.bias": (outputs,)}


def _layer_norm(prefix: str, width: int) -> dict[str, Shape]:
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}


def _phi3(c: Mapping) -> dict[str, Shape]:
    width, hidden = c["hidden_size"], c["intermediate_size"]
    kv_rows = c["num_key_value_heads"] * width // c["num_attention_heads"]

    def layer(prefix: str, _: int) -> dict[str, Shape]:
        return {
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.self_attn.qkv_proj.weight": (width + 2 * kv_rows, width),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * hidden, width),
            f"{prefix}.mlp.down_proj.weight": (width, hidden),
        } | _norms(prefix, width, *PRE_NORMS)

    return _decoder(c, layer, head=True)


def _olmo2(c: Mapping) -> dict[str, Shape]:
    width = c["hidden_size"]
    head_dim = width // c["num_attention_heads"]

    def layer(prefix: str, _: int) -> dict[str, Shape]:
        shapes = _attention(c, f"{prefix}.self_attn")
        shapes |= _norms(f"{prefix}.self_attn", c["num_attention_heads"] * head_dim, "q_norm")
        shapes |= _norms(f"{prefix}.self_attn", c["num_key_value_heads"] * head_dim, "k_norm")
        shapes |= _gated(f"{prefix}.mlp", width, c["intermediate_size"])
        norms = "post_attention_layernorm", "post_feedforward_layernorm"
        return shapes | _norms(prefix, width, *norms)

    return _decoder(c, layer, head=True)


def _cohere(c: Mapping) -> dict[str, Shape]:
    width, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]

    def layer(prefix: str, _: int) -> dict[str, Shape]:
        shapes = _attention(c, f"{prefix}.self_attn")
        shapes[f"{prefix}.self_attn.q_norm.weight"] = (heads, width // heads)
        shapes[f"{prefix}.self_attn.k_norm.weight"] = (kv_heads, width // heads)
        shapes |= _gated(f"{prefix}.mlp", width, c["intermediate_size"])
        return shapes | _norms(prefix, width, "input_layernorm")

    return _decoder(c, layer, head=False)


def _starcoder2(c: Mapping) -> dict[str, Shape]:
    width, hidden = c["hidden_size"], c["intermediate_size"]

    def layer(prefix: str, _: int) -> dict[str, Shape]:
        shapes = _attention(c, f"{prefix}.self_attn", bias=True, output_bias=True)
        shapes |= _linear(f"{prefix}.mlp.c_fc", hidden, width)
        shapes |= _linear(f"{prefix}.mlp.c_proj", width, hidden)
        for name in PRE_NORMS:
            shapes |= _layer_norm(f"{prefix}.{name}", width)
        return shapes

    return _decoder(c, layer, head=False, norm_bias=True)


def _deepseek_v3(c: Mapping) -> dict[str, Shape]:
    """Latent attention and experts; and layer 61, which DeepSeek predicts one token more with."""
    width, heads, experts = c["hidden_size"], c["num_attention_heads"], c["n_routed_experts"]
    q_rank, kv_rank, rope = c["q_lora_rank"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, hidden = c["qk_nope_head_dim"], c["moe_intermediate_size"]

    def layer(prefix: str, i: int) -> dict[str, Shape]:
        attention = f"{prefix}.self_attn"
        shapes: dict[str, Shape] = {
            f"{attention}.q_a_proj.weight": (q_rank, width),
            f"{attention}.q_a_layernorm.weight": (q_rank,),
            f"{attention}.q_b_proj.weight": (heads * (nope + rope), q_rank),
            f"{attention}.kv_a_proj_with_mqa.weight": (kv_rank + rope, width),
            f"{attention}.kv_a_layernorm.weight": (kv_rank,),
            f"{attention}.kv_b_proj.weight": (heads * (nope + c["v_head_dim"]), kv_rank),
            f"{attention}.o_proj.weight": (width, heads * c["v_head_dim"]),
        }
        if i < c["first_k_dense_replace"]:
            shapes |= _gated(f"{prefix}.mlp", width, c["intermediate_size"])
        else:
            shapes[f"{prefix}.mlp.gate.weight"] = (experts, width)
            shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (experts,)
            shapes |= _experts(f"{prefix}.mlp", experts, width, hidden)
            shared = hidden * c["n_shared_experts"]
            shapes |= _gated(f"{prefix}.mlp.shared_experts", width, shared)
        return shapes | _norms(prefix, width, *PRE_NORMS)

    shapes = _decoder(c, layer, head=True)
    shapes |= _norms("model.layers.61", width, "enorm", "hnorm")
    return shapes | {"model.layers.61.eh_proj.weight": (width, 2 * width)}


# The configs.

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def _config(architecture: str, model_type: str, *, drop: tuple[str, ...] = (), **changes) -> dict:
    """Llama's config with these keys laid over it, less those in `drop`."""
    config = _LLAMA | {"architectures": [architecture], "model_type": model_type} | changes
    return {key: value for key, value in config.items() if key not in drop}


# Other end tokens than config.json names: mlx-lm writes these into its config.json.
_EOS = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6}

_ARCHITECTURES = {
    # Old Llamas carry inv_freq.
    "llama": Architecture(
        config=_LLAMA | {"_name_or_path": "someone/llama", "transformers_version": "4.38.0"},
        shapes=lambda c: _llama(c, inv_freq=True),
        float32=("inv_freq",),
        files=3,
        generation=_EOS,
    ),
    "llama-tied": Architecture(
        config=_LLAMA
        | {
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 256,
                "rope_type": "llama3",
            },
            "torch_dtype": "float16",
        },
        shapes=_llama,
        dtype="float16",
        generation={"bos_token_id": 1, "eos_token_id": 2},
        leftovers={"chat_template.jinja": "{{ messages[0]['content'] }}</s>"},
    ),
    # No group size divides 80: only o_proj (128 inputs) and down_proj (192) are quantized. And a
    # float that JSON cannot say, as transformers writes it.
    "llama-odd": Architecture(
        config=_LLAMA
        | {
            "hidden_size": 80,
            "head_dim": 32,
            "num_hidden_layers": 2,
            "torch_dtype": "float32",
            "time_step_limit": [0.0, {"__float__": "Infinity"}],
        },
        shapes=_llama,
        dtype="float32",
        files=2,
    ),
    "qwen2": Architecture(
        config=_config(
            "Qwen2ForCausalLM",
            "qwen2",
            num_hidden_layers=3,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
            sliding_window=512,
            use_sliding_window=False,
            drop=("attention_bias",),
        ),
        shapes=lambda c: _llama(c, bias=True),
        generation=_EOS,
        slow_tokenizer=True,
    ),
    # Says `dtype`, as transformers 5 does, not `torch_dtype`: mlx-lm casts nothing, so that the
    # norms stay float32.
    "qwen3": Architecture(
        config=_config(
            "Qwen3ForCausalLM",
            "qwen3",
            num_hidden_layers=4,
            head_dim=64,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
            dtype="bfloat16",
            drop=("torch_dtype",),
        ),
        shapes=lambda c: _llama(c, head_norms=True),
        float32=("norm.weight",),
        generation=_EOS,
    ),
    "qwen3-moe": Architecture(
        config=_config(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            num_hidden_layers=3,
            head_dim=64,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
            norm_topk_prob=True,
            rope_theta=1000000.0,
        ),
        shapes=_qwen3_moe,
        files=2,
        generation=_EOS,
    ),
    # Mistral ships its own format in the same folder.
    "mixtral": Architecture(
        config=_config(
            "MixtralForCausalLM",
            "mixtral",
            num_hidden_layers=2,
            intermediate_size=128,
            num_local_experts=3,
            num_experts_per_tok=2,
            rope_theta=1000000.0,
            sliding_window=None,
            drop=("attention_bias", "rope_scaling"),
        ),
        shapes=_mixtral,
        files=2,
        generation={"bos_token_id": 1, "eos_token_id": 2},
        stray={
            "tok_embeddings.weight": (VOCABULARY, 128),
            "layers.0.attention.wq.weight": (128, 128),
        },
    ),
    # Weights and `torch_dtype` float32, as the 27B was first shipped.
    "gemma2": Architecture(
        config=_config(
            "Gemma2ForCausalLM",
            "gemma2",
            num_hidden_layers=3,
            head_dim=64,
            query_pre_attn_scalar=64,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=128,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            torch_dtype="float32",
            drop=("rope_scaling",),
        ),
        shapes=lambda c: _llama(c, norms=GEMMA_NORMS),
        dtype="float32",
        generation={"eos_token_id": [2, 3]},
    ),
    # No tie_word_embeddings in config.json: that there is no head in the files says it.
    "gemma3-text": Architecture(
        config=_config(
            "Gemma3ForCausalLM",
            "gemma3_text",
            num_hidden_layers=7,
            head_dim=64,
            query_pre_attn_scalar=64,
            sliding_window=128,
            sliding_window_pattern=6,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            hidden_activation="gelu_pytorch_tanh",
            drop=("hidden_act", "tie_word_embeddings"),
        ),
        shapes=lambda c: _llama(
            {**c, "tie_word_embeddings": True}, head_norms=True, norms=GEMMA_NORMS
        ),
        generation={"eos_token_id": [2, 3], "cache_implementation": "hybrid"},
    ),
    # mlx-lm drops the vision weights, and writes the head counts it takes for granted into
    # text_config. The dtype is said in text_config alone, and some tensors do not have it.
    "gemma3": Architecture(
        config={
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "vocab_size": VOCABULARY,
            "eos_token_id": [2, 3],
            "image_token_index": 3,
            "mm_tokens_per_image": 4,
            "text_config": {
                "model_type": "gemma3_text",
                "vocab_size": VOCABULARY,
                "hidden_size": 128,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "head_dim": 32,
                "query_pre_attn_scalar": 32,
                "sliding_window": 128,
                "sliding_window_pattern": 2,
                "rope_theta": 1000000.0,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "dtype": "bfloat16",
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        shapes=_gemma3,
        float32=("norm.weight",),
        generation={"eos_token_id": [2, 3]},
        leftovers={
            "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}\n'
        },
    ),
    "phi3": Architecture(
        config=_config(
            "Phi3ForCausalLM",
            "phi3",
            num_hidden_layers=3,
            num_key_value_heads=4,
            original_max_position_embeddings=256,
            rope_scaling={
                "type": "longrope",
                "long_factor": [1.5] * 16,
                "short_factor": [1.0] * 16,
            },
            pad_token_id=0,
        ),
        shapes=_phi3,
        generation=_EOS,
        leftovers={
            "configuration_phi3.py": '"""Code that the author ships with the checkpoint."""\n'
        },
    ),
    "olmo2": Architecture(
        config=_config(
            "Olmo2ForCausalLM",
            "olmo2",
            num_hidden_layers=3,
            rope_theta=500000.0,
            torch_dtype="float32",
        ),
        shapes=_olmo2,
        dtype="float32",
    ),
    "cohere": Architecture(
        config=_config(
            "CohereForCausalLM",
            "cohere",
            num_hidden_layers=3,
            use_qk_norm=True,
            layer_norm_eps=1e-5,
            logit_scale=0.0625,
            tie_word_embeddings=True,
            torch_dtype="float16",
            drop=("rms_norm_eps",),
        ),
        shapes=_cohere,
        dtype="float16",
    ),
    "granite": Architecture(
        config=_config(
            "GraniteForCausalLM",
            "granite",
            num_hidden_layers=3,
            logits_scaling=8.0,
            attention_multiplier=0.0625,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            mlp_bias=False,
        ),
        shapes=_llama,
        generation={"bos_token_id": 1, "eos_token_id": 2},
    ),
    # float32 weights that config.json says to be bfloat16: mlx-lm casts them.
    "starcoder2": Architecture(
        config=_config(
            "Starcoder2ForCausalLM",
            "starcoder2",
            num_hidden_layers=3,
            norm_epsilon=1e-5,
            use_bias=True,
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            sliding_window=512,
            drop=("rms_norm_eps", "attention_bias", "rope_scaling"),
        ),
        shapes=_starcoder2,
        dtype="float32",
    ),
    # mlx-lm stacks the experts, splits kv_b_proj, drops layer 61, and never casts
    # e_score_correction_bias.
    "deepseek-v3": Architecture(
        config=_config(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            num_hidden_layers=3,
            num_key_value_heads=4,
            moe_intermediate_size=64,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            first_k_dense_replace=1,
            moe_layer_freq=1,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            num_nextn_predict_layers=1,
        ),
        shapes=_deepseek_v3,
        float32=("e_score_correction_bias",),
        files=3,
        generation=_EOS,
    ),
}

ARCHITECTURES = tuple(_ARCHITECTURES)

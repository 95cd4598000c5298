"""Builds of Meta checkpoints against a plain oracle: whole tensors, known before they are split.

For layout `mlx-lm` the oracle writes the checkpoint's Hugging Face twin, rows permuted by an index
worked out here, and `mlx_lm.convert` converts that. For `mlx-examples` it is what convert.py should
make of the whole tensors. That either speaks as Meta's model would is shown by its logits, against
Meta's own arithmetic in numpy (rotary pairs side by side), not by comparing one permutation with
another.
"""

import functools
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import torch

from support import meta, mlx_examples, peer
from support.checkpoints import write_tokenizer
from support.differences import json_differences, raw_bytes, read_json, weight_differences
from support.front_door import doit

TOLERANCE = 1e-4  # of logits of some 1, in float32
TOKENS = np.random.default_rng(0).integers(0, meta.VOCABULARY, 96).tolist()


@dataclass(frozen=True)
class Setting:
    """One way to build a model, as `models.toml` spells it.

    Attributes:
        toml: The target's keys, without source and layout.
        convert: The same for `mlx_lm.convert`, and for mx.quantize in layout mlx-examples.
        dtype: What the tensors are cast to; None: the layout's default.
        quantize: mx.quantize's arguments.
    """

    toml: str = ""
    dtype: str | None = None
    quantize: Mapping = field(default_factory=dict)

    @property
    def convert(self) -> dict:
        """The arguments of `mlx_lm.convert`."""
        told = {f"q_{key}": value for key, value in self.quantize.items()}
        told |= {"dtype": self.dtype} if self.dtype else {}
        return told | ({"quantize": True} if self.quantize else {})


SETTINGS = {
    "plain": Setting(),
    "float16": Setting('dtype = "float16"', "float16"),
    "4bit": Setting("quantize = { bits = 4 }", None, {"bits": 4, "group_size": 64}),
    "8bit": Setting(
        "quantize = { bits = 8, group_size = 32 }", None, {"bits": 8, "group_size": 32}
    ),
    "mxfp4": Setting(
        'quantize = { mode = "mxfp4" }', None, {"mode": "mxfp4", "bits": 4, "group_size": 32}
    ),
    "float32": Setting('dtype = "float32"', "float32"),
    "float32-4bit": Setting(
        'dtype = "float32"\nquantize = { bits = 4 }', "float32", {"bits": 4, "group_size": 64}
    ),
    "bfloat16": Setting('dtype = "bfloat16"', "bfloat16"),
    "small-shards": Setting('max_shard_size = "100kB"'),
}
LAYOUTS = {
    "mlx-lm": ("plain", "float16", "4bit", "8bit", "mxfp4"),
    "mlx-examples": ("plain", "float16", "4bit", "8bit"),
}
# Release, shards, how they are saved.
SPLIT = {
    f"{split}-in-{shards}": (split + ("-threefold" if shards == 3 else ""), shards, "plain")
    for split in ("llama-2", "llama-3")
    for shards in (1, 2, 3, 4, 8)
}
OTHERS = {
    "llama-1": ("llama-1", 2, "plain"),
    "llama-1-7b": ("llama-1-7b", 1, "plain"),
    "llama-2-views": ("llama-2", 2, "views"),
    "llama-2-float32": ("llama-2-float32", 4, "plain"),
    "code-llama": ("code-llama", 2, "legacy"),
    "llama-3.1": ("llama-3.1", 2, "plain"),
    "llama-3.2": ("llama-3.2", 1, "plain"),
    "llama-3.2-alias": ("llama-3.2-alias", 1, "plain"),
}
LARGE = {"llama-2-large": ("llama-2-large", 3, "plain")}
CHECKPOINTS = SPLIT | OTHERS | LARGE
# Hugging Face folders for layout mlx-examples.
TWINS_FOR_EXAMPLES = ("llama-2", "code-llama", "llama-3-tied")
# Releases whose twin transformers 5 saves.
TRANSFORMERS_5 = ("llama-3", "llama-3.1", "llama-3.2")
SCALED = ("llama-3.1", "llama-3.2", "llama-3.2-alias")  # not for mlx-examples, which cannot


@dataclass(frozen=True)
class Case:
    """One target."""

    checkpoint: str
    layout: str
    setting: str

    @property
    def target(self) -> str:
        return f"{self.checkpoint}.{self.layout}.{self.setting}"

    @property
    def release(self) -> str:
        return CHECKPOINTS[self.checkpoint][0]

    @property
    def reference(self) -> str:
        return f"{self.release}.{self.setting}"


CASES = (
    *(Case(c, layout, s) for layout, settings in LAYOUTS.items() for c in SPLIT for s in settings),
    *(Case(c, "mlx-lm", s) for c in OTHERS for s in ("plain", "4bit", "float32")),
    *(
        Case(c, "mlx-examples", s)
        for c in OTHERS
        if c not in SCALED
        for s in ("plain", "4bit", "float32")
    ),
    *(Case("llama-2-in-2", layout, "small-shards") for layout in LAYOUTS),
    *(Case(c, layout, s) for layout in LAYOUTS for c in LARGE for s in ("plain", "4bit")),
    *(Case("llama-2-in-4", "mlx-examples", s) for s in ("bfloat16", "float32-4bit")),
    *(Case(c, layout, "float32") for layout in LAYOUTS for c in ("llama-2-in-3", "llama-3-in-4")),
)


def each(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.target)


def of(layout: str, *settings: str) -> tuple[Case, ...]:
    return tuple(
        case
        for case in CASES
        if case.layout == layout and (not settings or case.setting in settings)
    )


# The oracle.


def twin_name(name: str) -> str:
    """A tensor's name in transformers' Llama."""
    if name.startswith("layers."):
        _, layer, part, *module, _ = name.split(".")
        modules = {
            "wq": "self_attn.q_proj",
            "wk": "self_attn.k_proj",
            "wv": "self_attn.v_proj",
            "wo": "self_attn.o_proj",
            "w1": "mlp.gate_proj",
            "w2": "mlp.down_proj",
            "w3": "mlp.up_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }
        return f"model.layers.{layer}.{modules[module[0] if module else part]}.weight"
    return {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }[name]


def twin_weights(name: str) -> dict[str, mx.array]:
    """A release's tensors as transformers' Llama has them.

    It rotates the first half of a head's rows against the second, Meta each even row against the
    odd one after it. So the even rows go first, then the odd ones.
    """
    release = meta.RELEASES[name]
    found = {}
    for tensor, array in meta.wholes(name).items():
        heads = {"wq": release.heads, "wk": release.kv_heads}.get(tensor.split(".")[-2])
        if heads:
            size = array.shape[0] // heads
            rows = [
                head * size + row
                for head in range(heads)
                for row in (*range(0, size, 2), *range(1, size, 2))
            ]
            array = array[mx.array(rows)]
        found[twin_name(tensor)] = array
    return found


def twin_config(name: str) -> dict:
    """A release's config.json, as Meta's folders on the hub have it."""
    release = meta.RELEASES[name]
    params = release.params
    told = {
        # bos, eos; context
        "sentencepiece": (1, 2),
        "tiktoken": (272, [272 + 1, 272 + 9]),
    }[release.tokenizer]
    scaling = None
    if params.get("use_scaled_rope"):
        told = (272, [272 + 1, 272 + 8, 272 + 9])
        scaling = {
            "factor": 8.0 if name == "llama-3.1" else 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    context = {
        "llama-1": 2048,
        "llama-2": 4096,
        "code-ll": 16384,
        "llama-3": 131072 if scaling else 8192,
    }[name[:7]]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": told[0],
        "eos_token_id": told[1],
        "head_dim": params["dim"] // params["n_heads"],
        "hidden_act": "silu",
        "hidden_size": params["dim"],
        "intermediate_size": release.hidden,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": release.heads,
        "num_hidden_layers": release.layers,
        "num_key_value_heads": release.kv_heads,
        "rms_norm_eps": params["norm_eps"],
        "rope_scaling": scaling,
        "rope_theta": params.get("rope_theta", 10000.0),
        "tie_word_embeddings": release.head != "own",
        "torch_dtype": release.dtype,
        "vocab_size": meta.VOCABULARY,
    }


def write_twin(name: str, folder: Path) -> None:
    """Write a release as a Hugging Face folder, with both kinds of tokenizer file."""
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), twin_weights(name), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(twin_config(name)), encoding="utf-8")
    write_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(meta.tokenizer_model("sentencepiece"))


def save_again(twin: Path, folder: Path) -> None:
    """Load a Hugging Face folder with transformers, and save it as a fine-tuning script does."""
    from transformers import LlamaForCausalLM  # which takes as long as all the other imports

    LlamaForCausalLM.from_pretrained(twin, dtype=torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    shutil.copy(twin / "tokenizer.model", folder)


@functools.cache
def examples_weights(release: str, setting_name: str) -> dict[str, mx.array]:
    """What convert.py should write: tensors cast, and quantized if they are matrices."""
    setting = SETTINGS[setting_name]
    weights = {}
    for name, array in meta.wholes(release).items():
        array = array.astype(getattr(mx, setting.dtype or "float16"))
        if setting.quantize and array.ndim == 2:
            parts = mx.quantize(array, **setting.quantize)
            path = name.removesuffix("weight")
            weights |= {
                path + kind: part
                for kind, part in zip(("weight", "scales", "biases"), parts, strict=True)
            }
        else:
            weights[name] = array
    return weights


def meta_logits(release: meta.Release, weights: Mapping[str, mx.array]) -> np.ndarray:
    """The logits (length, vocabulary) that Meta's model code gives to TOKENS, in float64.

    A head's rows 2i and 2i + 1 are the real and the imaginary part of a number that the position
    turns (https://github.com/meta-llama/llama, model.py).
    """
    w = {name: np.array(array.astype(mx.float32), np.float64) for name, array in weights.items()}
    dim, heads, kv_heads = release.params["dim"], release.heads, release.kv_heads
    size, length = dim // heads, len(TOKENS)
    turn = np.exp(1j * np.outer(np.arange(length), frequencies(release)))[:, None, :]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean + release.params["norm_eps"]) * w[f"{name}.weight"]

    def rotate(x: np.ndarray) -> np.ndarray:  # length, heads, size
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def attention(x: np.ndarray, path: str) -> np.ndarray:
        q, k, v = (
            (x @ w[f"{path}.{name}.weight"].T).reshape(length, count, size)
            for name, count in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
        )
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(each_, heads // kv_heads, axis=1) for each_ in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        scores += np.triu(np.full((length, length), -np.inf), 1)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", scores, v).reshape(length, dim) @ w[f"{path}.wo.weight"].T

    def feed_forward(x: np.ndarray, path: str) -> np.ndarray:
        gate = x @ w[f"{path}.w1.weight"].T
        return (gate / (1 + np.exp(-gate)) * (x @ w[f"{path}.w3.weight"].T)) @ w[
            f"{path}.w2.weight"
        ].T

    x = w["tok_embeddings.weight"][TOKENS]
    for layer in range(release.layers):
        path = f"layers.{layer}"
        x = x + attention(norm(x, f"{path}.attention_norm"), f"{path}.attention")
        x = x + feed_forward(norm(x, f"{path}.ffn_norm"), f"{path}.feed_forward")
    head = w.get("output.weight", w["tok_embeddings.weight"])
    return norm(x, "norm") @ head.T


def frequencies(release: meta.Release) -> np.ndarray:
    """The turns per position, radians, of a head's pairs."""
    size = release.params["dim"] // release.heads
    theta = release.params.get("rope_theta", 10000.0)
    found = theta ** -(np.arange(0, size, 2) / size)
    if release.params.get("use_scaled_rope"):  # llama-models, apply_scaling
        factor = release.params.get("rope_scaling_factor", 32)
        turns = 8192 * found / (2 * math.pi)  # within the context that it was trained with
        smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
        found = found * (smooth + (1 - smooth) / factor)
    return found


@functools.cache
def logits_of(name: str) -> np.ndarray:
    """What a release's model says to TOKENS."""
    return meta_logits(meta.RELEASES[name], meta.wholes(name))


def differ(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference between two models' logits."""
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


@functools.cache
def mlx_lm_logits(build: Path) -> np.ndarray:
    """What a built folder says to TOKENS, loaded as a user loads it: (length, vocabulary)."""
    model, _ = mlx_lm.utils.load(str(build))
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


@functools.cache
def mlx_examples_logits(build: Path) -> np.ndarray:
    model = mlx_examples.load(build)
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


@functools.cache
def torch_logits(folder: Path) -> np.ndarray:
    """What transformers says to TOKENS, in float32."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def same(ours: Mapping[str, mx.array], theirs: Mapping[str, mx.array]) -> bool:
    """Whether names, dtypes, shapes and bytes are equal."""
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert raw_bytes(ours[name]) == raw_bytes(array), name
    return True


def names(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


# The builds.


@dataclass(frozen=True)
class Builds:
    """What both made of the cases.

    Attributes:
        folder: Has `build`, `twins`, and `saved` by transformers 5.
        said: What doit printed.
    """

    folder: Path
    said: str

    def __getitem__(self, case: Case) -> Path:
        return self.folder / "build" / case.target

    def twin(self, release: str) -> Path:
        return self.folder / "twins" / release


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    """All cases, built by one call of doit, and what the peer makes of the twins."""
    folder = tmp_path_factory.mktemp("meta")
    lines = []
    for checkpoint, (release, shards, saved) in CHECKPOINTS.items():
        meta.make(release, folder / "checkpoints" / checkpoint, shards=shards, saved=saved)
        if not (folder / "twins" / release).exists():
            write_twin(release, folder / "twins" / release)
    write_twin("llama-3-tied", folder / "twins" / "llama-3-tied")
    for case in CASES:
        lines += [
            f'[models."{case.target}"]',
            f'source = "checkpoints/{case.checkpoint}"',
            f'layout = "{case.layout}"',
            SETTINGS[case.setting].toml,
        ]
    for name in TWINS_FOR_EXAMPLES:
        lines += [f'[models."{name}.twin"]', f'source = "twins/{name}"']
        lines += ['layout = "mlx-examples"', 'dtype = "float32"']
    for name in TRANSFORMERS_5:
        save_again(folder / "twins" / name, folder / "saved" / name)
        lines += [f'[models."{name}.saved"]', f'source = "saved/{name}"']
    lines += ['[models."llama-3.saved".variants.mlx-examples]', 'layout = "mlx-examples"']
    lines += ['dtype = "float32"']
    (folder / "models.toml").write_text("\n".join(lines), encoding="utf-8")
    return Builds(folder, doit(folder).stdout)


@pytest.fixture(scope="module")
def references(builds: Builds) -> Path:
    """What `mlx_lm.convert` makes of the twins: a folder for each release and setting."""
    folder = builds.folder / "references"
    folder.mkdir()
    for case in of("mlx-lm"):
        if case.setting != "small-shards" and not (folder / case.reference).exists():
            settings = SETTINGS[case.setting].convert
            peer.convert(builds.twin(case.release), folder / case.reference, **settings)
    return folder


# Layout mlx-lm.


@each(tuple(case for case in of("mlx-lm") if case.setting != "small-shards"))
def test_mlx_lm_build_is_what_mlx_lm_makes_of_the_twin(
    builds: Builds, references: Path, case: Case
) -> None:
    build, reference = builds[case], references / case.reference
    found = list(weight_differences(build, reference))
    for name in "config.json", "model.safetensors.index.json":
        found += json_differences(f"{name}: ", read_json(build / name), read_json(reference / name))
    assert found == []
    assert names(build, "*.safetensors") == names(reference, "*.safetensors")


@each(of("mlx-lm", "float32"))
def test_mlx_lm_build_speaks_as_metas_model_does(builds: Builds, case: Case) -> None:
    logits = mlx_lm_logits(builds[case])
    assert differ(logits, logits_of(case.release)) < TOLERANCE


@each(of("mlx-lm", "float32"))
def test_mlx_lm_build_speaks_as_transformers_does(builds: Builds, case: Case) -> None:
    logits = mlx_lm_logits(builds[case])
    assert differ(logits, torch_logits(builds.twin(case.release))) < TOLERANCE


@each((Case("llama-2-in-8", "mlx-lm", "mxfp4"), Case("llama-3.1", "mlx-lm", "4bit")))
def test_quantized_mlx_lm_build_loads_and_speaks_as_the_twins(
    builds: Builds, references: Path, case: Case
) -> None:
    ours = mlx_lm_logits(builds[case])
    assert np.array_equal(ours, mlx_lm_logits(references / case.reference))
    assert np.isfinite(ours).all()


def test_mlx_lm_build_in_several_files(builds: Builds) -> None:
    build = builds[Case("llama-2-in-2", "mlx-lm", "small-shards")]
    files = sorted(build.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert names(build, "*.safetensors") == {
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    }
    index = read_json(build / "model.safetensors.index.json")
    found = {}
    for file in files:
        held = mx.load(str(file))
        assert dict.fromkeys(held, file.name).items() <= index["weight_map"].items()
        found |= held
    assert list(index["weight_map"]) == sorted(found)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    assert same(found, twin_weights("llama-2"))
    mlx_lm_logits(build)


# Layout mlx-examples.


@each(of("mlx-examples"))
def test_mlx_examples_weights_are_the_oracles(builds: Builds, case: Case) -> None:
    assert same(
        mlx_examples.load_weights(builds[case]), examples_weights(case.release, case.setting)
    )


@each(of("mlx-examples"))
def test_mlx_examples_config_is_what_convert_py_writes(builds: Builds, case: Case) -> None:
    """`params.json` with the vocabulary's real size, what it is, and how it is quantized."""
    setting, release = SETTINGS[case.setting], meta.RELEASES[case.release]
    expected = {key: value for key, value in release.params.items() if value is not None}
    expected |= {"vocab_size": meta.VOCABULARY, "model_type": "llama"}
    if setting.quantize:
        expected["quantization"] = dict(setting.quantize)
    assert list(json_differences("", read_json(builds[case] / "config.json"), expected)) == []


@each(of("mlx-examples"))
def test_mlx_examples_folder_holds_just_its_files(builds: Builds, case: Case) -> None:
    build = builds[case]
    tokenizer = (build / "tokenizer.model").read_bytes()
    assert tokenizer == meta.tokenizer_model(meta.RELEASES[case.release].tokenizer)
    count = len([*build.glob("weights*")])
    files = {"weights.npz"} if count == 1 else {f"weights.{i:02d}.npz" for i in range(count)}
    assert names(build, "*") == files | {"config.json", "tokenizer.model"}
    assert (count > 3) == (case.setting == "small-shards")


def test_mlx_examples_tokenizer_loads_or_the_build_says_that_it_does_not(builds: Builds) -> None:
    for case in of("mlx-examples", "plain"):
        warned = re.search(rf"(?m)^note: {re.escape(case.target)}: .*tiktoken", builds.said)
        if meta.RELEASES[case.release].tokenizer == "sentencepiece":
            assert mlx_examples.load_tokenizer(builds[case]).encode("the layer")
            assert not warned
        else:
            with pytest.raises(RuntimeError):
                mlx_examples.load_tokenizer(builds[case])
            assert warned


@each(of("mlx-examples", "float32", "float32-4bit"))
def test_mlx_examples_build_speaks_as_metas_model_does(builds: Builds, case: Case) -> None:
    release, weights = meta.RELEASES[case.release], meta.wholes(case.release)
    if told := SETTINGS[case.setting].quantize:  # what is left of the weights
        for name, array in weights.items():
            if array.ndim == 2:
                parts = mx.quantize(array.astype(mx.float32), **told)
                weights[name] = mx.dequantize(*parts, **told)
    logits = mlx_examples_logits(builds[case])
    assert differ(logits, meta_logits(release, weights)) < TOLERANCE


@each(
    (
        *(
            c
            for c in of("mlx-examples", "plain", "bfloat16", "small-shards")
            if c.checkpoint not in LARGE
        ),
        Case("llama-3-in-2", "mlx-examples", "8bit"),  # one: in float16 a CPU is slow
    )
)
def test_mlx_examples_build_loads(builds: Builds, case: Case) -> None:
    """In half precision it says about what the whole tensors say."""
    expected = logits_of(case.release)
    assert differ(mlx_examples_logits(builds[case]), expected) < 0.1 * np.abs(expected).max()


@each(of("mlx-examples", "plain", "float32", "float16", "float32-4bit"))
def test_numpy_reads_mlx_examples_weights_as_well(builds: Builds, case: Case) -> None:
    expected = examples_weights(case.release, case.setting)
    with np.load(builds[case] / "weights.npz") as archive:
        found = {name: mx.array(array) for name, array in archive.items()}
    assert same(found, expected)


@pytest.mark.parametrize("name", TWINS_FOR_EXAMPLES)
def test_transformers_checkpoint_in_mlx_examples_layout(builds: Builds, name: str) -> None:
    """Rows stay in transformers' order, and config.json says so; a tied head is written out."""
    release, build = meta.RELEASES[name], builds.folder / "build" / f"{name}.twin"
    twin, wholes = twin_weights(name), meta.wholes(name)
    expected = {tensor: twin[twin_name(tensor)].astype(mx.float32) for tensor in wholes}
    expected.setdefault("output.weight", expected["tok_embeddings.weight"])
    assert same(mlx_examples.load_weights(build), expected)
    params = release.params
    config = {
        "dim": params["dim"],
        "hidden_dim": release.hidden,
        "n_heads": release.heads,
        "n_kv_heads": release.kv_heads,
        "head_dim": params["dim"] // release.heads,
        "n_layers": release.layers,
        "vocab_size": meta.VOCABULARY,
        "norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "rope_traditional": False,
        "model_type": "llama",
    }
    assert list(json_differences("", read_json(build / "config.json"), config)) == []
    assert differ(mlx_examples_logits(build), logits_of(name)) < TOLERANCE


@pytest.mark.parametrize("source", ["checkpoints/llama-3.1", "twins/llama-3.1"])
def test_scaled_rotary_embedding_is_refused_in_mlx_examples_layout(
    builds: Builds, tmp_path: Path, source: str
) -> None:
    text = f'[models.no]\nsource = "{builds.folder / source}"\nlayout = "mlx-examples"\n'
    (tmp_path / "models.toml").write_text(text, encoding="utf-8")
    said = doit(tmp_path, expect=3).stderr
    assert "scales its rotary embedding" in said
    assert 'Use layout = "mlx-lm".' in said
    assert not (tmp_path / "build").exists()


# What transformers 5 saves.


@pytest.mark.parametrize("name", TRANSFORMERS_5)
def test_what_transformers_5_saved_speaks_as_before(builds: Builds, name: str) -> None:
    """Its rotary settings lie where mlx-lm's llama does not look; the built config has them."""
    saved = read_json(builds.folder / "saved" / name / "config.json")
    assert not saved.keys() & {"rope_theta", "rope_scaling"}  # or this shows nothing
    build = builds.folder / "build" / f"{name}.saved"
    config, before = read_json(build / "config.json"), twin_config(name)
    assert config["rope_theta"] == before["rope_theta"] == 500000.0
    assert config.get("rope_scaling") == before["rope_scaling"]
    logits = mlx_lm_logits(build)
    assert differ(logits, torch_logits(builds.folder / "saved" / name)) < TOLERANCE
    assert differ(logits, logits_of(name)) < TOLERANCE


def test_what_transformers_5_saved_in_mlx_examples_layout(builds: Builds) -> None:
    build = builds.folder / "build" / "llama-3.saved-mlx-examples"
    assert read_json(build / "config.json")["rope_theta"] == 500000.0
    assert differ(mlx_examples_logits(build), logits_of("llama-3")) < TOLERANCE


# That the tests above can fail.


def test_logits_show_the_order_of_rows() -> None:
    name = "llama-2"
    release, weights = meta.RELEASES[name], meta.wholes(name)
    wrong = {tensor: twin_weights(name)[twin_name(tensor)] for tensor in weights}
    right = logits_of(name)
    assert differ(meta_logits(release, wrong), right) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [{"use_scaled_rope": False}, {"rope_scaling_factor": 32}, {"rope_theta": 10000.0}],
    ids=str,
)
def test_logits_show_rotary_settings(changes: dict) -> None:
    release = meta.RELEASES["llama-3.1"]
    weights = meta.wholes("llama-3.1")
    right = meta_logits(release, weights)
    assert differ(meta_logits(release.but(params=changes), weights), right) > 5 * TOLERANCE


@pytest.mark.parametrize("name", TRANSFORMERS_5)
def test_logits_show_a_lost_rope_theta(builds: Builds, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(builds.folder / "build" / f"{name}.saved", tmp_path / name)
    config = read_json(copy / "config.json")
    del config["rope_theta"]
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert differ(mlx_lm_logits(copy), logits_of(name)) > 5 * TOLERANCE

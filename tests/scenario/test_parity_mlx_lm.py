"""Layout `mlx-lm` writes what `mlx_lm.convert` writes: built by both, compared to the bit.

The peer runs in this process, one conversion after the other; ours is one call of doit for all
targets. Where the peer refuses a combination, the target is left out, and a test says which.
"""

import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from huggingface_hub import ModelCard

from support import peer
from support.checkpoints import ARCHITECTURES, make
from support.differences import json_differences, read_json, weight_differences
from support.front_door import doit

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = {
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
}


@dataclass(frozen=True)
class Setting:
    """One way to build a model, as `models.toml` spells it and as `mlx_lm.convert` takes it."""

    toml: str
    convert: Mapping = field(default_factory=dict)
    shard_bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """One target: a checkpoint and a setting.

    The peer cannot read `.bin`: it gets the same tensors as safetensors.
    """

    arch: str
    setting: str
    form: str = "safetensors"

    @property
    def model(self) -> str:
        return self.arch if self.form == "safetensors" else f"{self.arch}-{self.form}"

    @property
    def target(self) -> str:
        return self.model if self.setting == "plain" else f"{self.model}-{self.setting}"

    @property
    def reference(self) -> str:
        return f"{self.arch}-{self.setting}"


SETTINGS = {
    "plain": Setting(""),
    "float16": Setting('dtype = "float16"', {"dtype": "float16"}),
    "4bit": Setting("quantize = { bits = 4 }", {"quantize": True, "q_bits": 4}),
    "3bit": Setting(
        "quantize = { bits = 3, group_size = 32 }",
        {"quantize": True, "q_bits": 3, "q_group_size": 32},
    ),
    "mixed_3_6": Setting(
        'quantize = { recipe = "mixed_3_6" }', {"quantize": True, "quant_predicate": "mixed_3_6"}
    ),
    "mxfp4": Setting('quantize = { mode = "mxfp4" }', {"quantize": True, "q_mode": "mxfp4"}),
}
# What only some architectures need to show. 10 kB is less than the first tensor of either.
MORE_SETTINGS = {
    "mixed_2_6-32": Setting(
        'quantize = { recipe = "mixed_2_6", group_size = 32 }',
        {"quantize": True, "quant_predicate": "mixed_2_6", "q_group_size": 32},
    ),
    "mixed_3_6-8bit": Setting(
        'quantize = { recipe = "mixed_3_6", bits = 8 }',
        {"quantize": True, "quant_predicate": "mixed_3_6", "q_bits": 8},
    ),
    "1bit": Setting("quantize = { bits = 1 }", {"quantize": True, "q_bits": 1}),
    "mxfp8": Setting('quantize = { mode = "mxfp8" }', {"quantize": True, "q_mode": "mxfp8"}),
    "nvfp4": Setting('quantize = { mode = "nvfp4" }', {"quantize": True, "q_mode": "nvfp4"}),
    "float32-8bit": Setting(
        'dtype = "float32"\nquantize = { bits = 8, group_size = 128 }',
        {"dtype": "float32", "quantize": True, "q_bits": 8, "q_group_size": 128},
    ),
    "shards": Setting(
        'quantize = { bits = 4 }\nmax_shard_size = "64KiB"',
        {"quantize": True, "q_bits": 4},
        shard_bytes=64 << 10,
    ),
    "tiny-shards": Setting('max_shard_size = "10kB"', shard_bytes=10_000),
}
ALL_SETTINGS = SETTINGS | MORE_SETTINGS

CASES = (
    *(Case(arch, setting) for arch in ARCHITECTURES for setting in SETTINGS),
    *(
        Case(arch, setting)
        for arch in ("llama", "granite", "deepseek-v3")
        for setting in MORE_SETTINGS
    ),
    *(Case(arch, "shards") for arch in ("qwen3-moe", "gemma3", "starcoder2")),
    *(
        Case(arch, setting, "bin")
        for arch in ("llama", "llama-tied")
        for setting in ("plain", "4bit")
    ),
)
REFUSED_BY_PEER = {"starcoder2-mixed_3_6": "Model does not have expected keys for mixed quant."}


def each(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.target)


@dataclass(frozen=True)
class References:
    """What the peer made of the cases, in `folder/references`, and why not of the others."""

    folder: Path
    refused: Mapping[str, str]

    def __getitem__(self, case: Case) -> Path:
        if case.reference in self.refused:
            pytest.skip(f"mlx_lm.convert refuses it: {self.refused[case.reference]}")
        return self.folder / "references" / case.reference

    def source(self, case: Case) -> Path:
        return self.folder / "checkpoints" / case.model

    def build(self, case: Case) -> Path:
        return self.folder / "build" / case.target


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """What the peer makes of each case."""
    folder = tmp_path_factory.mktemp("parity")
    (folder / "references").mkdir()
    for arch, form in {(case.arch, case.form) for case in CASES}:
        deep = {"num_hidden_layers": 8} if arch == "llama" else {}  # for the recipes
        make(arch, folder / "checkpoints" / Case(arch, "plain", form).model, form=form, **deep)
    refused = {}
    for case in CASES:
        if case.form == "safetensors":
            try:
                convert_as_peer(
                    folder / "checkpoints" / case.model,
                    folder / "references" / case.reference,
                    case.setting,
                )
            except ValueError as error:
                refused[case.reference] = str(error)
    return References(folder, refused)


@pytest.fixture(scope="module")
def builds(references: References) -> References:
    """The same, after one call of doit has built every target that the peer can build too."""
    wanted = [case for case in CASES if case.reference not in references.refused]
    (references.folder / "models.toml").write_text(models_toml(wanted), encoding="utf-8")
    doit(references.folder)
    return references


def convert_as_peer(source: Path, destination: Path, setting: str) -> None:
    """Call `mlx_lm.convert`. Its limit on a shard's size is in whole GiB; ours here in bytes."""
    chosen = ALL_SETTINGS[setting]
    with pytest.MonkeyPatch.context() as patch:
        if chosen.shard_bytes is not None:
            limit = Bytes(chosen.shard_bytes)
            limited = functools.partial(mlx_lm.utils.make_shards, max_file_size_gb=limit)
            patch.setattr(mlx_lm.utils, "make_shards", limited)
        peer.convert(source, destination, **chosen.convert)


class Bytes(int):
    """A number of bytes where `make_shards` takes GiB and shifts them left by 30."""

    def __lshift__(self, _: int) -> int:
        return int(self)


def models_toml(cases: list[Case]) -> str:
    """The `models.toml` of these cases: a model for each checkpoint, a variant for each setting."""
    lines = []
    for model in dict.fromkeys(case.model for case in cases):
        lines += [f"[models.{model}]", f'source = "checkpoints/{model}"']
        for case in cases:
            if case.model == model and case.setting != "plain":
                lines += [
                    f"[models.{model}.variants.{case.setting}]",
                    ALL_SETTINGS[case.setting].toml,
                ]
    return "\n".join(lines) + "\n"


def differences(build: Path, reference: Path, source: Path) -> list[str]:
    """What a build has otherwise than the peer's, each in a line; none if they are equal."""
    found = [*file_differences(build, reference, source), *weight_differences(build, reference)]
    for name in INDEX, "config.json":
        if (build / name).exists():
            ours, theirs = read_json(build / name), read_json(reference / name)
            found += json_differences(f"{name}: ", ours, theirs)
    return found


def file_differences(build: Path, reference: Path, source: Path) -> Iterator[str]:
    """The peer saves the tokenizer anew, ours are the author's files; all else has equal names."""
    shipped = {path.name for path in source.iterdir()}
    copied = shipped & (TOKENIZER_FILES | {"generation_config.json"})
    copied |= {name for name in shipped if name.endswith(".py")}
    expected = {path.name for path in reference.iterdir()} - TOKENIZER_FILES | copied
    there = {path.name for path in build.iterdir()}
    yield from (f"{name}: missing" for name in sorted(expected - there))
    yield from (f"{name}: too many" for name in sorted(there - expected))
    for name in sorted(copied & there):
        if (build / name).read_bytes() != (source / name).read_bytes():
            yield f"{name}: not the checkpoint's bytes"


@each(CASES)
def test_build_is_what_mlx_lm_writes(builds: References, case: Case) -> None:
    reference = builds[case]
    assert differences(builds.build(case), reference, builds.source(case)) == []


def test_left_out_is_only_what_mlx_lm_refuses(references: References) -> None:
    assert references.refused == REFUSED_BY_PEER


def test_built_are_all_others(builds: References) -> None:
    wanted = {case.target for case in CASES if case.reference not in REFUSED_BY_PEER}
    assert {path.name for path in (builds.folder / "build").iterdir()} == wanted


@pytest.fixture
def _as_written() -> Iterator[None]:
    """Activations run as they are written: fused, a C++ compiler runs for each, a second."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("_as_written")
@each(tuple(Case(arch, "4bit") for arch in ARCHITECTURES))
def test_build_loads_and_speaks_as_the_peer(builds: References, case: Case) -> None:
    """`mlx_lm.load` takes the folder; a sentence has the tokens and logits of the peer's build."""
    (ours, our_tokenizer), (theirs, their_tokenizer) = (
        mlx_lm.utils.load(str(folder)) for folder in (builds.build(case), builds[case])
    )
    sentence = "the layer in the other layer\n é"
    tokens = our_tokenizer.encode(sentence)
    assert tokens == their_tokenizer.encode(sentence)
    assert our_tokenizer.decode(tokens) == sentence
    assert our_tokenizer.eos_token_ids == their_tokenizer.eos_token_ids
    assert our_tokenizer.chat_template == their_tokenizer.chat_template
    logits = ours(mx.array([tokens]))
    assert mx.isfinite(logits).all().item()
    assert mx.array_equal(logits, theirs(mx.array([tokens]))).item()


def test_model_card_says_mlx(builds: References) -> None:
    card = ModelCard.load(builds.build(Case("llama", "4bit")) / "README.md").data
    assert (card.library_name, card.pipeline_tag) == ("mlx", "text-generation")
    assert "mlx" in card.tags


def test_references_have_shards_of_several_and_of_too_large_a_tensor(
    references: References,
) -> None:
    """That the cases show what they are meant to."""
    assert len([*references[Case("llama", "shards")].glob("*.safetensors")]) > 3
    (first,) = references[Case("llama", "tiny-shards")].glob("model-00001-of-*.safetensors")
    ((name, array),) = mx.load(str(first)).items()
    assert name == "model.embed_tokens.weight"
    assert array.nbytes > ALL_SETTINGS["tiny-shards"].shard_bytes


def _change_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _save_otherwise(folder: Path, *, metadata: dict | None = None, **changes: mx.array) -> None:
    path = folder / "model.safetensors"
    changes = {name.replace("__", "."): array for name, array in changes.items()}
    arrays = dict(mx.load(str(path))) | changes
    copy = path.with_name("copy.safetensors")
    mx.save_safetensors(str(copy), arrays, metadata=metadata or {"format": "mlx"})
    copy.rename(path)


def _edit_json(folder: Path, name: str, **changes: object) -> None:
    (folder / name).write_text(json.dumps(read_json(folder / name) | changes), encoding="utf-8")


ALTERATIONS = {
    "nothing": (lambda folder: None, None),
    "the order in the file": (lambda folder: _save_otherwise(folder), None),
    "a byte": (_change_a_byte, "has other bytes"),
    "a dtype": (
        lambda f: _save_otherwise(f, model__norm__weight=mx.zeros(128, mx.float16)),
        "float16 (128,), not",
    ),
    "a shape": (
        lambda f: _save_otherwise(f, model__norm__weight=mx.zeros((128, 1), mx.bfloat16)),
        "(128, 1), not",
    ),
    "a tensor more": (lambda f: _save_otherwise(f, more=mx.zeros(1)), "safetensors: more too many"),
    "the metadata": (
        lambda f: _save_otherwise(f, metadata={"format": "pt"}),
        "metadata {'format': 'pt'}",
    ),
    "a key's value": (
        lambda f: _edit_json(f, "config.json", rope_theta=10000),
        "rope_theta is 10000, not 10000.0",
    ),
    "a key more": (lambda f: _edit_json(f, "config.json", more=1), "config.json: more too many"),
    "the index": (
        lambda f: _edit_json(
            f, INDEX, weight_map=read_json(f / INDEX)["weight_map"] | {"more": "?"}
        ),
        "weight_map.more too many",
    ),
    "a tokenizer file": (
        lambda f: _edit_json(f, "tokenizer.json", version="2"),
        "not the checkpoint's bytes",
    ),
    "a file less": (
        lambda f: (f / "generation_config.json").unlink(),
        "generation_config.json: missing",
    ),
    "a file more": (lambda f: (f / "model-2.safetensors").touch(), "model-2.safetensors: too many"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_differences_are_seen(references: References, tmp_path: Path, alteration: str) -> None:
    """A copy of a reference with the author's tokenizer files is equal; an altered one is not."""
    case = Case("llama", "4bit")
    copy, source = shutil.copytree(references[case], tmp_path / "copy"), references.source(case)
    for name in TOKENIZER_FILES:
        (copy / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copy(source / name, copy)
    alter, expected = ALTERATIONS[alteration]
    alter(copy)
    seen = differences(copy, references[case], source)
    assert len(seen) == (expected is not None)
    assert all(expected in line for line in seen)


TWO_BYTES = ("bfloat16", "float16")


@pytest.mark.parametrize("expert", [0, 2])
def test_experts_of_two_dtypes(tmp_path: Path, expert: int) -> None:
    """MLX promotes what it stacks, so that the stack is not the experts' bytes end to end."""
    folder = make("qwen3-moe", tmp_path / "checkpoint", files=1)
    (file,) = folder.glob("*.safetensors")
    arrays = dict(mx.load(str(file)))
    name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
    arrays[name] = arrays[name].astype(mx.float32)
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)
    (tmp_path / "models.toml").write_text('[models.a]\nsource = "checkpoint"\n')
    doit(tmp_path)
    reference = peer.convert(folder, tmp_path / "reference")
    assert [*weight_differences(tmp_path / "build" / "a", reference)] == []


def test_equal_bytes_of_two_dtypes(tmp_path: Path) -> None:
    """A norm of zeros is the same bytes in bfloat16 and float16, and not the same tensor."""
    folder = make("llama", tmp_path / "checkpoint", files=1)
    (file,) = folder.glob("*.safetensors")
    arrays = dict(mx.load(str(file)))
    arrays["model.norm.weight"] = mx.zeros_like(arrays["model.norm.weight"])
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays)
    (tmp_path / "models.toml").write_text(
        "".join(f'[models.{d}]\nsource = "checkpoint"\ndtype = "{d}"\n' for d in TWO_BYTES)
    )
    doit(tmp_path)
    for dtype in TWO_BYTES:
        built = mx.load(str(tmp_path / "build" / dtype / "model.safetensors"))
        assert {str(array.dtype) for array in built.values()} == {f"mlx.core.{dtype}"}


def test_a_file_said_to_be_of_another_dtype(tmp_path: Path) -> None:
    """The same bytes under another header are other weights."""
    folder = make("llama", tmp_path / "checkpoint", files=1)
    (file,) = folder.glob("*.safetensors")
    settings = 'dtype = "float32"\nquantize = { bits = 4 }'
    (tmp_path / "models.toml").write_text(f'[models.a]\nsource = "checkpoint"\n{settings}')
    doit(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"BF16"', b'"F16" '))
    doit(tmp_path, "lock")
    doit(tmp_path)
    settings = {"quantize": True, "q_bits": 4, "dtype": "float32"}
    reference = peer.convert(folder, tmp_path / "reference", **settings)
    assert [*weight_differences(tmp_path / "build" / "a", reference)] == []


def test_a_model_of_many_tensors(tmp_path: Path) -> None:
    """66 layers, 1059 tensors: more than some functions of MLX take arguments."""
    width = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    folder = make("starcoder2", tmp_path / "checkpoint", num_hidden_layers=66, **width)
    (tmp_path / "models.toml").write_text(
        '[models.a]\nsource = "checkpoint"\nquantize = { bits = 4 }\n'
    )
    doit(tmp_path)
    reference = peer.convert(folder, tmp_path / "reference", quantize=True, q_bits=4)
    assert [*weight_differences(tmp_path / "build" / "a", reference)] == []
    assert doit(tmp_path).entries == []

"""`quantize.rules`: what mlx-lm's `quantize_model` writes when its predicate says the same.

Ours is one call of doit for all targets; the peer quantizes each in this process, by a predicate
that is written out here for each case, not read from the rules.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import load_model, quantize_model, save_config

from support import checkpoints, inside
from support.front_door import doit

Verdict = bool | dict[str, Any]


def affine(bits: int, group_size: int | None = 64) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}


@dataclass(frozen=True)
class Case:
    """Rules on top of something, and the same as a predicate.

    Attributes:
        toml: what `quantize` says.
        verdict: how mlx-lm is told to quantize the module of this path, given what it would do by
            itself (the model's own predicate or the recipe's).
        call: `quantize_model`'s own arguments.
        recipe: the recipe, if there is one.
        arch: of the checkpoint.
        dtype: what a parameter of this name is cast to, where it is not bfloat16.
    """

    toml: str
    verdict: Callable[[str, Verdict], Verdict]
    call: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    arch: str = "llama"
    dtype: Callable[[str], mx.Dtype | None] = lambda name: None


def dtype_of_parts(name: str) -> mx.Dtype | None:
    if "norm" in name or "mlp.gate." in name:
        return mx.float32
    return mx.float16 if "switch_mlp.down_proj" in name or "lm_head" in name else None


def bits_by_layer(path: str, own: Verdict) -> Verdict:
    """First match wins: the second rule is for the layers that the first leaves."""
    if path.startswith("model.layers.0."):
        return affine(8)
    return affine(6) if path.endswith("down_proj") else own


CASES = {
    "bits": Case(
        '{ bits = 4, rules = [{ match = "*.mlp.down_proj", bits = 6 }] }',
        lambda path, own: affine(6) if path.endswith("mlp.down_proj") else own,
        {"bits": 4},
    ),
    "skip": Case(
        '{ bits = 4, rules = [{ match = "lm_head", skip = true }, '
        '{ match = "model.embed_tokens", skip = true }] }',
        lambda path, own: own if path.startswith("model.layers.") else False,
        {"bits": 4},
    ),
    "first-match": Case(
        '{ bits = 3, rules = [{ match = "model.layers.0.*", bits = 8 }, '
        '{ match = "*.down_proj", bits = 6 }] }',
        bits_by_layer,
        {"bits": 3},
    ),
    "first-match-skips": Case(
        '{ bits = 4, rules = [{ match = "*.layers.[13].*", skip = true }, '
        '{ match = "*.?_proj", bits = 2 }] }',
        lambda path, own: (
            not path.startswith(("model.layers.1.", "model.layers.3."))
            and (affine(2) if "self_attn" in path else own)
        ),
        {"bits": 4},
    ),
    "group-size": Case(
        '{ bits = 5, rules = [{ match = "*.o_proj", group_size = 128 }, '
        '{ match = "*.q_proj", group_size = 32, bits = 3 }] }',
        lambda path, own: (
            affine(5, 128)
            if path.endswith("o_proj")
            else affine(3, 32)
            if path.endswith("q_proj")
            else own
        ),
        {"bits": 5},
    ),
    "mode": Case(
        '{ bits = 6, rules = [{ match = "*.mlp.*", mode = "mxfp4" }, '
        '{ match = "*.q_proj", mode = "mxfp8" }, { match = "*.v_proj", mode = "nvfp4" }] }',
        lambda path, own: (
            MXFP4
            if ".mlp." in path
            else MXFP8
            if path.endswith("q_proj")
            else NVFP4
            if path.endswith("v_proj")
            else own
        ),
        {"bits": 6},
    ),
    "affine-on-mxfp4": Case(
        '{ mode = "mxfp4", rules = [{ match = "lm_head", mode = "affine", bits = 8 }, '
        '{ match = "*.embed_*", mode = "affine" }] }',
        lambda path, own: affine(8) if path == "lm_head" else affine(4) if "embed" in path else own,
        {"mode": "mxfp4"},
    ),
    "recipe": Case(
        '{ recipe = "mixed_3_6", rules = [{ match = "lm_head", bits = 8 }, '
        '{ match = "*.layers.2.*", skip = true }, { match = "*.k_proj", group_size = 32 }] }',
        lambda path, own: (
            affine(8)
            if path == "lm_head"
            else path.split(".")[2:3] != ["2"]
            and (affine(own["bits"], 32) if path.endswith("k_proj") else own)
        ),
        {},
        "mixed_3_6",
    ),
    "recipe-group-size": Case(
        '{ recipe = "mixed_2_6", group_size = 32, rules = [{ match = "*.up_proj", bits = 5 }, '
        '{ match = "*.gate_proj", mode = "mxfp8" }] }',
        lambda path, own: (
            affine(5, 32)
            if path.endswith("up_proj")
            else MXFP8
            if path.endswith("gate_proj")
            else own
        ),
        {"group_size": 32},
        "mixed_2_6",
    ),
    "experts": Case(
        '{ bits = 4, rules = [{ match = "*.switch_mlp.*", bits = 2 }, '
        '{ match = "*.layers.2.mlp.gate", bits = 5 }, { match = "*.embed_tokens", skip = true }] }',
        lambda path, own: (
            affine(2)
            if ".switch_mlp." in path
            else affine(5)
            if path.endswith("layers.2.mlp.gate")
            else "embed_tokens" not in path and own
        ),
        {"bits": 4},
        arch="qwen3-moe",
    ),
    "dtype": Case(
        '{ bits = 4, rules = [{ match = "*norm", dtype = "float32" }, '
        '{ match = "*.mlp.gate", dtype = "float32" }, '
        '{ match = "lm_head", skip = true, dtype = "float16" }, '
        '{ match = "*.experts.*.down_proj", bits = 8, dtype = "float16" }, '
        '{ match = "*.o_proj", bits = 6 }] }',
        lambda path, own: (
            affine(8)
            if path.endswith("switch_mlp.down_proj")
            else affine(6)
            if path.endswith("o_proj")
            else path != "lm_head" and own
        ),
        {"bits": 4},
        arch="qwen3-moe",
        dtype=dtype_of_parts,
    ),
    "all": Case(
        '{ bits = 4, rules = [{ match = "*", bits = 8 }] }', lambda *_: affine(8), {"bits": 4}
    ),
}


@dataclass(frozen=True)
class Built:
    """Both builds of a case."""

    ours: Path
    theirs: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, built by one call of doit."""
    folder = tmp_path_factory.mktemp("rules")
    lines = []
    for arch in dict.fromkeys(case.arch for case in CASES.values()):
        checkpoints.make(arch, folder / "checkpoints" / arch)
        lines += [f"[models.{arch}]", f'source = "checkpoints/{arch}"']
        for name, case in CASES.items():
            if case.arch == arch:
                lines += [f"[models.{arch}.variants.{name}]", f"quantize = {case.toml}"]
    (folder / "models.toml").write_text("\n".join(lines), encoding="utf-8")
    doit(folder)
    return folder


@pytest.fixture
def built(folder: Path, tmp_path: Path, name: str) -> Built:
    """A case, as doit built it and as mlx-lm quantizes it."""
    case = CASES[name]
    model, settings = load_model(folder / "checkpoints" / case.arch, lazy=True)
    model.set_dtype(mx.bfloat16)
    plain = dict(
        tree_flatten(load_model(folder / "checkpoints" / case.arch, lazy=True)[0].parameters())
    )
    cast = [(n, a.astype(case.dtype(n))) for n, a in plain.items() if case.dtype(n)]
    model.load_weights(cast, strict=False)
    own = getattr(model, "quant_predicate", lambda *_: True)
    if case.recipe:
        group_size = case.call.get("group_size")
        own = mixed_quant_predicate_builder(case.recipe, model, group_size)

    def predicate(path: str, module: nn.Module) -> Verdict:
        return case.verdict(path, own(path, module))

    call = {"group_size": None, "bits": None, **case.call}
    model, settings = quantize_model(model, settings, **call, quant_predicate=predicate)
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "mlx"},
    )
    save_config(settings, tmp_path / "config.json")
    return Built(folder / "build" / f"{case.arch}-{name}", tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_rules_are_as_mlx_lm_s_predicate(built: Built, name: str) -> None:
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (built.ours, built.theirs)
    )
    assert ours["quantization"] == theirs["quantization"]
    assert ours == theirs
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)  # 1 is not 1.0

    weights, expected = (
        mx.load(str(folder / "model.safetensors")) for folder in (built.ours, built.theirs)
    )
    assert weights.keys() == expected.keys()
    for key, array in expected.items():
        assert (weights[key].dtype, weights[key].shape) == (array.dtype, array.shape), key
        assert bytes(weights[key].view(mx.uint8)) == bytes(array.view(mx.uint8)), key


@pytest.mark.parametrize("name", CASES)
def test_mlx_lm_loads_each_module_as_the_rules_say(folder: Path, name: str) -> None:
    case = CASES[name]
    model, _ = mlx_lm.load(str(folder / "build" / f"{case.arch}-{name}"))
    logits = model(mx.array([[5, 7, 11]]))
    assert mx.isfinite(logits).all().item()

    plain, _ = load_model(folder / "checkpoints" / case.arch, lazy=True)
    own = getattr(plain, "quant_predicate", lambda *_: True)
    if case.recipe:
        own = mixed_quant_predicate_builder(case.recipe, plain, case.call.get("group_size"))
    modules = dict(model.named_modules())
    seen = set()
    for path, module in plain.named_modules():
        if not hasattr(module, "to_quantized"):
            continue
        verdict = case.verdict(path, own(path, module))
        if verdict is True:
            verdict = {"mode": "affine", **case.call}
        said = case.dtype(f"{path}.weight") or mx.bfloat16
        quantized = getattr(modules[path], "scales", modules[path].weight)
        assert quantized.dtype in (said, mx.uint8), path
        quantized = hasattr(modules[path], "bits")
        assert quantized == bool(verdict), path
        if quantized:
            mode = verdict.get("mode", "affine")
            group_size, bits = {"affine": (64, 4), "mxfp4": (32, 4)}.get(mode, (None, None))
            said = (verdict.get("bits") or bits, verdict.get("group_size") or group_size, mode)
            found = modules[path].bits, modules[path].group_size, modules[path].mode
            assert found == said, path
        seen.add(json.dumps(verdict))
    norms = [m.weight.dtype for path, m in modules.items() if path.endswith("norm")]
    assert {*norms} == {case.dtype("norm") or mx.bfloat16}
    assert len(seen) > 1 or name == "all"  # that the case shows something


def test_verify_tells_dtypes_from_the_model(folder: Path, tmp_path: Path) -> None:
    source = ("--source", str(folder / "checkpoints" / "qwen3-moe"))
    copy = shutil.copytree(folder / "build" / "qwen3-moe-dtype", tmp_path / "model")
    status, out, err = inside.run(folder, "verify", "--all", *source, str(copy))
    assert (status, err) == (0, "")
    assert "made anew from" in out


# Where quantize_model cannot follow: it looks at one group size for all modules


def quantization(tmp_path: Path, arch: str, quantize: str) -> tuple[dict[str, Any], str]:
    """What a build of these rules says in config.json, and what doit says; mlx-lm loads it."""
    checkpoints.make(arch, tmp_path / "checkpoint")
    (tmp_path / "models.toml").write_text(
        f'[models.a]\nsource = "checkpoint"\nquantize = {quantize}', encoding="utf-8"
    )
    said = doit(tmp_path).stdout
    model, _, settings = mlx_lm.load(str(tmp_path / "build" / "a"), return_config=True)
    assert mx.isfinite(model(mx.array([[5, 7, 11]]))).all().item()
    return settings["quantization"], said


def test_a_rule_without_mode_means_the_target_s(tmp_path: Path) -> None:
    """Also for a router, which mlx-lm by itself quantizes in another mode."""
    rule = '{ mode = "nvfp4", rules = [{ match = "*.mlp.gate", group_size = 16 }] }'
    found, _ = quantization(tmp_path, "qwen3-moe", rule)
    gates = [value for path, value in found.items() if path.endswith("mlp.gate")]
    assert gates == [NVFP4, NVFP4]


def test_a_rule_s_mode_brings_its_group_size(tmp_path: Path) -> None:
    """16 divides a width of 80, which affine's 64 does not."""
    found, said = quantization(
        tmp_path, "llama-odd", '{ rules = [{ match = "*.q_proj", mode = "nvfp4" }] }'
    )
    assert [path for path, value in found.items() if value == NVFP4] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    assert "note: a: 10 modules left unquantized: a last axis of 80 " in said


def test_a_rule_s_mode_may_have_a_group_size_too_large(tmp_path: Path) -> None:
    """Where 16 divides and 64 does not, the module stays as it is, and it is said.

    Not so the embedding, since MLX itself cannot look 80 numbers up in this mode.
    """
    found, said = quantization(
        tmp_path,
        "llama-odd",
        '{ mode = "nvfp4", rules = [{ match = "*.q_proj", mode = "affine" }, '
        '{ match = "*.embed_tokens", skip = true }] }',
    )
    assert [path for path in found if path.endswith("q_proj")] == []
    assert "note: a: 2 modules left unquantized: a last axis of 80 " in said

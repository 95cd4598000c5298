"""Layout `mlx-vlm-mtp` writes what `mlx_vlm.split_mtp` does, which `mlx_vlm.convert --mtp` calls.

`benchmarks/vlm.py --mtp` compares all architectures that it splits a drafter off.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import pytest

from support import inside, mtp_checkpoints
from support.differences import json_differences, read_json, weight_differences

pytestmark = pytest.mark.skipif(
    find_spec("mlx_vlm") is None, reason="needs pip install 'mlx-make[vlm]'"
)

# Experts in one, norms that are moved by one; a layer beyond the last, with experts of their own.
ARCHITECTURES = ("qwen3_5_moe", "glm4_moe_lite")
SETTINGS = {
    "plain": ("", {}),
    "4bit": ("quantize = { bits = 4 }", {"q_bits": 4, "q_group_size": 64}),
    "mxfp4": ('quantize = { mode = "mxfp4" }', {"q_mode": "mxfp4"}),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of which each target is built, and split off by the peer into `references`."""
    from mlx_vlm.split_mtp import split_mtp

    folder = tmp_path_factory.mktemp("mtp")
    lines = ['[defaults]\nlayout = "mlx-vlm-mtp"']
    for arch in (*ARCHITECTURES, "qwen3_5"):
        source = mtp_checkpoints.make(arch, folder / "checkpoints" / arch)
        if arch == "qwen3_5":  # whose norms MLX has moved already
            weights = mx.load(str(source / "model.safetensors"))
            mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "mlx"})
        for name, (toml, settings) in (
            SETTINGS.items() if arch in ARCHITECTURES else [("", ("", {}))]
        ):
            split_mtp(str(source), str(folder / "references" / f"{arch}-{name}"), **settings)
            lines += [f"[models.{arch}-{name}]", f'source = "checkpoints/{arch}"', toml]
    (folder / "models.toml").write_text("\n".join(lines))
    inside.doit(folder)
    return folder


def test_a_drafter_is_what_mlx_vlm_splits_off(built: Path) -> None:
    from mlx_vlm.speculative.drafters import load_drafter

    references = sorted((built / "references").iterdir())
    assert len(references) == 2 * len(SETTINGS) + 1
    for reference in references:
        build = built / "build" / reference.name
        found = [*weight_differences(build, reference)]
        ours, theirs = (read_json(folder / "config.json") for folder in (build, reference))
        found += json_differences("config.json: ", ours, theirs)
        assert found == [], reference.name
        assert (build / "tokenizer.json").exists()
    _, kind = load_drafter(str(built / "build" / "qwen3_5_moe-4bit"))
    assert kind == "mtp"


def test_what_another_dtype_is_for(built: Path) -> None:
    """A router's bias, which is wider than the rest, stays so."""
    (built / "models.toml").write_text(
        '[models.a]\nsource = "checkpoints/glm4_moe_lite"\nlayout = "mlx-vlm-mtp"\n'
        'dtype = "float16"\n'
    )
    inside.doit(built)
    found = mx.load(str(built / "build" / "a" / "model.safetensors"))
    wide = {name for name, array in found.items() if array.dtype == mx.float32}
    assert wide == {"model.mtp_block.mlp.gate.e_score_correction_bias"}
    assert {found[name].dtype for name in found.keys() - wide} == {mx.float16}


@pytest.mark.parametrize(
    ("arch", "drop", "words"),
    [
        (
            "deepseek_v3",
            "",
            "has no drafter for model_type = 'deepseek_v3': it splits one off deep",
        ),
        ("qwen3_5", "mtp.", "none of its tensors predicts further tokens, by the names that"),
    ],
)
def test_what_there_is_no_drafter_of(tmp_path: Path, arch: str, drop: str, words: str) -> None:
    source = mtp_checkpoints.make(arch, tmp_path / "checkpoint")
    if drop:
        file = str(source / "model.safetensors")
        weights = mx.load(file)
        mx.save_safetensors(file, {n: a for n, a in weights.items() if not n.startswith(drop)})
    (tmp_path / "models.toml").write_text(
        '[models.a]\nsource = "checkpoint"\nlayout = "mlx-vlm-mtp"\n'
    )
    done = inside.doit(tmp_path, expect=None)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
    assert done.entries == []


def test_fp8_is_kept_as_mxfp8(tmp_path: Path) -> None:
    """As the peer has it, of the drafter's own tensors: those of the model are not unpacked."""
    from mlx_vlm.split_mtp import split_mtp

    source = mtp_checkpoints.make("qwen3_5", tmp_path / "checkpoint")
    weights = mx.load(str(source / "model.safetensors"))
    for name in [name for name in weights if name.endswith("proj.weight")]:
        weights[name] = mx.to_fp8(weights[name])
        weights[f"{name}_scale_inv"] = mx.full([-(-n // 128) for n in weights[name].shape], 0.5)
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "pt"})
    config = read_json(source / "config.json")
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    split_mtp(str(source), str(tmp_path / "reference"))
    (tmp_path / "models.toml").write_text(
        '[models.a]\nsource = "checkpoint"\nlayout = "mlx-vlm-mtp"\n'
    )
    inside.doit(tmp_path)
    build, reference = tmp_path / "build" / "a", tmp_path / "reference"
    assert [*weight_differences(build, reference)] == []
    assert read_json(build / "config.json") == read_json(reference / "config.json")
    assert read_json(build / "config.json")["quantization"]["mode"] == "mxfp8"


def test_the_lock_alone_says_what_wrote_the_norms(tmp_path: Path) -> None:
    """On another machine, which has no checkpoint: MLX has moved these norms, and nobody does."""
    here, there = tmp_path / "here", tmp_path / "there"
    source = mtp_checkpoints.make("qwen3_5", here / "checkpoint")
    weights = mx.load(str(source / "model.safetensors"))
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "mlx"})
    toml = (
        f'[cache]\nremote = "{(tmp_path / "remote").as_uri()}"\n'
        '[models.a]\nsource = "checkpoint"\nlayout = "mlx-vlm-mtp"\n'
    )
    (here / "models.toml").write_text(toml)
    inside.doit(here)
    there.mkdir()
    for name in ("models.toml", "models.lock"):
        (there / name).write_bytes((here / name).read_bytes())
    assert read_json(there / "models.lock")["sources"]["checkpoint"]["written_by"] == "mlx"
    inside.doit(there, "--locked")
    assert [*weight_differences(there / "build" / "a", here / "build" / "a")] == []
    assert (there / "models.lock").read_bytes() == (here / "models.lock").read_bytes()

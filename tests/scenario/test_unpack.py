"""Checkpoints that their authors ship quantized: the same bits as of the floats they stand for."""

import json
from pathlib import Path

import pytest

from support import checkpoints, inside, packed, peer
from support.differences import weight_differences


def build(folder: Path, source: Path, settings: str = "") -> Path:
    folder.mkdir()
    (folder / "models.toml").write_text(f'[models.model]\nsource = "{source}"\n{settings}\n')
    inside.doit(folder)
    return folder / "build" / "model"


def test_a_class_that_unpacks_by_itself(tmp_path: Path) -> None:
    """DeepSeek's: what it makes of fp8, and splits kv_b_proj of, to the bit."""
    plain = checkpoints.make("deepseek-v3", tmp_path / "checkpoint")
    source = tmp_path / "fp8"
    packed.repack(plain, source, packed.block_fp8(), packed.BLOCK_FP8)
    reference = peer.convert(source, tmp_path / "peer", quantize=True, q_bits=4)
    built = build(tmp_path / "project", source, "quantize = { bits = 4 }")
    assert [*weight_differences(built, reference)] == []
    configs = [json.loads((each / "config.json").read_text()) for each in (built, reference)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("arch", ["qwen3", "qwen3-moe"])
def test_block_fp8(arch: str, tmp_path: Path) -> None:
    """Of classes that have no code for it, as Qwen3-FP8's."""
    source = tmp_path / "fp8"
    plain = packed.repack(
        checkpoints.make(arch, tmp_path / "checkpoint"),
        source,
        packed.block_fp8(),
        packed.BLOCK_FP8,
    )
    settings = 'dtype = "float32"'
    reference = peer.convert(plain, tmp_path / "peer", dtype="float32")
    assert [*weight_differences(build(tmp_path / "project", source, settings), reference)] == []


@pytest.mark.parametrize(
    ("arch", "made", "asked"),
    [
        ("qwen3-moe", {"q_bits": 4}, {}),
        ("llama", {"q_bits": 3, "q_group_size": 32}, {"dtype": "float16"}),
        ("gemma3", {"q_mode": "mxfp4"}, {"dtype": "float16"}),
    ],
)
def test_dequantize(arch: str, made: dict, asked: dict, tmp_path: Path) -> None:
    """As mlx_lm.convert does, alone and before another quantization."""
    plain = checkpoints.make(arch, tmp_path / "checkpoint")
    source = peer.convert(plain, tmp_path / "mlx", quantize=True, **made)
    floats = peer.convert(source, tmp_path / "floats", dequantize=True, **asked)
    again = peer.convert(floats, tmp_path / "again", quantize=True, q_bits=6, **asked)
    lines = "".join(f'{key} = "{value}"\n' for key, value in asked.items())
    variants = "[models.model.variants.six]\nquantize = { bits = 6 }"
    built = build(tmp_path / "project", source, f"dequantize = true\n{lines}{variants}")
    six = built.with_name("model-six")
    for ours, theirs in ((built, floats), (six, again)):
        assert [*weight_differences(ours, theirs)] == []
        configs = [json.loads((each / "config.json").read_text()) for each in (ours, theirs)]
        assert configs[0] == configs[1]

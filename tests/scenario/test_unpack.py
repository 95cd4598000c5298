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


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FORMATS = {
    "block-fp8": (packed.block_fp8(), packed.BLOCK_FP8),
    "fbgemm": (packed.scaled_fp8(), {"quant_method": "fbgemm_fp8"}),
    "modelopt-fp8": (
        packed.scaled_fp8(whole=True),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "float-quantized": (packed.scaled_fp8(), packed.compressed("float-quantized", type="float")),
    "nvfp4": (packed.nvfp4(), packed.compressed("nvfp4-pack-quantized", type="float")),
    "modelopt-nvfp4": (
        packed.nvfp4(modelopt=True),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ),
    "pack-quantized": (
        packed.compressed_integers(4, packs=True, zeros=True),
        packed.compressed("pack-quantized", **INT4, symmetric=False),
    ),
    "pack-quantized-8": (
        packed.compressed_integers(8, packs=True, zeros=False),
        packed.compressed("pack-quantized", **{**INT4, "num_bits": 8}),
    ),
    "int-quantized": (
        packed.compressed_integers(8, packs=False, zeros=True),
        packed.compressed("int-quantized", **{**INT4, "num_bits": 8}),
    ),
    **{
        f"gptq-{bits}": (
            packed.gptq(bits, shuffled=bits == 4, v2=bits == 2),
            {"quant_method": "gptq", "bits": bits, "group_size": 32,
             "checkpoint_format": "gptq_v2" if bits == 2 else "gptq"},
        )
        for bits in (2, 3, 4, 8)
    },
    "awq": (
        packed.awq(),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    ),
    "nf4": (packed.bitsandbytes("nf4"), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp4-nested": (packed.bitsandbytes("fp4", nested=True), {"quant_method": "bitsandbytes"}),
    "int8": (packed.bitsandbytes("int8"), {"quant_method": "bitsandbytes"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, tmp_path: Path) -> None:
    """Of a class that has no code for them: to the bit the floats that they stand for."""
    arch = "qwen3-moe" if name in ("block-fp8", "gptq-4", "nf4") else "qwen3"
    source = tmp_path / "packed"
    pack, settings = FORMATS[name]
    plain = packed.repack(checkpoints.make(arch, tmp_path / "checkpoint"), source, pack, settings)
    reference = peer.convert(plain, tmp_path / "peer", dtype="float32")
    built = build(tmp_path / "project", source, 'dtype = "float32"\ndequantize = true')
    assert [*weight_differences(built, reference)] == []
    configs = [json.loads((each / "config.json").read_text()) for each in (built, reference)]
    assert configs[0] == configs[1]


def test_without_being_asked(tmp_path: Path) -> None:
    """What mlx-lm does not read is unpacked, and then quantized as asked for."""
    source = tmp_path / "packed"
    pack, settings = FORMATS["gptq-4"]
    plain = packed.repack(checkpoints.make("qwen3", tmp_path / "x"), source, pack, settings)
    reference = peer.convert(plain, tmp_path / "peer", quantize=True, q_bits=4)
    built = build(tmp_path / "project", source, "quantize = { bits = 4 }")
    assert [*weight_differences(built, reference)] == []


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

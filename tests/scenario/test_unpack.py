"""Checkpoints that their authors ship quantized: the same bits as of the floats they stand for."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from support import checkpoints, formats, front_door, inside, packed, peer
from support.differences import weight_differences
from tasks.core.errors import CheckpointError
from tasks.tensors import fp8
from tasks.unpack import bitsandbytes


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


PARTS = ("weight", "scales", "biases")


@pytest.mark.parametrize("name", formats.FORMATS)
def test_formats(name: str, tmp_path: Path) -> None:
    """Of a class that has no code for them: to the bit the floats that they stand for."""
    arch = "qwen3-moe" if name in ("block-fp8", "gptq-4", "nf4") else "qwen3"
    source = tmp_path / "packed"
    pack, settings = formats.FORMATS[name]
    plain = packed.repack(checkpoints.make(arch, tmp_path / "checkpoint"), source, pack, settings)
    reference = peer.convert(plain, tmp_path / "peer", dtype="float32")
    built = build(tmp_path / "project", source, 'dtype = "float32"\ndequantize = true')
    assert [*weight_differences(built, reference)] == []
    configs = [json.loads((each / "config.json").read_text()) for each in (built, reference)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("awq", {"group_size": 0}, "group_size = 0, which is no size of a group"),
        ("gptq-4", {"group_size": 10**30}, "which is no size of a group"),
    ],
)
def test_sizes_that_are_none(name: str, changes: dict, said: str, tmp_path: Path) -> None:
    """Zero is no size, and MLX counts in 32 bits."""
    source = tmp_path / "packed"
    pack, settings = formats.FORMATS[name]
    plain = checkpoints.make("qwen3", tmp_path / "checkpoint")
    packed.repack(plain, source, pack, {**settings, **changes})
    project = tmp_path / "project"
    project.mkdir()
    (project / "models.toml").write_text(
        f'[models.model]\nsource = "{source}"\ndequantize = true\n'
    )
    assert said in " ".join(inside.doit(project, "plan", expect=3).stderr.split())


def test_a_block_that_would_be_memory() -> None:
    """A nested one's scales are repeated so many times, whatever weight they are of."""
    state = {"shape": [2, 2], "blocksize": 64, "nested_blocksize": 1 << 31}
    with pytest.raises(CheckpointError, match="blocks of 2147483648 numbers"):
        bitsandbytes._state("a", json.dumps(state).encode())


def test_each_weight_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a build that casts and quantizes it; stages that run one by one make the same of it."""
    source = tmp_path / "packed"
    pack, settings = formats.FORMATS["block-fp8"]
    packed.repack(checkpoints.make("qwen3-moe", tmp_path / "x"), source, pack, settings)
    octets = [
        tensor.size
        for path in source.glob("*.safetensors")
        for tensor in mx.load(str(path)).values()
        if tensor.dtype == mx.uint8
    ]
    decoded: list[int] = []
    scaled = fp8.scaled

    def counted(octets: mx.array, *more: Any) -> mx.array:
        decoded.append(octets.size)
        return scaled(octets, *more)

    monkeypatch.setattr(fp8, "scaled", counted)
    text = 'dtype = "bfloat16"\nquantize = { bits = 4 }'
    built = build(tmp_path / "project", source, text)
    assert sum(decoded) == sum(octets) > 0
    log = front_door.log(tmp_path / "project")
    written = dict.fromkeys(("unshard", "cast", "quantize"), 0)
    for entry in log:
        group = entry["task"].partition(":")[0]
        if group in written:
            written[group] += entry["bytes_written"]
            assert entry["outcome"] == "computed"
            assert entry["seconds"] >= 0
    assert written["unshard"] == written["cast"] == 0 < written["quantize"]  # by whom it is for

    other = tmp_path / "one-by-one"
    other.mkdir()
    (other / "models.toml").write_text(f'[models.model]\nsource = "{source}"\n{text}\n')
    for stage in ("unshard", "cast", "quantize", "pack"):
        inside.doit(other, f"{stage}:model")
    assert sum(decoded) == 4 * sum(octets)
    assert [*weight_differences(built, other / "build" / "model")] == []
    manifests = [
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.glob(".mlx-make/manifests/**/*.json")
        }
        for folder in (tmp_path / "project", other)
    ]
    assert manifests[0] == manifests[1] != {}
    assert "nothing to do" in inside.doit(tmp_path / "project").stdout


def test_without_being_asked(tmp_path: Path) -> None:
    """What mlx-lm does not read is unpacked, and then quantized as asked for."""
    source = tmp_path / "packed"
    pack, settings = formats.FORMATS["gptq-4"]
    plain = packed.repack(checkpoints.make("qwen3", tmp_path / "x"), source, pack, settings)
    reference = peer.convert(plain, tmp_path / "peer", quantize=True, q_bits=4)
    built = build(tmp_path / "project", source, "quantize = { bits = 4 }")
    assert [*weight_differences(built, reference)] == []


@pytest.mark.usefixtures("by_cpu")  # whose floats there are on any machine
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
    built = build(
        tmp_path / "project", source, f'dequantize = true\ndevice = "cpu"\n{lines}{variants}'
    )
    six = built.with_name("model-six")
    for ours, theirs in ((built, floats), (six, again)):
        assert [*weight_differences(ours, theirs)] == []
        configs = [json.loads((each / "config.json").read_text()) for each in (ours, theirs)]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("name", formats.KEPT)
def test_kept(name: str, tmp_path: Path) -> None:
    """The very same values, in MLX's own packing: dequantized, those of the format to the bit."""
    source = tmp_path / "packed"
    pack, settings, setting = formats.KEPT[name]
    arch = "qwen3-moe" if name in ("pack-quantized", "gptq-3", "mxfp4") else "qwen3"
    packed.repack(checkpoints.make(arch, tmp_path / "checkpoint"), source, pack, settings)
    variant = '[models.model.variants.floats]\ndtype = "float32"\ndequantize = true'
    built = build(tmp_path / "project", source, f'dtype = "float16"\n{variant}')
    reference = built.with_name("model-floats")  # equal to the peer's: test_formats
    quantization = json.loads((built / "config.json").read_text())["quantization"]
    tables = [quantization, *(v for v in quantization.values() if isinstance(v, dict))]
    assert setting in [tuple(t[k] for k in ("group_size", "bits", "mode")) for t in tables]
    ours, floats = (mx.load(str(each / "model.safetensors")) for each in (built, reference))
    paths = {name.removesuffix(".scales") for name in ours if name.endswith(".scales")}
    dense = {n for n, a in floats.items() if a.ndim > 1 and not any(k in n for k in packed.KEPT)}
    assert {f"{path}.weight" for path in paths} == dense
    for path in paths:
        how = {**quantization, **quantization.get(path, {})}
        weight, scales, biases = (ours.get(f"{path}.{part}") for part in PARTS)
        if biases is not None:
            scales, biases = (each.astype(mx.float32) for each in (scales, biases))
        options = {key: how[key] for key in ("group_size", "bits", "mode")}
        held = mx.dequantize(weight, scales, biases, **options).astype(mx.float32)
        assert mx.array_equal(held, floats[f"{path}.weight"]), path
    model, _ = mlx_lm.load(str(built))
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()


def test_what_is_kept_is_said(tmp_path: Path) -> None:
    """By default only without loss; asked for, as near as can be; both are told of before."""
    source, awq = tmp_path / "packed", tmp_path / "awq"
    plain = checkpoints.make("qwen3-moe", tmp_path / "checkpoint")
    packed.repack(plain, source, *formats.KEPT["pack-quantized"][:2])
    packed.repack(plain, awq, *formats.FORMATS["awq"])
    project = tmp_path / "project"
    project.mkdir()
    (project / "models.toml").write_text(f"""
[models.same]
source = "{source}"
dtype = "float16"
[models.again]
source = "{source}"
dtype = "float16"
quantize = {{ bits = 4 }}
[models.integers]
source = "{awq}"
dtype = "float16"
[models.integers.variants.kept]
quantize = "keep"
""")
    said = " ".join(inside.doit(project, "plan", expect=1).stdout.split())
    for words in (
        "repacked and not rounded again (4 bits in groups of 32): the very same values",
        'These are rounded again: quantize = "keep" holds their numbers',
        "zero points times scales are rounded to float16, by 0.004 at most",
    ):
        assert words in said
    inside.doit(project)
    floats, kept = (
        mx.load(str(project / "build" / name / "model.safetensors"))
        for name in ("integers", "integers-kept")
    )
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    assert f"{path}.scales" not in floats
    parts = [kept[f"{path}.{part}"] for part in PARTS]
    held = mx.dequantize(*(parts[:1] + [p.astype(mx.float32) for p in parts[1:]]), 32, 4)
    difference = mx.abs(held - floats[f"{path}.weight"].astype(mx.float32))
    assert 0 < mx.max(difference).item() < 0.005 * mx.max(parts[1]).item()
    cards = [
        (project / "build" / n / "README.md").read_text() for n in ("integers", "integers-kept")
    ]
    assert ['quantize = "keep"' in card for card in cards] == [False, True]


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    """Zero points, or bits, that are others than config.json says, or nothing that is packed."""
    plain = checkpoints.make("qwen3", tmp_path / "checkpoint")
    source = tmp_path / "packed"
    packed.repack(plain, source, packed.gptq(4), formats.gptq_settings(4, sym=True))
    few = {"default": {"_type": "IntxWeightOnlyConfig", "weight_dtype": "int2"}}
    of_few = {"quant_method": "torchao", "quant_type": few}
    packed.repack(plain, tmp_path / "few", packed.torchao("Int8"), of_few)
    for folder, settings, words in (
        (source, 'dtype = "float16"', "are not half of their range"),
        (tmp_path / "few", 'quantize = "keep"', "which is none of the numbers from 0 to 3"),
        (plain, 'quantize = "keep"', "no packing"),
        (source, 'quantize = "keep"\ndequantize = true', "beside dequantize"),
    ):
        project = tmp_path / words[:4].strip()
        project.mkdir()
        (project / "models.toml").write_text(f'[models.m]\nsource = "{folder}"\n{settings}\n')
        finished = inside.doit(project, expect=None)
        assert finished.returncode != 0
        assert words in " ".join((finished.stdout + finished.stderr).split())

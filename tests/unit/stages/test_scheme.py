"""What is quantized, by rules and by what the checkpoint is, and what is said of it."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import torch
from mlx_lm.utils import load_model
from msgspec import structs
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from cache.store import Store
from support import checkpoints
from tasks.checkpoints import loaders
from tasks.checkpoints.folder import FolderSource
from tasks.core.errors import CheckpointError, ConfigError
from tasks.core.quantization import Quantize, Rule
from tasks.layouts import architecture
from tasks.layouts.model import Model
from tasks.stages.quantize_scheme import Schemes


def model_of(folder: Path, cache: Path) -> Model:
    memos = Store.at(cache).memos
    return architecture.model(loaders.read(FolderSource(folder), None, memos), memos, "mlx-lm")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("experts")
    return model_of(checkpoints.make("qwen3-moe", folder / "checkpoint"), folder / "cache")


def test_rules_may_have_the_checkpoint_s_names(experts: Model) -> None:
    """MLX has all experts in one, as switch_mlp: its names are matched before the checkpoint's."""
    schemes = [
        Schemes(experts).plan(Quantize(rules=(Rule(match, bits=8),)))
        for match in ("*.switch_mlp.*", "*.experts.*", "model.layers.?.mlp.experts.*.*_proj")
    ]
    assert {s.bits for path, s in schemes[0].settings.items() if "switch_mlp" in path} == {8}
    assert {s.bits for path, s in schemes[0].settings.items() if "self_attn" in path} == {4}
    assert schemes[1:] == schemes[:1] * 2
    part = Quantize(rules=(Rule("*.experts.2.up_proj", bits=8),))
    with pytest.raises(ConfigError, match=r"in one with others, as \S+switch_mlp\.up_proj\. Match"):
        Schemes(experts).plan(part)


def test_a_rule_that_is_nearly_right(experts: Model) -> None:
    wrong = Quantize(rules=(Rule("model.layers.*.mlp.switch_mpl.up_proj", bits=8),))
    with pytest.raises(ConfigError, match=r"near is 'model\.layers\.\*\.mlp\.switch_mlp\.up_proj'"):
        Schemes(experts).plan(wrong)


def test_rules_that_skip_everything(experts: Model) -> None:
    scheme = Schemes(experts).plan(Quantize(rules=(Rule("*", skip=True),)))
    (note,) = scheme.notes
    assert note.startswith("nothing is quantized: rules skip ")


def test_a_checkpoint_that_is_quantized_already(tmp_path: Path) -> None:
    """As the peer: what is quantized stays so, whatever is asked for."""
    source, built = checkpoints.make("llama", tmp_path / "checkpoint"), tmp_path / "built"
    mlx_lm.convert(str(source), str(built), quantize=True, q_bits=4, q_group_size=32)
    model = model_of(built, tmp_path / "cache")
    (first,) = Schemes(model).plan(Quantize(bits=8)).notes
    assert first.startswith("the checkpoint is quantized already, to 4 bits in groups of 32, and ")
    assert "stay so: to 8 bits in groups of 64 is only for those that are not" in first
    assert "or say dequantize = true" in first
    same = Quantize(bits=4, group_size=32)
    assert Schemes(model).plan(same).notes == ()
    (first,) = Schemes(model).plan(replace(same, recipe="mixed_3_6")).notes
    assert "stay so: recipe mixed_3_6 is only for those that are not" in first
    with pytest.raises(ConfigError, match="the checkpoint is quantized already, to 4 bits"):
        Schemes(model).plan(replace(same, rules=(Rule("lm_head", bits=8),)))


@pytest.mark.parametrize("said", [{"mode": "afdine"}, {"mode": []}, {"bits": "4"}, [1], "x"])
def test_a_checkpoint_that_is_quantized_as_nothing_is(said: object, experts: Model) -> None:
    model = structs.replace(experts, config={**experts.config, "quantization": said})
    with pytest.raises(CheckpointError, match=r"config\.json has quantization = "):
        Schemes(model).plan(Quantize(bits=8))


def test_scales_that_are_float32(tmp_path: Path) -> None:
    """As the peer, which casts to what config.json says, if it says anything."""
    folder = checkpoints.make("starcoder2", tmp_path / "checkpoint")
    model = model_of(folder, tmp_path / "cache")
    settings = Schemes(model).plan(Quantize(bits=4)).settings
    (note,) = Schemes(model).float32_scales(settings, None, {})
    assert "are float32, as the checkpoint's weights are (" in note
    for dtype in ("float16", "bfloat16", "float32"):  # the last was asked for
        assert Schemes(model).float32_scales(settings, dtype, {}) == []
    by_rule = {f"{path}.weight": "float32" for path in settings}
    assert Schemes(model).float32_scales(settings, None, by_rule) == []


def test_fp8_without_scales(tmp_path: Path) -> None:
    """The peer loads the bytes as integers, without a word."""
    folder = checkpoints.make("llama-tied", tmp_path / "checkpoint", files=1)
    path = folder / "model.safetensors"
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if "_proj" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    peer, _ = load_model(folder, lazy=True)
    assert peer.model.layers[0].mlp.down_proj.weight.dtype == mx.uint8
    with pytest.raises(CheckpointError, match=r"taken for numbers \(uint8\).*weight_scale_inv"):
        model_of(folder, tmp_path / "cache")
    bits = {
        name: tensor.view(torch.uint16)
        for name, tensor in load_file(path).items()
        if tensor.dtype == torch.float16
    }  # as NumPy has bfloat16
    save_file({**{n: t.half() for n, t in tensors.items()}, **bits}, path)
    with pytest.raises(CheckpointError, match=r"would be uint16, as mlx_lm.convert builds them"):
        model_of(folder, tmp_path / "cache")


def as_fp8(folder: Path, scales: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have a checkpoint's projections in FP8, with a scale of what `scales` makes of (1, 1)."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales(torch.full((1, 1), 2.0))
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("arch", "kind", "scales", "wrong"),
    [
        ("deepseek-v3", None, torch.Tensor.float, ""),
        ("deepseek-v3", None, lambda one: one.to(torch.float8_e8m0fnu), r"scale_inv.*\) would be"),
        ("llama", "ministral3", lambda one: one.bfloat16()[0, 0], r"_proj.weight.*\) would be"),
    ],
)
def test_fp8_that_a_class_takes_for_numbers(
    arch: str,
    kind: str | None,
    scales: Callable[[torch.Tensor], torch.Tensor],
    wrong: str,
    tmp_path: Path,
) -> None:
    """Its weights, or scales that are exponents: nonsense with the peer."""
    rope = {"rope_theta": 1e4, "rope_type": "default", "llama_4_scaling_beta": 0.1}
    rope["original_max_position_embeddings"] = 512
    more = {"model_type": kind, "rope_parameters": rope} if kind else {}
    folder = checkpoints.make(arch, tmp_path / "checkpoint", files=1, **more)
    as_fp8(folder, scales)
    load_model(folder, lazy=True)  # without a word
    if wrong:
        with pytest.raises(CheckpointError, match=f"{wrong} bytes taken for numbers"):
            model_of(folder, tmp_path / "cache")
    else:
        model_of(folder, tmp_path / "cache")


def test_scales_that_are_left_out() -> None:
    notes = architecture._dropped(["a.rotary_emb.inv_freq"], (), "mlx-lm")
    assert notes == ()
    scales, rest = architecture._dropped(["a.weight_scale_inv", "a.input_scale"], (), "mlx-lm")
    assert "1 tensor that mlx-lm leaves out" in scales
    assert scales.endswith("a.weight_scale_inv")
    assert rest.endswith("a.input_scale")

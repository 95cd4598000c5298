"""Quantized checkpoints that the formats' own libraries wrote, beside what those make of them.

Of each format that is installed a small checkpoint is written by its library, and built twice: as
floats in float32, and kept as it is packed, where that is the default. The floats are compared with
the library's own, run in float32, to the bit, and the logits with transformers'. Nothing is
installed: what is missing is named, and left out.

    python benchmarks/formats.py [NAME ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

Tensors = dict[str, Any]
# Of a weight's path and values: its tensors by name, and the floats that the library makes of them.
Packer = Callable[[str, Any], tuple[Tensors, Any]]
KEPT = ("embed_tokens", "lm_head", "norm")  # not quantized
MOST = 1e-3  # of the largest logit, by which logits may differ
CONFIG: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 320,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 1e6,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip


class Case(NamedTuple):
    """A format.

    Attributes:
        package: what writes and reads it, as it is imported.
        settings: what config.json says of it, once the package is there.
        packer: packs a weight; None, ``save`` does all.
        save: writes a checkpoint into a folder, and returns the floats by name.
        by_peer: whether mlx-lm reads it by itself: what is kept then has its roundings.
    """

    package: str
    settings: Callable[[], dict[str, Any]] = dict
    packer: Callable[[], Packer] | None = None
    save: Callable[[Path, Path], Tensors] | None = None
    by_peer: bool = False


def compressed(form: str, **weights: Any) -> Case:
    """compressed-tensors: its own compressors."""

    def scheme() -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))

    def settings() -> dict[str, Any]:
        said = json.loads(scheme().model_dump_json())
        return {
            "quant_method": "compressed-tensors", "format": form, "config_groups": {"g": said},
        }  # fmt: skip

    def packer() -> Packer:
        from compressed_tensors.compressors.base import BaseCompressor
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        compressor, how = BaseCompressor.get_value_from_registry(form), scheme()

        def pack(path: str, weight: Any) -> tuple[Tensors, Any]:
            size = how.weights.group_size or weight.shape[1]
            groups = weight.reshape(len(weight), -1, size)
            least, most = groups.amin(-1), groups.amax(-1)
            whole = None
            if weights.get("strategy") == "tensor_group":
                whole = generate_gparam(weight.amin()[None], weight.amax()[None])
            scale, zero = calculate_qparams(least, most, how.weights, global_scale=whole)
            held = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
            if whole is not None:
                held["weight_global_scale"] = whole
            if how.weights.symmetric:
                del held["weight_zero_point"]
            if weights["type"] == "int":  # as of a model in bfloat16
                held["weight_scale"] = scale.bfloat16()
            tensors = compressor.compress(held, how)
            return {f"{path}.{name}": each for name, each in tensors.items()}, floats(
                tensors, form, how
            )

        return pack

    return Case("compressed_tensors", settings, packer)


def floats(tensors: Tensors, form: str, how: Any) -> Any:
    """Return what compressed-tensors makes of a weight, in float32 and not in its own dtype."""
    import torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    compressor = BaseCompressor.get_value_from_registry(form)
    if "fp4" not in form:
        wide = {"weight_scale": tensors["weight_scale"].float()}
        return compressor.decompress({**tensors, **wide}, how)["weight"]
    scale = compressor._decompress_scale(tensors["weight_scale"], torch.float32)
    rows, columns = tensors["weight_packed"].shape
    numbers = unpack_fp4_from_uint8(tensors["weight_packed"], rows, columns * 2, torch.float32)
    whole = tensors.get("weight_global_scale")
    return dequantize(numbers, scale, args=how.weights, dtype=torch.float32, global_scale=whole)


def gptq(bits: int, *, order: bool, symmetric: bool, form: str = "gptq") -> Case:
    """GPTQModel: its layer for PyTorch, which packs and dequantizes."""
    size = 64

    def settings() -> dict[str, Any]:
        return {
            "quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric,
            "desc_act": order, "checkpoint_format": form,
        }  # fmt: skip

    def packer() -> Packer:
        import torch
        from gptqmodel import QuantizeConfig
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        def pack(path: str, weight: Any) -> tuple[Tensors, Any]:
            rows, columns = weight.shape
            layer = TorchLinear(bits, size, symmetric, order, columns, rows, register_buffers=True)
            at = torch.arange(columns)
            at = at[torch.randperm(columns)] // size if order else at // size
            numbers = torch.zeros(rows, columns // size)
            scale, zero = numbers.clone(), numbers.clone()
            for group in range(columns // size):
                part = weight[:, at == group]
                low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
                if symmetric:
                    high = torch.maximum(high, -low)
                    low = -high
                scale[:, group] = ((high - low) / (2**bits - 1)).half()
                zero[:, group] = (
                    torch.full_like(low, 2 ** (bits - 1))
                    if symmetric
                    else (-low / scale[:, group]).round().clamp(1, 2**bits - 1)
                )
            linear = torch.nn.Linear(columns, rows, bias=False)
            linear.weight.data = weight.clone()
            layer.pack_original(linear, scale, zero, g_idx=at.to(torch.int32))
            layer.post_init()
            layer.scales = layer.scales.float()
            with torch.no_grad():
                floats = layer.dequantize_weight().T.contiguous()
            layer.scales = layer.scales.half()
            tensors = {key: getattr(layer, key).clone() for key in ("qweight", "qzeros")}
            tensors |= {"scales": layer.scales, "g_idx": layer.g_idx}
            if form == "gptq":  # each zero point less one, which the library does in place
                layer.qzero_format(2)
                config = QuantizeConfig(bits=bits, group_size=size)
                convert_gptq_v2_to_v1_format_module(layer, config)
                tensors["qzeros"] = layer.qzeros
            return {f"{path}.{name}": tensor for name, tensor in tensors.items()}, floats

        return pack

    return Case("gptqmodel", settings, packer)


def awq() -> Case:
    """GPTQModel's code for AWQ, which is AutoAWQ's."""
    size = 64

    def packer() -> Packer:
        import torch
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq

        def pack(path: str, weight: Any) -> tuple[Tensors, Any]:
            groups = weight.reshape(len(weight), -1, size)
            low, high = groups.amin(-1), groups.amax(-1)
            scale = ((high - low) / 15).half()
            zero = (-low / scale.float()).round().clamp(0, 15)
            numbers = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
            numbers = numbers.reshape(weight.shape).to(torch.int32)
            packed, zeros = pack_awq(numbers.T.contiguous(), zero.T.contiguous().int(), 4)
            tensors = {"qweight": packed, "qzeros": zeros, "scales": scale.T.contiguous()}
            floats = dequantize_gemm(packed, zeros, tensors["scales"].float(), 4, size)
            return {f"{path}.{n}": t for n, t in tensors.items()}, floats.T.contiguous()

        return pack

    settings = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    return Case("gptqmodel", lambda: settings, packer, by_peer=True)


def bitsandbytes(kind: str, *, twice: bool = False) -> Case:
    """bitsandbytes: its functions on a CPU."""

    def packer() -> Packer:
        from bitsandbytes import functional

        def pack(path: str, weight: Any) -> tuple[Tensors, Any]:
            name = f"{path}.weight"
            if kind == "int8":
                numbers, largest, _ = functional.int8_vectorwise_quant(weight.half())
                floats = functional.int8_vectorwise_dequant(numbers, largest)
                return {name: numbers, f"{path}.SCB": largest}, floats
            packed, state = functional.quantize_4bit(
                weight, quant_type=kind, compress_statistics=twice
            )
            floats = functional.dequantize_4bit(packed, state)
            said = state.as_dict(packed=True)
            return {name: packed} | {f"{name}.{key}": each for key, each in said.items()}, floats

        return pack

    return Case("bitsandbytes", lambda: {"quant_method": "bitsandbytes"}, packer)


def hqq(bits: int, axis: int, size: int) -> Case:
    """HQQ: its layer's state, encoded for safetensors as transformers had it."""

    def packer() -> Packer:
        import torch
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

        config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis)

        def pack(path: str, weight: Any) -> tuple[Tensors, Any]:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            layer = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
            state = layer.state_dict()
            wide = {key: layer.meta[key].float() for key in ("scale", "zero")}
            meta = {**layer.meta, **wide, "compute_dtype": torch.float32}
            floats = Quantizer.dequantize(layer.W_q, meta)
            return {f"{path}.{n}": t.data for n, t in state.items()}, floats

        return pack

    settings = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
    return Case("hqq", lambda: settings, packer)


def quanto(kind: str) -> Case:
    """optimum-quanto: its model class's ``save_pretrained``."""

    def save(plain: Path, folder: Path) -> Tensors:
        import torch
        from optimum import quanto
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
        held = quanto.QuantizedModelForCausalLM.quantize(
            model, weights=getattr(quanto, kind), exclude="lm_head"
        )
        held.save_pretrained(folder)
        floats = {}
        for path, module in model.named_modules():
            if isinstance(module, quanto.QLinear):
                weight = module.weight
                if hasattr(weight, "weight_qbits_tensor"):  # as a kernel takes it
                    weight = weight.weight_qbits_tensor()
                weight._scale = weight._scale.float()
                if hasattr(weight, "_shift"):
                    weight._shift = weight._shift.float()
                floats[f"{path}.weight"] = weight.dequantize().detach()
        return floats

    return Case("optimum.quanto", save=save)


def torchao(kind: str, **more: Any) -> Case:
    """torchao, through transformers."""

    def save(plain: Path, folder: Path) -> Tensors:
        import torch
        from torchao import quantization
        from transformers import AutoModelForCausalLM, TorchAoConfig

        more_of = {key: getattr(torch, value) for key, value in more.items() if key != "group"}
        if "group" in more:
            more_of["granularity"] = quantization.PerGroup(more["group"])
        config = TorchAoConfig(getattr(quantization, kind)(**more_of))
        model = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        )
        model.save_pretrained(folder)
        floats = {}
        for path, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if "torchao" in type(weight).__module__ or hasattr(weight, "qdata"):
                floats[f"{path}.weight"] = _of_torchao(weight)
        return floats

    return Case("torchao", save=save)


def _of_torchao(weight: Any) -> Any:
    """Return torchao's floats in float32, which some of its classes make in another dtype."""
    import torch
    from torchao.quantization.quant_primitives import dequantize_affine

    if not hasattr(weight, "target_dtype"):
        return weight.dequantize(output_dtype=torch.float32)
    numbers = (weight.qdata, weight.block_size, weight.scale.float(), weight.zero_point)
    return dequantize_affine(*numbers, torch.int8, output_dtype=torch.float32)


def fine_grained_fp8() -> Case:
    """FP8 in blocks, which are written here, by transformers' dequantizer."""

    def save(plain: Path, folder: Path) -> Tensors:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM, FineGrainedFP8Config

        packed = {}
        for name, weight in load_file(plain / "model.safetensors").items():
            packed[name] = weight
            if weight.ndim == 2 and not any(kept in name for kept in KEPT):
                rows, columns = weight.shape
                tiles = weight.reshape(rows // 128, 128, columns // 128, 128)
                scale = tiles.abs().amax((1, 3)) / 448
                octets = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
                packed[name] = octets.reshape(rows, columns)
                packed[f"{name}_scale_inv"] = scale
        settings = {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        }  # fmt: skip
        _write(folder, plain, packed, settings)
        asked = FineGrainedFP8Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=asked, device_map="cpu"
        )
        state = model.state_dict()
        return {n: state[n] for n in packed if f"{n}_scale_inv" in packed}

    return Case("transformers", save=save)


INT = {"type": "int", "strategy": "group", "group_size": 64}
CASES: dict[str, Case] = {
    "compressed pack int4": compressed("pack-quantized", num_bits=4, symmetric=True, **INT),
    "compressed pack int4, zeros": compressed("pack-quantized", num_bits=4, symmetric=False, **INT),
    "compressed pack int8": compressed("pack-quantized", num_bits=8, symmetric=True, **INT),
    "compressed int8": compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "compressed fp8": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed nvfp4": compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    ),
    "compressed mxfp4": compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32,
        scale_dtype="torch.uint8", zp_dtype="torch.uint8",
    ),
    **{f"gptq {b}": gptq(b, order=False, symmetric=True) for b in (2, 3, 4, 8)},
    "gptq 4, zeros and order": gptq(4, order=True, symmetric=False),
    "gptq_v2 4": gptq(4, order=False, symmetric=False, form="gptq_v2"),
    "awq": awq(),
    "bitsandbytes nf4": bitsandbytes("nf4"),
    "bitsandbytes nf4, twice": bitsandbytes("nf4", twice=True),
    "bitsandbytes fp4": bitsandbytes("fp4"),
    "bitsandbytes int8": bitsandbytes("int8"),
    **{f"hqq {b}, axis 1": hqq(b, 1, 64) for b in (1, 2, 3, 4, 8)},
    "hqq 4, axis 0": hqq(4, 0, 64),
    **{f"quanto {kind}": quanto(kind) for kind in ("qint2", "qint4", "qint8", "qfloat8")},
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao fp8": torchao("Float8WeightOnlyConfig"),
    "torchao intx 4": torchao("IntxWeightOnlyConfig", weight_dtype="int4", group=32),
    "transformers fp8 in blocks": fine_grained_fp8(),
}  # fmt: skip


def _plain(folder: Path) -> None:
    """Write a small model of random weights, float32, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
    model.save_pretrained(folder)
    words = {f"t{number}": number for number in range(CONFIG["vocab_size"])}
    Tokenizer(models.WordLevel(words, "t0")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write(folder: Path, plain: Path, tensors: Tensors, settings: dict[str, Any]) -> None:
    """Write a checkpoint of these tensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip


def _save(case: Case, plain: Path, folder: Path) -> Tensors:
    """Have a library write a checkpoint; return the floats that it makes of it, by name."""
    if case.save:
        floats = case.save(plain, folder)
    else:
        from safetensors.torch import load_file

        assert case.packer
        pack = case.packer()
        tensors: Tensors = {}
        floats = {}
        for name, weight in load_file(plain / "model.safetensors").items():
            if weight.ndim == 2 and not any(kept in name for kept in KEPT):
                parts, floats[name] = pack(name.removesuffix(".weight"), weight)
                tensors |= parts
            else:
                tensors[name] = weight
        _write(folder, plain, tensors, case.settings())
    for path in plain.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return {name: each.float() for name, each in floats.items()}


def _load(built: Path) -> dict[str, Any]:
    """Return a built model's tensors."""
    import mlx.core as mx

    tensors = mx.load(f"{built}/model.safetensors")
    assert isinstance(tensors, dict)
    return tensors


def _logits(plain: Path, built: Path, floats: Tensors) -> float:
    """Return how far the built model's logits are off, by the largest of transformers'."""
    import mlx.core as mx
    import numpy as np
    import torch
    from mlx_lm.utils import load_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    held = {n: torch.tensor(np.array(a)) for n, a in _load(built).items()}
    model.load_state_dict({**held, **floats})
    ids = list(range(2, 34))
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    ours = np.array(load_model(built)[0](mx.array([ids])))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _kept(built: Path, floats: Tensors) -> tuple[int, int]:
    """Return how many weights are in a packing of MLX's, and how many of these are equal."""
    import mlx.core as mx
    import numpy as np

    tensors = _load(built)
    table = json.loads((built / "config.json").read_text()).get("quantization", {})
    equal = count = 0
    for name, theirs in floats.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in tensors:
            continue
        said = {"mode": "affine", **table, **table.get(path, {})}
        how = {key: said[key] for key in ("group_size", "bits", "mode")}
        affine = how["mode"] == "affine"
        parts = [tensors[f"{path}.{part}"] for part in ("scales", *(["biases"] if affine else []))]
        parts = [part.astype(mx.float32) for part in parts] if affine else parts
        ours = mx.dequantize(tensors[name], *parts, **how).astype(mx.float32)
        count += 1
        equal += bool((np.array(ours) == theirs.numpy()).all())
    return count, equal


def _compare(case: Case, plain: Path, folder: Path) -> tuple[str, bool]:
    """Return a line on one format, and whether it is as it is to be."""
    import numpy as np

    source = folder / "source"
    floats = _save(case, plain, source)
    (folder / "models.toml").write_text(
        f'[models.floats]\nsource = "{source}"\ndtype = "float32"\ndequantize = true\n'
        f'[models.kept]\nsource = "{source}"\ndtype = "float32"\n'
    )
    command = [sys.executable, "-P", "-m", "mlx_make"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return f"not built: {done.stdout[-600:]}{done.stderr[-600:]}", False
    built = folder / "build" / "floats"
    ours = _load(built)
    off = {n: np.abs(np.array(ours[n]) - each.numpy()).max() for n, each in floats.items()}
    equal = sum((np.array(ours[n]) == each.numpy()).all() for n, each in floats.items())
    logits = _logits(plain, built, floats)
    count, same = _kept(folder / "build" / "kept", floats)
    kept = f"{same} of {count} kept" if count else "none kept"
    kept += ", as mlx-lm rounds them" if case.by_peer else ""
    most = "" if equal == len(off) else f" (largest difference {max(off.values()):.2g})"
    line = f"{equal} of {len(off)} equal{most}; logits off by {logits:.1e}; {kept}"
    return line, bool(off) and equal == len(off) and logits <= MOST and (
        same == count or case.by_peer
    )


def _wanted(names: list[str]) -> Iterator[tuple[str, Case]]:
    for name, case in CASES.items():
        if names and not any(name.startswith(each) for each in names):
            continue
        if importlib.util.find_spec(case.package.partition(".")[0]) is None:
            print(f"{name:28} left out: {case.package} is not installed", flush=True)
        else:
            yield name, case


def main() -> int:
    """Compare; return 1 where something is not as it is to be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of formats, or how they begin; default: all")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / "plain"
        _plain(plain)
        for number, (name_of, case) in enumerate(_wanted(asked.names)):
            folder = Path(name) / str(number)
            folder.mkdir()
            try:
                line, good = _compare(case, plain, folder)
            except Exception as error:  # a library that is not as it was: to be told, not to end
                line, good = f"failed: {type(error).__name__}: {error}", False
            failed += not good
            print(f"{name_of:28} {line}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""formats' own libraries: each writes weights, or a checkpoint, and says what these stand for.

``CASES`` has them by name, for ``benchmarks/formats.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Tensors = dict[str, Any]
# Of a weight's path and values: its tensors by name, and the floats that the library makes of them.
Packer = Callable[[str, Any], tuple[Tensors, Any]]
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "router")  # not quantized


class Case(NamedTuple):
    """A format.

    Attributes:
        package: what writes and reads it, as it is imported.
        settings: what config.json says of it, once the package is there.
        packer: packs a weight; None, ``save`` does all.
        save: writes a checkpoint into a folder, and returns the floats by name.
        by_peer: whether mlx-lm reads it by itself: what is kept then has its roundings.
        stacks: whether it packs all experts of a layer in one tensor, where a model has them so.
    """

    package: str
    settings: Callable[[], dict[str, Any]] = dict
    packer: Callable[[], Packer] | None = None
    save: Callable[[Path, Path], Tensors] | None = None
    by_peer: bool = False
    stacks: bool = False


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
            least, most = _extremes(weight, weights)
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


def _extremes(weight: Any, how: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the least and the most of each piece of a weight that has a scale of its own."""
    rows, columns = weight.shape
    high, wide = how.get("block_structure") or (
        rows if how["strategy"] == "tensor" else 1,
        how.get("group_size") or columns,
    )
    tiles = weight.reshape(rows // high, high, columns // wide, wide)
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def floats(tensors: Tensors, form: str, how: Any) -> Any:
    """Return what compressed-tensors makes of a weight, in float32 and not in its own dtype."""
    import torch
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    compressor = BaseCompressor.get_value_from_registry(form)
    if form == "mxfp8-quantized":
        scale = compressor._decompress_scale(tensors["weight_scale"]).float()
        return dequantize(tensors["weight"], scale, args=how.weights, dtype=torch.float32)
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


def torchao(kind: str, *, stacks: bool = False, **more: Any) -> Case:
    """torchao, through transformers."""

    def save(plain: Path, folder: Path) -> Tensors:
        import torch
        from torchao import quantization
        from transformers import AutoModelForCausalLM, TorchAoConfig

        more_of = {key: getattr(torch, value) for key, value in more.items() if key != "group"}
        if "group" in more:
            more_of["granularity"] = quantization.PerGroup(more["group"])
        of_linear = getattr(quantization, kind)(**more_of)
        of_each = {"_default": of_linear}
        if plain.name == "stacked":
            of_each[r"re:.*\.experts\.(gate_up|down)_proj"] = of_linear
        config = TorchAoConfig(quantization.FqnToConfig(of_each))
        model = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        )
        model.save_pretrained(folder)
        floats = {}
        for name, weight in model.named_parameters():
            if "torchao" in type(weight).__module__ or hasattr(weight, "qdata"):
                floats[name] = _of_torchao(weight)
        return floats

    return Case("torchao", save=save, stacks=stacks)


def _of_torchao(weight: Any) -> Any:
    """Return torchao's floats in float32, which some of its classes make in another dtype."""
    import torch
    from torchao.quantization.quant_primitives import dequantize_affine

    if not hasattr(weight, "target_dtype"):
        return weight.dequantize(output_dtype=torch.float32)
    numbers = (weight.qdata, weight.block_size, weight.scale.float(), weight.zero_point)
    return dequantize_affine(*numbers, torch.int8, output_dtype=torch.float32)


def fine_grained_fp8(high: int, wide: int, *, powers: bool = False) -> Case:
    """FP8 in blocks, which are written here, by transformers' dequantizer.

    Args:
        high: rows of a block.
        wide: its columns.
        powers: whether scales are powers of two, a byte each.
    """

    def packer() -> Packer:
        import torch
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        def pack(path: str, weight: Any) -> tuple[Tensors, Any]:
            *lead, rows, columns = weight.shape
            tiles = weight.reshape(*lead, rows // high, high, columns // wide, wide)
            scale = tiles.abs().amax((-3, -1)) / 448
            if powers:
                exponents = scale.log2().ceil()
                scale, held = exponents.exp2(), (exponents + 127).to(torch.uint8)
            else:
                held = scale
            octets = (tiles / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
            octets = octets.reshape(weight.shape)
            name = path if lead else f"{path}.weight"
            floats = Fp8Dequantize(None)._dequantize_one(octets, held, torch.float32)
            return {name: octets, f"{name}_scale_inv": held}, floats

        return pack

    settings = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [high, wide],
    }  # fmt: skip
    return Case("transformers", lambda: settings, packer, stacks=True)


def modelopt(kind: str) -> Case:
    """ModelOpt: its tensors, as its export names them."""

    def packer() -> Packer:
        import torch
        from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

        def pack(path: str, weight: Any) -> tuple[Tensors, Any]:
            if kind == "FP8":
                held, scale = FP8QTensor.quantize(weight)
                tensors = {"weight": held._quantized_data, "weight_scale": scale.reshape(())}
                floats = held.dequantize(torch.float32, scale=scale)
            else:
                held, scale, whole = NVFP4QTensor.quantize(weight, 16)
                tensors = {
                    "weight": held._quantized_data,
                    "weight_scale": scale,
                    "weight_scale_2": whole,
                }
                floats = held.dequantize(
                    torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16}
                )
            tensors["input_scale"] = torch.tensor(0.5)
            return {f"{path}.{name}": each for name, each in tensors.items()}, floats

        return pack

    settings = {"quant_method": "modelopt", "quant_algo": kind, "ignore": ["lm_head"]}
    return Case("modelopt", lambda: settings, packer)


def mixed(kind: str, cases: Mapping[str, Case], settings: Callable[..., dict[str, Any]]) -> Case:
    """Several formats in one checkpoint.

    Args:
        kind: what writes them.
        cases: by a part of the paths of the modules that each is for; the first that is in one.
        settings: what config.json says, of what it would say of each.
    """

    def packer() -> Packer:
        packers = {part: case.packer() for part, case in cases.items() if case.packer}

        def pack(path: str, weight: Any) -> tuple[Tensors, Any]:
            return next(pack for part, pack in packers.items() if part in path)(path, weight)

        return pack

    return Case(kind, lambda: settings(*(case.settings() for case in cases.values())), packer)


def of_groups(*each: dict[str, Any]) -> dict[str, Any]:
    """Return what config.json says of several of compressed-tensors."""
    groups = {}
    patterns = ("re:.*self_attn.*", "re:.*down_proj$", "Linear")
    for number, (said, pattern) in enumerate(zip(each, patterns, strict=True)):
        scheme = {**said["config_groups"]["g"], "targets": [pattern], "format": said["format"]}
        groups[f"group_{number}"] = scheme
    return {
        "quant_method": "compressed-tensors", "format": "mixed-precision",
        "config_groups": groups, "ignore": ["lm_head", "re:.*mlp.gate$"],
    }  # fmt: skip


def dynamic(of_down: dict[str, Any], of_all: dict[str, Any]) -> dict[str, Any]:
    """Return what config.json says where GPTQModel was told others bits of some modules."""
    return {**of_all, "dynamic": {r"+:.*down_proj$": {"bits": of_down["bits"]}, "-:.*lm_head": {}}}


INT = {"type": "int", "strategy": "group", "group_size": 64}
CASES: dict[str, Case] = {
    "compressed pack int4": compressed("pack-quantized", num_bits=4, symmetric=True, **INT),
    "compressed pack int4, zeros": compressed("pack-quantized", num_bits=4, symmetric=False, **INT),
    **{
        f"compressed pack int{width}": compressed(
            "pack-quantized", num_bits=width, symmetric=True, **INT
        )
        for width in (2, 3, 5, 6, 7, 8)
    },
    "compressed pack int3, zeros": compressed("pack-quantized", num_bits=3, symmetric=False, **INT),
    "compressed pack int4 of rows": compressed(
        "pack-quantized", num_bits=4, symmetric=True, type="int", strategy="channel"
    ),
    "compressed int8": compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "compressed fp8": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed int8, zeros": compressed(
        "int-quantized", num_bits=8, symmetric=False, **INT
    ),
    "compressed int8 of tensors": compressed(
        "int-quantized", num_bits=8, type="int", strategy="tensor"
    ),
    "compressed fp8 of tensors": compressed(
        "float-quantized", num_bits=8, type="float", strategy="tensor"
    ),
    "compressed fp8 in blocks": compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]
    ),
    "compressed nvfp4": compressed(
        "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16
    ),
    "compressed mxfp8": compressed(
        "mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32,
        scale_dtype="torch.uint8", zp_dtype="torch.uint8",
    ),
    "compressed mxfp4": compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32,
        scale_dtype="torch.uint8", zp_dtype="torch.uint8",
    ),
    "compressed, three of them": mixed(
        "compressed_tensors",
        {
            "self_attn": compressed(
                "float-quantized", num_bits=8, type="float", strategy="channel"
            ),
            "down_proj": compressed("pack-quantized", num_bits=8, symmetric=True, **INT),
            "": compressed("pack-quantized", num_bits=4, symmetric=False, **INT),
        },
        of_groups,
    ),
    "modelopt fp8": modelopt("FP8"),
    "modelopt nvfp4": modelopt("NVFP4"),
    "gptq, dynamic": mixed(
        "gptqmodel",
        {
            "down_proj": gptq(8, order=True, symmetric=False),
            "": gptq(4, order=True, symmetric=False),
        },
        dynamic,
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
    "torchao int8": torchao("Int8WeightOnlyConfig", stacks=True),
    "torchao fp8": torchao("Float8WeightOnlyConfig", stacks=True),
    "torchao intx 4": torchao("IntxWeightOnlyConfig", weight_dtype="int4", group=32),
    "transformers fp8 in blocks": fine_grained_fp8(128, 128),
    "transformers fp8, powers": fine_grained_fp8(128, 128, powers=True),
    "transformers mxfp8": fine_grained_fp8(1, 32, powers=True),
}  # fmt: skip


def write(folder: Path, plain: Path, tensors: Tensors, settings: dict[str, Any]) -> None:
    """Write a checkpoint of these tensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()},
              folder / "model.safetensors", {"format": "pt"})  # fmt: skip

"""unpacked: the floats that a packed checkpoint stands for, by PyTorch: `packed` read backwards.

Each weight is worked out as the format's own code does it, from what config.json says and what the
file holds, and from nothing else. What does not fit together raises, of whatever type.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from safetensors.torch import load_file

Tensors = Mapping[str, torch.Tensor]
# MLX has no floats of eight bits: of either dtype it is given the bytes.
OCTETS = (torch.uint8, torch.float8_e4m3fn)
WORDS = (torch.int32, torch.uint32)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def floats(folder: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors, those that are packed as what they stand for, in float32.

    What belongs to a packed weight, or to activations, is left out.

    Raises:
        Exception: it holds something else.
    """
    config = json.loads((folder / "config.json").read_bytes())
    if "quantization_config" not in config:
        return _mlx(config["quantization"], mx.load(str(folder / "model.safetensors")))
    settings = config["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    unpack = FORMATS[settings["quant_method"]]
    found = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if part == "weight" and (weight := unpack(settings, tensors, path)) is not None:
            found[name] = weight
        elif part in ("qweight", "weight_packed"):
            found[f"{path}.weight"] = unpack(settings, tensors, path)
        elif tensor.ndim < 3 and part not in PARTS and ".weight." not in name:
            found[name] = tensor.float()
    return found


PARTS = ("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "input_scale",
         "weight_zero_point", "weight_shape", "weight_g_idx", "qzeros", "scales", "g_idx", "SCB",
         "weight_format")  # fmt: skip


def _mlx(settings: dict, tensors: dict[str, mx.array]) -> dict[str, torch.Tensor]:
    """As ``mlx_lm.utils.dequantize_model`` after a cast to float32."""
    found = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if f"{path}.scales" not in tensors:
            found[name] = tensor.astype(mx.float32)
        elif part == "weight":
            said = {**settings, **settings.get(path, {})}
            others = (tensors[f"{path}.{each}"].astype(mx.float32) for each in ("scales", "biases"))
            mode = said.get("mode", "affine")
            _check(mode == "affine" and tensor.dtype == mx.uint32)
            found[name] = mx.dequantize(tensor, *others, said["group_size"], said["bits"], mode)
    return {name: torch.from_numpy(np.array(array)) for name, array in found.items()}


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError("the tensors do not fit together")


def _fp8(settings: dict, tensors: Tensors, path: str) -> torch.Tensor | None:
    weight = tensors[f"{path}.weight"]
    scale = tensors.get(f"{path}.weight_scale_inv")
    if scale is None or weight.itemsize != 1:
        return None
    weight = weight.view(torch.float8_e4m3fn)
    rows, columns = weight.shape
    if scale.dtype in OCTETS:
        if tuple(scale.shape) == (rows, columns // 32) and columns % 32 == 0:
            return weight.float() * _powers(scale).repeat_interleave(32, 1)
        scale = _powers(scale)
    _check(scale.dtype in (torch.float32, torch.bfloat16, torch.float16))
    if scale.numel() == 1:
        return weight.float() * scale.float().reshape(())
    match settings.get("weight_block_size"):
        case [int() as high, int() as wide] if high > 0 and wide > 0:
            pass
        case _:
            high = wide = 128
    _check(tuple(scale.shape) == (-(-rows // high), -(-columns // wide)))
    by_row = scale.float()[torch.arange(rows) // high]
    return weight.float() * by_row[:, torch.arange(columns) // wide]


def _powers(exponents: torch.Tensor) -> torch.Tensor:
    """What bytes of E8M0 stand for."""
    return exponents.view(torch.float8_e8m0fnu).float()


def _stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Numbers of a stream of bits down each column: (count, columns)."""
    each = (words.long()[:, None] >> torch.arange(32)[:, None]) & 1
    flat = each.reshape(-1, words.shape[1])[: count * bits].reshape(count, bits, -1)
    return (flat << torch.arange(bits)[:, None]).sum(1)


def _gptq(settings: dict, tensors: Tensors, path: str) -> torch.Tensor | None:
    if f"{path}.qweight" not in tensors:
        return None
    words, zeros, scales = (tensors[f"{path}.{p}"] for p in ("qweight", "qzeros", "scales"))
    bits, size = settings["bits"], settings.get("group_size", 128)
    _check(bits in (2, 3, 4, 8) and not settings.get("dynamic"))
    _check(words.dtype in WORDS and zeros.dtype in WORDS and scales.is_floating_point())
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    _check(columns * bits == words.shape[0] * 32 and zeros.shape[1] * 32 == rows * bits)
    _check(len(scales) == len(zeros))
    if size == -1:
        size = columns
    group_of = torch.arange(columns) // size
    if f"{path}.g_idx" in tensors:
        group_of = tensors[f"{path}.g_idx"]
        _check(group_of.dtype == torch.int32 and group_of.shape == (columns,))
        _check(bool((group_of >= 0).all()))
        group_of = group_of.long()
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    zero = _stream(zeros.T, bits, rows) + offset
    numbers = _stream(words, bits, columns).T
    _check(scales.shape[1] == rows)
    return (numbers - zero[:, group_of]).float() * scales.float().T[:, group_of]


def _awq(settings: dict, tensors: Tensors, path: str) -> torch.Tensor | None:
    if f"{path}.qweight" not in tensors:
        return None
    words, zeros, scales = (tensors[f"{path}.{p}"] for p in ("qweight", "qzeros", "scales"))
    _check(settings.get("bits", settings.get("w_bit", 4)) == 4)
    _check(str(settings.get("version", "gemm")).lower() == "gemm")
    _check(words.dtype in WORDS and zeros.dtype in WORDS and scales.is_floating_point())
    columns = len(words)

    def numbers(packed: torch.Tensor) -> torch.Tensor:
        each = (packed.long()[..., None] >> 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])) & 15
        return each.reshape(len(packed), -1)

    size = columns // len(scales)
    _check(size * len(scales) == columns and zeros.shape[0] == len(scales))
    _check("group_size" not in settings or settings["group_size"] in (size, -1))
    at = torch.arange(columns) // size
    made = (numbers(words) - numbers(zeros)[at]).float() * scales.float()[at]
    return made.T.contiguous()


def _state(tensors: Tensors, weight: str) -> dict | None:
    for kind in ("nf4", "fp4"):
        text = tensors.get(f"{weight}.quant_state.bitsandbytes__{kind}")
        if text is not None:
            return json.loads(text.view(torch.uint8).numpy().tobytes())
    return None


def _bitsandbytes(settings: dict, tensors: Tensors, path: str) -> torch.Tensor | None:
    weight = f"{path}.weight"
    numbers = tensors[weight]
    if (largest := tensors.get(f"{path}.SCB")) is not None and numbers.dtype == torch.int8:
        _check(largest.shape == numbers.shape[:1] and largest.is_floating_point())
        return numbers.float() * largest.float()[:, None] * (1 / 127)
    if (state := _state(tensors, weight)) is None:
        return None
    absmax, codes = tensors[f"{weight}.absmax"], tensors[f"{weight}.quant_map"]
    _check(codes.shape == (16,) and numbers.dtype in OCTETS)
    count = state["shape"][0] * state["shape"][1]
    _check(numbers.numel() * 2 == count)
    if state.get("nested_blocksize"):
        steps = tensors[f"{weight}.nested_quant_map"].float()
        scales = tensors[f"{weight}.nested_absmax"].float()
        _check(absmax.dtype in OCTETS and steps.shape == (256,))
        at = torch.arange(absmax.numel()) // state["nested_blocksize"]
        absmax = steps[absmax.view(torch.uint8).long()] * scales[at] + torch.tensor(
            state.get("nested_offset", 0.0), dtype=torch.float32
        )
    _check(absmax.is_floating_point() and absmax.ndim == 1)
    octets = numbers.view(torch.uint8).reshape(-1)
    index = torch.stack([octets >> 4, octets & 15], 1).reshape(-1)
    at = torch.arange(count) // state["blocksize"]
    return (codes.float()[index.long()] * absmax.float()[at]).reshape(state["shape"])


def _e2m1(octets: torch.Tensor) -> torch.Tensor:
    octets = octets.view(torch.uint8)
    halves = torch.stack([octets & 15, octets >> 4], -1).reshape(len(octets), -1)
    return torch.cat([E2M1, -E2M1])[halves.long()]


def _modelopt(settings: dict, tensors: Tensors, path: str) -> torch.Tensor | None:
    if (whole := tensors.get(f"{path}.weight_scale_2")) is None:
        return None
    weight, scale = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
    _check(weight.dtype in OCTETS and scale.dtype in OCTETS)
    _check(tuple(scale.shape) == (len(weight), weight.shape[1] // 8) and whole.numel() == 1)
    each = scale.view(torch.float8_e4m3fn).float() * whole.float().reshape(())
    return _e2m1(weight) * each.repeat_interleave(16, 1)


def _compressed(settings: dict, tensors: Tensors, path: str) -> torch.Tensor | None:
    scale = tensors.get(f"{path}.weight_scale")
    if scale is None:
        return None
    if (whole := tensors.get(f"{path}.weight_global_scale")) is not None:
        weight = tensors[f"{path}.weight_packed"]
        _check(weight.dtype in OCTETS and scale.dtype in OCTETS)
        _check(tuple(scale.shape) == (len(weight), weight.shape[1] // 8) and whole.numel() == 1)
        each = scale.view(torch.float8_e4m3fn).float() / whole.float().reshape(())
        return _e2m1(weight) * each.repeat_interleave(16, 1)
    weight = tensors.get(f"{path}.weight")
    if weight is not None and weight.dtype in OCTETS and scale.dtype in OCTETS:
        _check(tuple(scale.shape) == (len(weight), weight.shape[1] // 32))
        return weight.view(torch.float8_e4m3fn).float() * _powers(scale).repeat_interleave(32, 1)
    _check(scale.is_floating_point() and scale.itemsize > 1)
    if (weight := tensors.get(f"{path}.weight")) is not None and weight.dtype in OCTETS:
        _check(tuple(scale.shape) in ((len(weight), 1), weight.shape[:1]) or scale.numel() == 1)
        return weight.view(torch.float8_e4m3fn).float() * scale.float().reshape(-1, 1)
    (group, *_) = (each["weights"] for each in settings["config_groups"].values())
    if (weight := tensors.get(f"{path}.weight")) is not None:
        _check(weight.dtype == torch.int8)
        numbers, half = weight.float(), 0
    else:
        words, bits = tensors[f"{path}.weight_packed"], group["num_bits"]
        _check(words.dtype in WORDS and bits in range(1, 9) and words.ndim == 2)
        half = 2 ** (bits - 1)
        columns = int(tensors[f"{path}.weight_shape"][-1])
        if scale.ndim == 2 and scale.shape[1] > 1 and (group.get("group_size") or -1) > 0:
            columns = scale.shape[1] * group["group_size"]
        _check(words.shape[1] == -(-columns * bits // 32) > 0)
        numbers = (_stream(words.T, bits, columns).T - half).float()
    rows, columns = numbers.shape
    _check(scale.ndim == 2 and scale.shape[0] == rows)
    size = group.get("group_size") or -1
    size = columns if scale.shape[1] == 1 else size
    _check(size > 0 and -(-columns // size) == scale.shape[1])
    at = torch.arange(columns) // size
    zero = tensors.get(f"{path}.weight_zero_point")
    if zero is not None:
        if half:
            _check(zero.dtype in WORDS)
            _check(zero.ndim == 2 and len(zero) == -(-rows * bits // 32))
            zero = _stream(zero, bits, rows) - half
        else:
            _check(zero.dtype == torch.int8)
        _check(tuple(zero.shape) == tuple(scale.shape))
        numbers = numbers - zero.float()[:, at]
    return numbers * scale.float()[:, at]


FORMATS = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
}

"""packed: small checkpoints as their authors ship them quantized, and the floats they stand for."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Packer = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "e_score")  # not quantized


def repack(source: Path, folder: Path, pack: Packer, settings: dict) -> Path:
    """Write a checkpoint whose linear weights are packed; return the folder of the plain one.

    Args:
        source: a checkpoint of `checkpoints.make`.
        folder: of the packed one. Beside it, FOLDER-plain has the floats, float32.
        pack: returns a weight's tensors by their names, and what it stands for.
        settings: what `config.json` says of it.
    """
    plain = folder.with_name(f"{folder.name}-plain")
    for each in (folder, plain):
        each.mkdir(parents=True)
        for path in source.glob("*.json"):
            if "index" not in path.name:
                (each / path.name).write_bytes(path.read_bytes())
    tensors = {
        n: t for path in source.glob("model*.safetensors") for n, t in load_file(path).items()
    }
    packed, floats = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or any(kept in name for kept in KEPT):
            packed[name] = floats[name] = tensor
            continue
        parts, floats[name] = pack(name.removesuffix(".weight"), tensor.float())
        packed |= parts
    packed = {name: tensor.contiguous().clone() for name, tensor in packed.items()}
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    save_file(floats, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if settings["quant_method"] == "quanto":  # which says so in a file of its own alone
        kinds = {name.removesuffix(".weight"): {"weights": "qint4"} for name in floats}
        (folder / "quanto_qmap.json").write_text(json.dumps(kinds))
        return plain
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return plain


def block_fp8(
    block: int = 128, *, scale_dtype: torch.dtype = torch.float32, powers: bool = False
) -> Packer:
    """As DeepSeek and Qwen: E4M3, and a scale for each block, or the exponent of one."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = weight.shape
        down, across = -(-rows // block), -(-columns // block)
        wide = torch.zeros(down * block, across * block)
        wide[:rows, :columns] = weight
        tiles = wide.reshape(down, block, across, block)
        scale = (tiles.abs().amax((1, 3)) / 448).to(scale_dtype)
        scale = scale.log2().ceil().exp2() if powers else scale
        each = scale.float()[:, None, :, None].clamp_min(1e-12)
        octets = (tiles / each).to(torch.float8_e4m3fn)
        floats = (octets.float() * scale.float()[:, None, :, None]).reshape(wide.shape)
        numbers = octets.reshape(wide.shape)[:rows, :columns].contiguous()
        scale = (scale.log2() + 127).to(torch.uint8) if powers else scale
        parts = {f"{path}.weight": numbers, f"{path}.weight_scale_inv": scale}
        return parts, floats[:rows, :columns].contiguous()

    return pack


def scaled_fp8(*, whole: bool = False) -> Packer:
    """As FBGEMM and compressed-tensors: E4M3, and a scale for each row, or for all."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        largest = weight.abs().amax() if whole else weight.abs().amax(1, keepdim=True)
        scale = largest / 448
        octets = (weight / scale).to(torch.float8_e4m3fn)
        parts = {
            f"{path}.weight": octets,
            f"{path}.weight_scale": scale,
            f"{path}.input_scale": scale,
        }
        return parts, octets.float() * scale

    return pack


def nvfp4(*, modelopt: bool = False, whole: bool = True) -> Packer:
    """As compressed-tensors and ModelOpt: E2M1 in groups of 16, scales of E4M3, and one of all."""
    has_one_of_all = whole

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        groups = weight.reshape(len(weight), -1, 16)
        whole = weight.abs().amax() / (448 * 6) if has_one_of_all else torch.tensor(1.0)
        scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
        each = (scale.float() * whole)[..., None]
        index = ((groups / each).abs()[..., None] - numbers).abs().argmin(-1)
        codes = (index + 8 * (groups < 0)).reshape(len(weight), -1).to(torch.uint8)
        octets = codes[:, ::2] | codes[:, 1::2] << 4
        signed = torch.cat([numbers, -numbers])[codes.long()].reshape(groups.shape)
        if modelopt:
            parts = {"weight": octets, "weight_scale": scale, "weight_scale_2": whole}
            floats = signed * each
        else:
            whole = (1 / whole).reshape(1)
            parts = {"weight_packed": octets, "weight_scale": scale, "weight_global_scale": whole}
            floats = signed * (scale.float() / whole)[..., None]
        if not has_one_of_all:
            del parts["weight_global_scale"]
        return {f"{path}.{name}": part for name, part in parts.items()}, floats.reshape(
            weight.shape
        )

    return pack


def mxfp4() -> Packer:
    """As compressed-tensors: E2M1 in groups of 32, scales that are powers of two."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        numbers = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        groups = weight.reshape(len(weight), -1, 32)
        exponent = (groups.abs().amax(-1).log2().floor() - 2).clamp(-127, 127)
        each = torch.exp2(exponent)[..., None]
        index = ((groups / each).abs()[..., None] - numbers).abs().argmin(-1)
        codes = (index + 8 * (groups < 0)).reshape(len(weight), -1).to(torch.uint8)
        signed = torch.cat([numbers, -numbers])[codes.long()].reshape(groups.shape)
        parts = {
            f"{path}.weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
            f"{path}.weight_scale": (exponent + 127).to(torch.uint8),
        }
        return parts, (signed * each).reshape(weight.shape)

    return pack


def mxfp8() -> Packer:
    """As compressed-tensors: E4M3 in groups of 32, scales that are powers of two."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = weight.reshape(len(weight), -1, 32)
        exponent = (groups.abs().amax(-1) / 448).log2().ceil()
        octets = (groups / exponent.exp2()[..., None]).to(torch.float8_e4m3fn)
        floats = (octets.float() * exponent.exp2()[..., None]).reshape(weight.shape)
        scale = (exponent + 127).to(torch.uint8)
        return {
            f"{path}.weight": octets.reshape(weight.shape),
            f"{path}.weight_scale": scale,
        }, floats

    return pack


def _affine(
    weight: torch.Tensor, bits: int, size: int, *, symmetric: bool = False
) -> tuple[torch.Tensor, ...]:
    """Numbers, zero points and scales (float16) of groups of columns."""
    groups = weight.reshape(len(weight), -1, size)
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero
    numbers = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return numbers.reshape(weight.shape).long(), zero.long(), scale


def _stream(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers as a stream of bits down each column, in words: (words, columns)."""
    each = (numbers[:, None] >> torch.arange(bits)[:, None]) & 1  # numbers, bits, columns
    words = each.reshape(-1, 32, numbers.shape[1]) << torch.arange(32)[:, None]
    return words.sum(1).to(torch.uint32).view(torch.int32)


def gptq(
    bits: int, *, size: int = 32, shuffled: bool = False, v2: bool = False, symmetric: bool = False
) -> Packer:
    """As AutoGPTQ and GPTQModel."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        columns = weight.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
        order = order if shuffled else torch.arange(columns)
        numbers, zero, scale = _affine(weight[:, order], bits, size, symmetric=symmetric)
        group_of = torch.empty(columns, dtype=torch.int32)
        group_of[order] = torch.arange(columns, dtype=torch.int32) // size
        back = torch.argsort(order)
        numbers = numbers[:, back]
        zero = zero.clamp_min(0 if v2 else 1)
        at = group_of.long()
        floats = (numbers - zero[:, at]).float() * scale.float()[:, at]
        parts = {
            "qweight": _stream(numbers.T, bits),
            "qzeros": _stream(zero - (0 if v2 else 1), bits).T.contiguous(),
            "scales": scale.T.contiguous(),
            "g_idx": group_of,
        }
        return {f"{path}.{name}": part for name, part in parts.items()}, floats

    return pack


def awq(size: int = 32) -> Packer:
    """As AutoAWQ's gemm."""
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def words(numbers: torch.Tensor) -> torch.Tensor:
        each = numbers.reshape(len(numbers), -1, 8)[..., order] << (4 * torch.arange(8))
        return each.sum(-1).to(torch.uint32).view(torch.int32)

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        numbers, zero, scale = _affine(weight, 4, size)
        at = torch.arange(weight.shape[1]) // size
        parts = {
            "qweight": words(numbers.T.contiguous()),
            "qzeros": words(zero.T.contiguous()),
            "scales": scale.T.contiguous(),
        }
        floats = (numbers - zero[:, at]).float() * scale.float()[:, at]
        return {f"{path}.{name}": part for name, part in parts.items()}, floats

    return pack


def compressed_integers(bits: int, *, packs: bool, zeros: bool, size: int = 32) -> Packer:
    """As compressed-tensors' pack-quantized and int-quantized; size 0: a scale for each row."""

    def words(numbers: torch.Tensor) -> torch.Tensor:
        short = -numbers.shape[1] % 32  # numbers of whole words
        stream = _stream(torch.nn.functional.pad(numbers, (0, short)).T, bits).T
        return stream[:, : -(-numbers.shape[1] * bits // 32)].contiguous()

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        half = 2 ** (bits - 1)
        numbers, zero, scale = _affine(weight, bits, size or weight.shape[1])
        zero = zero if zeros else torch.full_like(zero, half)
        at = torch.arange(weight.shape[1]) // (size or weight.shape[1])
        floats = (numbers - zero[:, at]).float() * scale.float()[:, at]
        parts = {"weight_scale": scale}
        if packs:
            parts["weight_packed"] = words(numbers)
            parts["weight_shape"] = torch.tensor(weight.shape)
        else:
            parts["weight"] = (numbers - half).to(torch.int8)
        if zeros and packs:
            parts["weight_zero_point"] = words(zero.T.contiguous()).T.contiguous()
        elif zeros:
            parts["weight_zero_point"] = (zero - half).to(torch.int8)
        return {f"{path}.{name}": part for name, part in parts.items()}, floats

    return pack


def by_path(packers: dict[str, Packer]) -> Packer:
    """As of several formats: each weight by the first whose pattern its path has."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        return next(packers[each] for each in packers if re.search(each, path))(path, weight)

    return pack


def bitsandbytes(kind: str, *, nested: bool = False, block: int = 64) -> Packer:
    """As bitsandbytes' NF4 and FP4, and its 8 bits."""
    codes = torch.linspace(-1, 1, 16) ** 3 if kind == "nf4" else torch.linspace(-1, 1, 16)

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        if kind == "int8":
            largest = weight.abs().amax(1)
            numbers = (weight * 127 / largest[:, None]).round().to(torch.int8)
            floats = numbers.float() * largest[:, None] * (1 / 127)
            return {f"{path}.weight": numbers, f"{path}.SCB": largest}, floats
        blocks = weight.reshape(-1, block)
        absmax = blocks.abs().amax(1)
        parts = {"quant_map": codes}
        state = {
            "quant_type": kind,
            "blocksize": block,
            "shape": [*weight.shape],
            "dtype": "bfloat16",
        }
        if nested:
            steps = torch.linspace(-1, 1, 256)
            offset = float(absmax.mean())
            rest = absmax - offset
            padded = torch.nn.functional.pad(rest, (0, -len(rest) % 256)).reshape(-1, 256)
            largest = padded.abs().amax(1)
            at = torch.arange(len(rest)) // 256
            octets = ((rest / largest[at])[:, None] - steps).abs().argmin(1).to(torch.uint8)
            absmax = steps[octets.long()] * largest[at] + offset
            parts |= {"absmax": octets, "nested_absmax": largest, "nested_quant_map": steps}
            state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        else:
            parts["absmax"] = absmax
        index = ((blocks / absmax[:, None])[..., None] - codes).abs().argmin(-1).to(torch.uint8)
        floats = (codes[index.long()] * absmax[:, None]).reshape(weight.shape)
        flat = index.reshape(-1)
        text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        parts[f"quant_state.bitsandbytes__{kind}"] = text
        tensors = {f"{path}.weight.{name}": part for name, part in parts.items()}
        tensors[f"{path}.weight"] = (flat[::2] << 4 | flat[1::2])[:, None]
        return tensors, floats

    return pack


def _parts(numbers: torch.Tensor, bits: int, parts: int, *, lowest_first: bool) -> torch.Tensor:
    """Rows in so many parts, which share bytes or words."""
    high = -(-len(numbers) // parts)
    numbers = torch.nn.functional.pad(numbers, (0, 0, 0, high * parts - len(numbers)))
    places = range(parts) if lowest_first else reversed(range(parts))
    pieces = zip(numbers.reshape(parts, high, -1), places, strict=True)
    return sum(piece << (bits * place) for piece, place in pieces)


def hqq(bits: int, *, size: int = 32) -> Packer:
    """As HQQ, of 3 and 4 bits, along rows."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        numbers, zero, scale = _affine(weight, bits, size)
        zero, scale = (zero.reshape(-1, 1) + 0.25).half(), scale.reshape(-1, 1)
        grouped = numbers.reshape(-1, size)
        floats = (grouped - zero.float()) * scale.float()
        words = _parts(grouped, bits, 10 if bits == 3 else 2, lowest_first=False)
        said = {"nbits": bits, "axis": 1, "group_size": size, "shape": [*weight.shape]}
        parts = {name: torch.tensor(value, dtype=torch.int32) for name, value in said.items()}
        parts |= {
            "W_q": words.to(torch.int32 if bits == 3 else torch.uint8),
            "scale": scale,
            "zero": zero,
        }
        tensors = {f"{path}.{name}": part for name, part in parts.items()}
        return tensors, floats.reshape(weight.shape)

    return pack


def quanto(size: int = 32) -> Packer:
    """As optimum-quanto, of 4 bits."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        numbers, zero, scale = _affine(weight, 4, size)
        scale = scale.reshape(-1, 1)
        shift = (zero.reshape(-1, 1) * scale.float()).half()
        grouped = numbers.reshape(-1, size)
        floats = grouped * scale.float() - shift.float()
        octets = _parts(grouped, 4, 2, lowest_first=True).to(torch.uint8)
        parts = {"_data._data": octets, "_scale": scale, "_shift": shift}
        tensors = {f"{path}.weight.{name}": part for name, part in parts.items()}
        return tensors, floats.reshape(weight.shape)

    return pack


def torchao(kind: str, *, size: int = 32) -> Packer:
    """As torchao: two numbers a byte, one a byte, or E4M3."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        if kind == "fp8":
            scale = weight.abs().amax(1, keepdim=True) / 448
            octets = (weight / scale).to(torch.float8_e4m3fn)
            parts, floats = {"qdata": octets, "scale": scale}, octets.float() * scale
        else:
            numbers, zero, scale = _affine(weight, 4, size)
            signed, at = numbers - 8, torch.arange(weight.shape[1]) // size
            if kind == "Int4":
                shift = (scale.float() * (8.25 - zero)).half()
                octets = (signed[:, ::2] & 15 | (signed[:, 1::2] & 15) << 4).to(torch.uint8)
                parts = {"qdata": octets.view(torch.int8), "scale": scale.T, "zero_point": shift.T}
                floats = signed * scale.float()[:, at] + shift.float()[:, at]
            else:
                zero = (zero - 8).to(torch.int8)
                parts = {"qdata": signed.to(torch.int8), "scale": scale, "zero_point": zero}
                floats = (signed - zero[:, at]).float() * scale.float()[:, at]
        return {f"{path}._weight_{name}": part for name, part in parts.items()}, floats

    return pack


def compressed(form: str, **weights: object) -> dict:
    """What `config.json` says of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }


BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
             "activation_scheme": "dynamic"}  # fmt: skip

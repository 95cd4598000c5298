"""packed: small checkpoints as their authors ship them quantized, and the floats they stand for."""

import json
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
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    save_file(floats, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return plain


def block_fp8(block: int = 128, *, scale_dtype: torch.dtype = torch.float32) -> Packer:
    """As DeepSeek and Qwen: E4M3, and a scale for each block."""

    def pack(path: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = weight.shape
        down, across = -(-rows // block), -(-columns // block)
        wide = torch.zeros(down * block, across * block)
        wide[:rows, :columns] = weight
        tiles = wide.reshape(down, block, across, block)
        scale = (tiles.abs().amax((1, 3)) / 448).to(scale_dtype)
        each = scale.float()[:, None, :, None].clamp_min(1e-12)
        octets = (tiles / each).to(torch.float8_e4m3fn)
        floats = (octets.float() * scale.float()[:, None, :, None]).reshape(wide.shape)
        numbers = octets.reshape(wide.shape)[:rows, :columns].contiguous()
        parts = {f"{path}.weight": numbers, f"{path}.weight_scale_inv": scale}
        return parts, floats[:rows, :columns].contiguous()

    return pack


BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
             "activation_scheme": "dynamic"}  # fmt: skip

"""scaled_fp8: 8-bit floats (E4M3) with ``weight_scale``: of a tensor, its rows or blocks.

As FBGEMM (``quant_method = "fbgemm_fp8"``, a scale for each row), compressed-tensors
(``float-quantized``; ``quantization/lifecycle/forward.py``) and ModelOpt (``FP8``, one scale) have
it: all multiply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from tasks.core.errors import CheckpointError
from tasks.tensors.rows import Rows
from tasks.unpack.block_fp8 import BlockFp8
from tasks.unpack.packed import FLOATS, Found, Packed, Read, Tensors, activations, groups

METHODS: tuple[str, ...] = ("fbgemm_fp8", "compressed-tensors", "modelopt", "fp8")
NAME = "scaled_fp8"
OF_EXPERTS = "_proj_scale"  # where FBGEMM has all of a layer in one tensor


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights of bytes that have ``weight_scale``, of floats, beside them."""
    packed = {}
    for scale in (name for name in tensors if name.endswith(("weight_scale", OF_EXPERTS))):
        name = scale.removesuffix("_scale")
        if name not in tensors or tensors[name].dtype != "uint8":
            continue
        if tensors[scale].dtype not in FLOATS:  # of four bits
            continue
        shape = tensors[name].shape
        how = {"block": _block(settings, tensors, scale, shape)}
        packed[name] = Packed(shape, (name, scale), how)
    return Found(NAME, packed, activations(tensors)) if packed else None


def _block(
    settings: Mapping[str, Any], tensors: Tensors, scale: str, shape: tuple[int, ...]
) -> list[int]:
    """Return the rows and columns of what shares a scale.

    Raises:
        CheckpointError: its shape fits none.
    """
    sides = tuple(tensors[scale].shape)
    rows, columns = shape[-2:]
    if scale.endswith(OF_EXPERTS):  # of each expert's outputs, which are its columns there
        if len(shape) != 3 or sides not in ((shape[0], 1, columns), (shape[0], columns, 1)):
            raise CheckpointError(_unfit(scale, sides, shape))
        return [rows, 1]
    if prod(sides) == 1 and len(shape) == 2:
        return [rows, columns]
    if sides in ((*shape[:-1], 1), shape[:-1]):
        return [1, columns]
    if len(shape) == 3 and prod(sides) == shape[0]:
        return [rows, columns]
    for group in groups(settings):
        match group.get("block_structure"):
            case [int() as high, int() as wide]:
                if sides == (*shape[:-2], -(-rows // high), -(-columns // wide)):
                    return [high, wide]
    raise CheckpointError(_unfit(scale, sides, shape))


def _unfit(scale: str, sides: tuple[int, ...], shape: tuple[int, ...]) -> str:
    return (
        f"{scale} has shape {sides}, which fits neither the rows nor the blocks of {shape}. Get "
        "the checkpoint in bfloat16."
    )


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the product of a weight and its scales."""
    weight, scale = sources
    return BlockFp8(weight, scale, shape, *settings["block"])


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return what the scales take once they are float32."""
    return 4 * nbytes[1]

"""nvfp4: 4-bit floats (E2M1) in groups of 16, with a scale (E4M3) each and one for all.

compressed-tensors' ``nvfp4-pack-quantized``: ``weight_packed`` (rows, columns / 2) of bytes, the
even column in the lower half, ``weight_scale`` (rows, columns / 16) and ``weight_global_scale``, by
which scales are divided. ModelOpt's: ``weight``, ``weight_scale`` and ``weight_scale_2``, by which
they are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from tasks.tensors import mx
from tasks.tensors.rows import Rows, count
from tasks.unpack.packed import Found, Packed, Read, Tensors, activations, paths, require

METHODS: tuple[str, ...] = ("compressed-tensors", "modelopt")
NAME = "nvfp4"
GROUP_SIZE = 16
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have a scale for all beside those of groups."""
    packed = {}
    for suffix, weight, divides in (
        (".weight_global_scale", "weight_packed", True),
        (".weight_scale_2", "weight", False),
    ):
        for path in paths(tensors, suffix):
            name, scale = f"{path}.{weight}", f"{path}.weight_scale"
            if name not in tensors or tensors[name].dtype != "uint8":
                continue
            high, wide = tensors[name].shape
            columns = wide * 2
            require(scale, tensors, (high, columns // GROUP_SIZE), "uint8")
            inputs = (name, scale, path + suffix)
            packed[f"{path}.weight"] = Packed((high, columns), inputs, {"divides": divides})
    return Found(NAME, packed, activations(tensors)) if packed else None


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers times their scales."""
    return Nvfp4(sources, shape, settings["divides"])


class Nvfp4(Struct, frozen=True):
    """A weight of E2M1, (rows, columns)."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    divides: bool
    dtype: str = "float32"
    unit: int = 1

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        weight, scale, whole = self.sources
        octets = weight.read(start, stop)
        halves = mx.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)
        numbers = mx.array([*NUMBERS, *(-number for number in NUMBERS)])[halves]
        scales = mx.from_fp8(scale.read(start, stop), dtype=mx.float32)
        of_all = whole.read(0, count(whole)).reshape(-1).astype(mx.float32)
        scales = scales / of_all if self.divides else scales * of_all
        return numbers * mx.repeat(scales, GROUP_SIZE, axis=1)

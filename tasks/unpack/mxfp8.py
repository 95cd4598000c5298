"""mxfp8: 8-bit floats (E4M3) with a scale for each group of 32 columns that is a power of two.

compressed-tensors' ``mxfp8-quantized`` and ModelOpt's ``MXFP8``: ``weight`` (rows, columns) and
``weight_scale`` (rows, columns / 32) of bytes (E8M0), as MLX has them in its own mode ``mxfp8``.
transformers' ``fp8`` may have the same in blocks of 1 and 32, as ``weight_scale_inv``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from tasks.tensors import mx
from tasks.tensors.rows import Rows
from tasks.unpack import bits
from tasks.unpack.packed import Found, Packed, Read, Repacking, Tensors, activations, paths

METHODS: tuple[str, ...] = ("compressed-tensors", "modelopt", "fp8")
NAME = "mxfp8"
GROUP_SIZE = 32
SCALES = (".weight_scale", ".weight_scale_inv")


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights of bytes that have a byte for each 32 columns."""
    held = Repacking(GROUP_SIZE, 8, "mxfp8")
    packed = {
        name: Packed(tensors[name].shape, (name, scale), {}, held)
        for name, scale in weights(tensors).items()
    }
    return Found(NAME, packed, activations(tensors)) if packed else None


def weights(tensors: Tensors) -> dict[str, str]:
    """Return the names of the weights that are so, with that of the scales of each."""
    found = {}
    for suffix in SCALES:
        for path in paths(tensors, suffix):
            name, scale = f"{path}.weight", path + suffix
            both = [tensors[each] for each in (name, scale) if each in tensors]
            match [tuple(each.shape) for each in both if each.dtype == "uint8"]:
                case [(high, wide), (down, groups)] if (high, wide) == (down, groups * GROUP_SIZE):
                    found[name] = scale
    return found


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers times their scales."""
    return MxFp8(sources, shape)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return nothing: all is read by rows."""
    return 0


class MxFp8(Struct, frozen=True):
    """A weight of E4M3, (rows, columns), times a power of two for each group."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    dtype: str = "float32"
    unit: int = 1

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        weight, scale = (source.read(start, stop) for source in self.sources)
        scales = mx.repeat(bits.powers_of_two(scale), GROUP_SIZE, axis=1)
        return mx.from_fp8(weight, dtype=mx.float32) * scales

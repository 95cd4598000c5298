"""fp4: 4-bit floats (E2M1) with a scale for each group of 16 (NVFP4) or 32 columns (MXFP4).

NVFP4 has scales of E4M3 and mostly one for all. compressed-tensors' ``nvfp4-pack-quantized``:
``weight_packed`` (rows, columns / 2) of bytes, the even column in the lower half, ``weight_scale``
(rows, columns / 16) and ``weight_global_scale``, by which scales are divided. ModelOpt's:
``weight``, ``weight_scale`` and ``weight_scale_2``, by which they are multiplied. MXFP4, such as
``mxfp4-pack-quantized``, has scales that are powers of two (E8M0), and none for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, whole
from tasks.unpack import bits, mxfp8
from tasks.unpack.packed import (
    FLOATS,
    Found,
    Packed,
    Read,
    Repacking,
    Tensors,
    activations,
    paths,
    require,
)

METHODS: tuple[str, ...] = ("compressed-tensors", "modelopt")
NAME = "nvfp4"
GROUP_SIZE, MX_GROUP_SIZE = 16, 32
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GLOBAL_SCALES = (("weight_global_scale", True), ("weight_scale_2", False))  # whether it divides


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights of bytes that have scales of bytes for groups of columns."""
    packed = {}
    scaled = {part for part, _ in GLOBAL_SCALES if paths(tensors, f".{part}")}
    for name, scale, path in _weights(tensors):
        high, wide = tensors[name].shape
        columns = wide * 2
        if name.endswith("_packed") and wide == tensors[scale].shape[-1] * 24:
            raise CheckpointError(
                f"{path} is packed to MXFP6, which is not unpacked here. Get the checkpoint in "
                "bfloat16."
            )
        mode, size = ("mxfp4", MX_GROUP_SIZE)
        if columns // GROUP_SIZE == tensors[scale].shape[-1]:
            mode, size = ("nvfp4", GROUP_SIZE)
        require(scale, tensors, (high, -(-columns // size)), "uint8")
        require(name, tensors, (high, tensors[scale].shape[1] * size // 2))
        inputs: tuple[str, ...] = (name, scale)
        how: dict[str, Any] = {"divides": False, "exponents": mode == "mxfp4"}
        held = Repacking(size, 4, mode) if columns % size == 0 else None
        for part, divides in GLOBAL_SCALES if mode == "nvfp4" else ():
            if part in scaled:  # where one has it, all do
                of_all = f"{path}.{part}"
                is_bare = of_all in tensors and tensors[of_all].shape == ()
                require(of_all, tensors, () if is_bare else (1,), *FLOATS)
                inputs, how, held = (*inputs, f"{path}.{part}"), {"divides": divides}, None
        packed[f"{path}.weight"] = Packed((high, columns), inputs, how, held)
    exponents = {each.settings.get("exponents", False) for each in packed.values()}
    called = " and ".join(
        mode for mode, has in (("nvfp4", False), ("mxfp4", True)) if has in exponents
    )
    return Found(NAME, packed, activations(tensors), (), called) if packed else None


def _weights(tensors: Tensors) -> Iterator[tuple[str, str, str]]:
    """Yield the names of each weight's tensor and its scales, and its path."""
    others = mxfp8.weights(tensors)
    for path in paths(tensors, ".weight_scale"):
        if f"{path}.weight" in others:
            continue
        scale = f"{path}.weight_scale"
        for name in (f"{path}.weight_packed", f"{path}.weight"):
            both = [tensors[each] for each in (name, scale) if each in tensors]
            if len(both) == 2 and all(t.dtype == "uint8" and len(t.shape) == 2 for t in both):
                yield name, scale, path
                break


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers times their scales."""
    return Fp4(sources, shape, settings)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return nothing: all is read by rows."""
    return 0


class Fp4(Struct, frozen=True):
    """A weight of E2M1, (rows, columns)."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    settings: dict[str, Any]
    dtype: str = "float32"
    unit: int = 1

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        weight, scale, *of_all = self.sources
        octets = weight.read(start, stop)
        halves = mx.stack([octets & 15, octets >> 4], axis=-1).reshape(len(octets), -1)
        numbers = mx.array([*NUMBERS, *(-number for number in NUMBERS)])[halves]
        scales = self._scales(scale.read(start, stop))
        if of_all:
            one = whole(of_all[0]).reshape(-1).astype(mx.float32)
            scales = scales / one if self.settings["divides"] else scales * one
        group_size = self.shape[1] // scales.shape[1]
        return numbers * mx.repeat(scales, group_size, axis=1)

    def _scales(self, octets: mx.array) -> mx.array:
        if not self.settings.get("exponents"):
            return mx.from_fp8(octets, dtype=mx.float32)
        return bits.powers_of_two(octets)


class SameBytes(Struct, frozen=True):
    """The numbers of such a weight, or its scales, as MLX has them: the same bytes."""

    source: Rows
    part: str
    unit: int = 1

    @property
    def dtype(self) -> str:
        """Words of 32 bits; of scales, bytes."""
        return "uint32" if self.part == "weight" else "uint8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        high, wide = self.source.shape
        return high, wide // 4 if self.part == "weight" else wide

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        octets = self.source.read(start, stop)
        return octets.view(mx.uint32) if self.part == "weight" else octets

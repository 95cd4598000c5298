"""compressed_integers: compressed-tensors' ``pack-quantized`` and ``int-quantized``.

``pack-quantized``: ``weight_packed`` (rows, words) of int32, the first number in the lowest bits,
each with half of the range added (``compressors/quantized_compressors/pack_quantized.py``).
``int-quantized``: ``weight`` of int8. Both have ``weight_scale`` (rows, groups), asymmetric ones
``weight_zero_point``, which pack-quantized packs along the rows, and where columns are in an order
of their own ``weight_g_idx``. A weight is (number - zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from msgspec import Struct

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, count
from tasks.unpack import bits
from tasks.unpack.packed import Found, Packed, Read, Tensors, activations, groups, paths

METHODS: tuple[str, ...] = ("compressed-tensors",)
NAME = "compressed_integers"
WORD_BITS = (2, 4, 8)


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that are packed, or of int8 with scales."""
    packed = {}
    all_groups = groups(settings)
    for path in paths(tensors, ".weight_scale"):
        names = [f"{path}.{part}" for part in ("weight_packed", "weight")]
        name = next((name for name in names if name in tensors), None)
        if name is None or tensors[name].dtype not in ("int32", "int8", "uint32"):
            continue
        scale = f"{path}.weight_scale"
        group = next((g for g in all_groups if g.get("type", "int") == "int"), {})
        words = name.endswith("packed")
        width = int(group.get("num_bits") or 8)
        if words and width not in WORD_BITS:
            raise CheckpointError(
                f"{path} is packed to {width} bits, which is not unpacked here. Get the "
                "checkpoint in bfloat16."
            )
        if len({g.get("num_bits") for g in all_groups}) > 1 and words:
            raise CheckpointError(
                "its groups have several num_bits, which are not unpacked here. Get the checkpoint "
                "in bfloat16."
            )
        high, wide = tensors[name].shape
        size = group.get("group_size") or -1
        columns = wide * 32 // width if words else wide
        if size > 0 and len(tensors[scale].shape) == 2 and tensors[scale].shape[1] > 1:
            columns = min(columns, tensors[scale].shape[1] * size)
        others = [f"{path}.weight_zero_point", f"{path}.weight_g_idx"]
        there = [other for other in others if other in tensors]
        how = {
            "bits": width if words else 0,
            "group_size": size,
            "zero_point": others[0] in there,
            "order": others[1] in there,
        }
        packed[f"{path}.weight"] = Packed((high, columns), (name, scale, *there), how)
    if not packed:
        return None
    shapes = tuple(name for name in tensors if name.endswith(".weight_shape"))
    return Found(NAME, packed, activations(tensors), shapes)


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers, less their zero points, times their scales."""
    return Integers(sources, shape, settings)


class Integers(Struct, frozen=True, dict=True):
    """A weight of whole numbers, (rows, columns)."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    settings: dict[str, Any]
    dtype: str = "float32"
    unit: int = 1

    @cached_property
    def _zeros(self) -> mx.array | None:
        if not self.settings["zero_point"]:
            return None
        zeros = self.sources[2].read(0, count(self.sources[2]))
        if not (width := self.settings["bits"]):
            return zeros.reshape(self.shape[0] if zeros.size > 1 else 1, -1).astype(mx.float32)
        numbers = bits.fields(zeros.T, width).T[: self.shape[0]].astype(mx.float32)
        less: mx.array = numbers - (1 << (width - 1))
        return less

    @cached_property
    def _order(self) -> mx.array | None:
        if not self.settings["order"]:
            return None
        source = self.sources[-1]
        order = source.read(0, count(source)).reshape(-1)
        return None if bool(mx.any(order < 0).item()) else order

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        columns = self.shape[1]
        numbers = self.sources[0].read(start, stop)
        if width := self.settings["bits"]:
            numbers = bits.fields(numbers, width)[:, :columns].astype(mx.float32)
            numbers = numbers - (1 << (width - 1))
        else:
            numbers = numbers.astype(mx.float32)
        if self._zeros is not None:
            zeros = self._zeros if self._zeros.shape[0] == 1 else self._zeros[start:stop]
            numbers = numbers - self._wide(zeros)
        scale = self.sources[1]
        if len(scale.shape) == 2 and scale.shape[0] == self.shape[0]:
            scales = scale.read(start, stop)
        else:
            scales = scale.read(0, count(scale)).reshape(-1, 1)
            scales = scales if scales.shape[0] == 1 else scales[start:stop]
        return numbers * self._wide(scales.astype(mx.float32))

    def _wide(self, values: mx.array) -> mx.array:
        if self._order is not None:
            return values[:, self._order]
        return bits.grouped(values, self.settings["group_size"], self.shape[1])

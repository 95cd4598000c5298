"""torchao: its plain tensors, as transformers saves them with safetensors.

Of a weight of ``NAME.weight``, ``NAME._weight_qdata`` and ``NAME._weight_scale``. ``Int8Tensor``
and ``IntxUnpackedToInt8Tensor``: (…, rows, columns) of int8 and (…, rows, groups), with
``_zero_point`` perhaps: (number - zero point) · scale. ``Int4Tensor``: (rows, columns / 2), the
even column in the lower half, signed, and (groups, rows): number · scale + zero point.
``Float8Tensor``: E4M3, and a scale of the whole, rows or blocks
(``quantization/quantize_/workflows``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, count, whole
from tasks.unpack import bits
from tasks.unpack.block_fp8 import BlockFp8
from tasks.unpack.packed import FLOATS, Found, Packed, Read, Repacking, Tensors, require
from tasks.unpack.whole_numbers import WholeNumbers, repacking

METHODS: tuple[str, ...] = ("torchao",)
NAME = "torchao"
DATA = re.compile(r"(.*)\._(\w+)_qdata")


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have ``_qdata``."""
    said = dict.fromkeys(_said(settings.get("quant_type"), "weight_dtype"))
    widths = [int(match[1]) for each in said if (match := re.fullmatch(r"u?int([1-8])", str(each)))]
    width = widths[0] if len(said) == len(widths) == 1 else 8
    is_int4 = any("Int4" in str(each) for each in _said(settings.get("quant_type"), "_type"))
    packed = {}
    for name, match in [(name, DATA.fullmatch(name)) for name in tensors]:
        if match is None:
            continue
        parts = {part: f"{match[1]}._{match[2]}_{part}" for part in ("scale", "zero_point")}
        if f"{match[1]}._{match[2]}_act_pre_scale" in tensors or parts["scale"] not in tensors:
            raise CheckpointError(_refused(name, tensors))
        inputs = (name, *(part for part in parts.values() if part in tensors))
        packed[f"{match[1]}.{match[2]}"] = _packed(inputs, tensors, width, is_int4=is_int4)
    return Found(NAME, packed) if packed else None


def _packed(inputs: tuple[str, ...], tensors: Tensors, width: int, *, is_int4: bool) -> Packed:
    """Return what a weight is, by the shapes of its tensors.

    Raises:
        CheckpointError: it is of a layout for one kind of processor.
    """
    data, scale = tensors[inputs[0]], tensors[inputs[1]]
    if len(data.shape) not in (2, 3) or data.dtype not in ("int8", "uint8"):
        raise CheckpointError(_refused(inputs[0], tensors))
    *lead, high, wide = data.shape
    sides = tuple(scale.shape)
    require(inputs[1], tensors, sides, *FLOATS)
    for zeros in inputs[2:]:
        require(zeros, tensors, sides, *(FLOATS if is_int4 else ("int8", *FLOATS)))
    if is_int4 and len(inputs) == 3 and not lead and sides[1:] == (high,):
        columns = wide * 2
        size = columns // sides[0]
        if size * sides[0] != columns:
            raise CheckpointError(_refused(inputs[1], tensors))
        held = repacking(4, size, columns, scale.dtype, centred=False)
        return Packed(
            (high, columns), inputs, {"kind": "int4", "bits": 4, "group_size": size}, held
        )
    down, groups = sides[-2:] if len(sides) > 1 else (max(1, prod(sides)), 1)
    if list(sides[:-2]) != lead or not (groups and down) or wide % groups or high % down:
        raise CheckpointError(_refused(inputs[1], tensors))
    if data.dtype == "uint8":
        how: dict[str, Any] = {"kind": "fp8", "block": [high // down, wide // groups]}
        return Packed(data.shape, inputs, how)
    if down != high and (prod(sides) != 1 or lead):
        raise CheckpointError(_refused(inputs[0], tensors))
    size = wide // groups if groups > 1 else -1
    held_so: Repacking | None = None
    if not lead:
        held_so = repacking(width, size, wide, scale.dtype, centred=len(inputs) == 2)
    return Packed(data.shape, inputs, {"kind": "int8", "bits": width, "group_size": size}, held_so)


def _refused(name: str, tensors: Tensors) -> str:
    tensor = tensors[name]
    return (
        f"{name} is {tensor.dtype} {tuple(tensor.shape)}: a layout of torchao's for one kind of "
        "processor, which is not unpacked. Get the checkpoint in bfloat16, or have torchao write "
        "it again: int4_packing_format = plain."
    )


def _said(value: Any, key: str) -> Iterator[Any]:
    """Yield what a configuration of torchao's says of a key, wherever it is."""
    if isinstance(value, dict):
        if key in value:
            said = value[key]
            yield said.get("_data") if isinstance(said, dict) else said
        for each in value.values():
            yield from _said(each, key)


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers, less their zero points, times their scales."""
    match settings["kind"]:
        case "fp8":
            return BlockFp8(sources[0], sources[1], shape, *settings["block"])
        case "int4":
            return Int4(sources, shape, settings)
        case _:
            return Int8(sources, shape, settings)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return what scales and zero points take once they are float32."""
    return 4 * sum(nbytes[1:])


class Int4(WholeNumbers, frozen=True, dict=True):
    """A weight of two numbers a byte, whose scales lie transposed."""

    @cached_property
    def _groups(self) -> tuple[mx.array, mx.array]:
        scales, zeros = (whole(each).astype(mx.float32).T for each in self.sources[1:])
        return scales, zeros

    def numbers(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows, with half of the range added."""
        octets = self.sources[0].read(start, stop).view(mx.uint8)
        halves = mx.stack([octets & 15, octets >> 4], axis=-1).reshape(stop - start, -1)
        return (halves ^ 8).astype(mx.uint32)

    def shifts(self, start: int, stop: int) -> mx.array | None:
        """Return what is added to the product: what torchao calls zero points."""
        return self._groups[1][start:stop]

    def scales(self, start: int, stop: int) -> mx.array:
        """Return the scales of rows."""
        return self._groups[0][start:stop]


class Int8(WholeNumbers, frozen=True, dict=True):
    """A weight of a number a byte, though it may have fewer bits; (…, rows, columns)."""

    @cached_property
    def _zeros(self) -> mx.array:
        zeros = whole(self.sources[2]).astype(mx.float32)
        return self._by_rows(zeros) + (1 << (self.bits - 1))

    @cached_property
    def _scales(self) -> mx.array:
        return self._by_rows(whole(self.sources[1]).astype(mx.float32))

    def _by_rows(self, values: mx.array) -> mx.array:
        return values.reshape(1, 1) if values.size == 1 else values.reshape(count(self), -1)

    def numbers(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows, with half of the range added."""
        octets = self.sources[0].read(start, stop).astype(mx.int32)
        return (octets + (1 << (self.bits - 1))).astype(mx.uint32)

    def words(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows as MLX packs them.

        Raises:
            CheckpointError: they have more bits than config.json says.
        """
        numbers = self.numbers(start, stop)
        stop_at = 1 << self.bits
        bits.checked(numbers.view(mx.int32), stop_at, f"_weight_qdata plus {stop_at // 2}")
        return bits.pack(numbers, self.bits)

    def zeros(self, start: int, stop: int) -> mx.array:
        """Return the zero points of rows, with half of the range added."""
        if len(self.sources) < 3:
            return super().zeros(start, stop)
        return self._zeros if self._zeros.size == 1 else self._zeros[start:stop]

    def scales(self, start: int, stop: int) -> mx.array:
        """Return the scales of rows."""
        return self._scales if self._scales.size == 1 else self._scales[start:stop]

"""hqq: Half-Quadratic Quantization's, of 1, 2, 3, 4 and 8 bits, as transformers saves them.

``W_q``: numbers in groups, (groups, group size) if its axis is 1, (group size, groups) if it is 0;
of 4 bits two halves of its rows share bytes, the first half in the upper bits, and so on (3 bits:
ten parts in words of 32). ``scale`` and ``zero``, one for each group, and what says how, a tensor
each. A weight is (number - zero) · scale (``hqq/core/quantize.py``: ``Quantizer.dequantize``).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, whole
from tasks.unpack import bits
from tasks.unpack.packed import FLOATS, Found, Packed, Read, Tensors, paths, require
from tasks.unpack.whole_numbers import WholeNumbers, repacking

METHODS: tuple[str, ...] = ("hqq",)
NAME = "hqq"
PARTS = {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}  # of the rows that share a byte or word, by bits
SAID = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float",
    "quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict",
    "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have ``W_q``."""
    packed = {}
    used_up: list[str] = []
    for path in paths(tensors, ".W_q"):
        inputs = tuple(f"{path}.{part}" for part in ("W_q", "scale", "zero"))
        if missing := [name for name in inputs if name not in tensors]:
            raise CheckpointError(
                f"{missing[0]} is missing: HQQ's scales that are quantized themselves are not "
                "unpacked. Get the checkpoint in bfloat16."
            )
        shape = _numbers(path, "shape", tensors, read)
        width, axis = (_numbers(path, key, tensors, read)[0] for key in ("nbits", "axis"))
        groups = prod(tensors[inputs[1]].shape)
        if width not in PARTS or axis not in (0, 1) or len(shape) != 2 or min(shape) < 1:
            raise CheckpointError(
                f"{path} has nbits = {width}, axis = {axis} and shape {shape}, which is not "
                "unpacked. Get the checkpoint in bfloat16."
            )
        high, wide = shape
        size = high * wide // max(groups, 1)
        sides = (groups, size) if axis == 1 else (size, groups)
        packed_so = (-(-sides[0] // PARTS[width]), sides[1])
        require(inputs[0], tensors, packed_so, "int32" if width == 3 else "uint8")
        for name in inputs[1:]:
            require(name, tensors, tensors[inputs[1]].shape, *FLOATS)
        if groups * size != high * wide:
            raise CheckpointError(
                f"{path}: scales of {groups} groups do not fit {tuple(shape)}. Fetch it again."
            )
        how = {"bits": width, "group_size": size, "axis": axis}
        held = None
        if axis == 1 and wide % size == 0:
            held = repacking(width, size, wide, tensors[inputs[1]].dtype, centred=False)
        packed[f"{path}.weight"] = Packed((high, wide), inputs, how, held)
        used_up += [name for key in SAID if (name := f"{path}.{key}") in tensors]
    return Found(NAME, packed, (), tuple(used_up)) if packed else None


def _numbers(path: str, key: str, tensors: Tensors, read: Read) -> list[int]:
    """Return what a tensor of whole numbers says.

    Raises:
        CheckpointError: it is missing.
    """
    name = f"{path}.{key}"
    if name not in tensors:
        raise CheckpointError(
            f"{name} is missing, which says how {path}.W_q is packed: transformers writes it. Get "
            "the checkpoint in bfloat16."
        )
    letter = {"int64": "q", "int32": "i", "uint8": "B"}[tensors[name].dtype]
    if not (data := read(name)):
        raise CheckpointError(f"{name} is empty. Fetch the checkpoint again.")
    return list(struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data))


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers, less their zero points, times their scales."""
    return Hqq(sources, shape, settings)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return what scales and zero points take once they are float32."""
    return 2 * sum(nbytes[1:])


class Hqq(WholeNumbers, frozen=True, dict=True):
    """A weight whose numbers are in groups, and these in parts that share bytes."""

    @cached_property
    def _groups(self) -> tuple[mx.array, mx.array]:
        scale, zero = (whole(each).astype(mx.float32).reshape(-1) for each in self.sources[1:])
        return scale, mx.broadcast_to(zero, scale.shape)

    def numbers(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows."""
        columns = self.shape[1]
        width = self.sources[0].shape[1]
        first, last = start * columns, stop * columns
        count, parts = self.shape[0] * columns // width, PARTS[self.bits]
        grouped = bits.from_parts(
            self.sources[0], self.bits, parts, first // width, min(count, -(-last // width)),
            lowest_first=False,
        )  # fmt: skip
        begin = first - first // width * width
        flat = grouped.reshape(-1)[begin : begin + last - first]
        return flat.reshape(stop - start, columns)

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``, as floats."""
        columns = self.shape[1]
        at = mx.arange(start * columns, stop * columns)
        scale, zero = self._groups
        of = at // self.group_size if self.settings["axis"] == 1 else at % scale.size
        numbers = self.numbers(start, stop).astype(mx.float32).reshape(-1)
        return ((numbers - zero[of]) * scale[of]).reshape(-1, columns)

    def zeros(self, start: int, stop: int) -> mx.array:
        """Return the zero points of rows, which no group goes beyond."""
        return self._groups[1].reshape(self.shape[0], -1)[start:stop]

    def scales(self, start: int, stop: int) -> mx.array:
        """Return the scales of rows, which no group goes beyond."""
        return self._groups[0].reshape(self.shape[0], -1)[start:stop]

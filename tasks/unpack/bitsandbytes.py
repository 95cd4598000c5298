"""bitsandbytes: its 4-bit floats, NF4 and FP4, and its 8-bit numbers, as transformers saves them.

4 bits: ``weight`` (elements / 2, 1) of bytes, the even element in the upper half, an index into
``weight.quant_map``; ``weight.absmax``, a scale for each block of ``blocksize`` elements, or where
that is quantized again bytes that index ``weight.nested_quant_map``, times
``weight.nested_absmax`` for each block of those, plus an offset; and a table of JSON as bytes,
``weight.quant_state.bitsandbytes__nf4`` (``functional.py``: ``QuantState``, ``dequantize_4bit``).
8 bits: ``weight`` of int8 and ``SCB``, each row's largest value, of which 127 stands for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isfinite, prod
from typing import Any

from msgspec import Struct

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, count
from tasks.unpack.packed import FLOATS, Found, Packed, Read, Tensors, paths, require

METHODS: tuple[str, ...] = ("bitsandbytes",)
NAME = "bitsandbytes"
STATES = tuple(f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
LARGEST_BLOCK = 1 << 20  # bitsandbytes has 4096 at most
NESTED = ("nested_absmax", "nested_quant_map")


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have a state beside them, or ``SCB``."""
    packed = {}
    used_up = []
    for state in STATES:
        for path in paths(tensors, state):
            weight = f"{path}.weight"
            said = _state(path, read(path + state))
            names = [weight, f"{weight}.absmax", f"{weight}.quant_map"]
            nested = said.get("nested_blocksize")
            names += [f"{weight}.{part}" for part in NESTED] if nested else []
            _check(names, tensors, said)
            how = {
                "block": said["blocksize"],
                "nested_block": nested or 0,
                "offset": said.get("nested_offset", 0.0),
            }
            packed[weight] = Packed(tuple(said["shape"]), tuple(names), how)
            used_up.append(path + state)
    for path in paths(tensors, ".SCB"):
        weight = f"{path}.weight"
        if weight not in tensors or tensors[weight].dtype != "int8":
            continue
        high, _ = shape = tensors[weight].shape
        require(f"{path}.SCB", tensors, (high,), *FLOATS)
        packed[weight] = Packed(shape, (weight, f"{path}.SCB"), {})
    used_up += [name for name in tensors if name.endswith(".weight_format")]
    return Found(NAME, packed, (), tuple(used_up)) if packed else None


def _state(path: str, data: bytes) -> dict[str, Any]:
    """Return what is said of a weight of 4 bits.

    Raises:
        CheckpointError: it is not what bitsandbytes says.
    """
    try:
        said = json.loads(data)
        shape = said["shape"]
        numbers = [*shape, said["blocksize"], said.get("nested_blocksize") or 1]
        if len(shape) != 2 or not all(type(n) is int and n > 0 for n in numbers) or shape[1] % 2:
            raise ValueError(f"shape {shape}")
        if max(numbers[2:]) > LARGEST_BLOCK:  # a nested one's scales are repeated so many times
            raise ValueError(f"blocks of {max(numbers[2:])} numbers")
        if not isfinite(offset := said.get("nested_offset", 0.0)):
            raise ValueError(f"nested_offset {offset}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}.weight.quant_state is not what bitsandbytes writes ({error}). Fetch the "
            "checkpoint again."
        ) from error
    return dict(said)


def _check(names: Sequence[str], tensors: Tensors, said: Mapping[str, Any]) -> None:
    """Refuse a weight of 4 bits whose tensors are not what its state says.

    Raises:
        CheckpointError: one is missing, or of another shape or dtype.
    """
    weight, absmax, codes, *nested = names
    count = prod(said["shape"])
    blocks = -(-count // said["blocksize"])
    require(weight, tensors, (count // 2, 1), "uint8")
    require(codes, tensors, (16,), *FLOATS)
    require(absmax, tensors, (blocks,), *(("uint8",) if nested else FLOATS))
    if nested:
        require(nested[0], tensors, (-(-blocks // said["nested_blocksize"]),), *FLOATS)
        require(nested[1], tensors, (256,), *FLOATS)


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers times their scales."""
    if settings:
        return FourBit(sources, shape, settings)
    return EightBit(sources, shape)


class FourBit(Struct, frozen=True, dict=True):
    """A weight of 4-bit floats, whose blocks go on from row to row."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    settings: dict[str, Any]
    dtype: str = "float32"
    unit: int = 1

    @cached_property
    def _scales(self) -> mx.array:
        absmax, _, *nested = (_flat(source) for source in self.sources[1:])
        if not nested:
            return absmax.astype(mx.float32)
        scales, numbers = nested
        each = mx.repeat(scales.astype(mx.float32), self.settings["nested_block"])[: absmax.size]
        made: mx.array = numbers.astype(mx.float32)[absmax] * each + self.settings["offset"]
        return made

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        columns = self.shape[1]
        octets = self.sources[0].read(start * columns // 2, stop * columns // 2).reshape(-1)
        halves = mx.stack([octets >> 4, octets & 15], axis=-1).reshape(-1)
        numbers = _flat(self.sources[2]).astype(mx.float32)[halves]
        block = self.settings["block"]
        at = mx.arange(start * columns, stop * columns) // block
        return (numbers * self._scales[at]).reshape(stop - start, columns)


class EightBit(Struct, frozen=True):
    """A weight of 8-bit numbers, and what 127 stands for in each row."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    dtype: str = "float32"
    unit: int = 1

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        weight, largest = self.sources
        scales = _flat(largest).astype(mx.float32)[start:stop, None]
        return weight.read(start, stop).astype(mx.float32) * scales * (1 / 127)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return what the scales of blocks take once they are unpacked, and on the way."""
    return 16 * sum(nbytes[1:])


def _flat(source: Rows) -> mx.array:
    """Return all of a vector."""
    return source.read(0, count(source)).reshape(-1)

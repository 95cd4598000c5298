"""compressed_integers: compressed-tensors' ``pack-quantized`` and ``int-quantized``.

``pack-quantized``: ``weight_packed`` (rows, words) of int32, the first number in the lowest bits,
each with half of the range added, one after another without a gap
(``compressors/pack_quantized/helpers.py``).
``int-quantized``: ``weight`` of int8. Both have ``weight_scale`` (rows, groups), asymmetric ones
``weight_zero_point``, which pack-quantized packs along the rows, and where columns are in an order
of their own ``weight_g_idx``. A weight is (number - zero point) · scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, whole
from tasks.unpack import bits
from tasks.unpack.packed import (
    FLOATS,
    WORDS,
    Found,
    Packed,
    Read,
    Tensors,
    activations,
    group_size,
    groups,
    paths,
    require,
    whole_number,
)
from tasks.unpack.whole_numbers import WholeNumbers, repacking

METHODS: tuple[str, ...] = ("compressed-tensors",)
NAME = "compressed_integers"


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
        words = name.endswith("packed")
        high, _ = tensors[name].shape
        if len(all_groups) > 1:
            width, columns, size = _by_itself(path, tensors, read, words=words)
        else:
            width, columns, size = _as_said(path, all_groups, tensors, read, words=words)
        if words and not 1 <= width <= 8:
            raise CheckpointError(
                f"{path} is packed to {width} bits, which is not unpacked here. Get the "
                "checkpoint in bfloat16."
            )
        _check(path, tensors, (high, columns), size, width if words else 0)
        others = [f"{path}.weight_zero_point", f"{path}.weight_g_idx"]
        there = [other for other in others if other in tensors]
        how: dict[str, Any] = {
            "bits": width if words else 0,
            "group_size": size,
            "zero_point": others[0] in there,
            "order": others[1] in there,
        }
        held = repacking(
            width if words else 8, size, columns, tensors[scale].dtype,
            centred=not how["zero_point"], order=how["order"],
        )  # fmt: skip
        packed[f"{path}.weight"] = Packed((high, columns), (name, scale, *there), how, held)
    if not packed:
        return None
    shapes = tuple(name for name in tensors if name.endswith(".weight_shape"))
    return Found(NAME, packed, activations(tensors), shapes)


def _as_said(
    path: str,
    all_groups: Sequence[Mapping[str, Any]],
    tensors: Tensors,
    read: Read,
    *,
    words: bool,
) -> tuple[int, int, int]:
    """Return a weight's bits, columns and group size, where config.json has one group of weights.

    Args:
        path: the module's.
        all_groups: what it says of them.
        tensors: the checkpoint's.
        read: returns a small tensor's bytes.
        words: whether its numbers are packed.
    """
    group = next((g for g in all_groups if g.get("type", "int") == "int"), {})
    width, size = whole_number(group, "num_bits", 8), group_size(group, "group_size", -1)
    scale = tensors[f"{path}.weight_scale"].shape
    if not words or width < 1:
        return width, tensors[f"{path}.weight"].shape[1] if not words else 0, size
    if size > 0 and len(scale) == 2 and scale[1] > 1:
        return width, scale[1] * size, size
    if f"{path}.weight_shape" in tensors:
        return width, _columns(path, tensors, read), size
    return width, tensors[f"{path}.weight_packed"].shape[1] * 32 // width, size


def _columns(path: str, tensors: Tensors, read: Read) -> int:
    """Return how many columns ``weight_shape`` says, of which the last word may hold fewer.

    Raises:
        CheckpointError: it is missing, or no such tensor.
    """
    shape = f"{path}.weight_shape"
    if shape not in tensors or tensors[shape].dtype not in ("int64", "int32"):
        raise CheckpointError(f"{shape} is missing. Fetch the checkpoint again.")
    data = read(shape)
    return int.from_bytes(data[len(data) // 2 :], "little", signed=True)


def _by_itself(path: str, tensors: Tensors, read: Read, *, words: bool) -> tuple[int, int, int]:
    """Return a weight's bits, columns and group size by its tensors: it may be of any group.

    Which one, the targets of each say: classes, names and patterns. Its tensors cannot be wrong.

    Raises:
        CheckpointError: they do not tell.
    """
    weight, scale = f"{path}.weight_packed" if words else f"{path}.weight", f"{path}.weight_scale"
    wide, width = tensors[weight].shape[1], 8
    columns = wide
    if words:
        columns = _columns(path, tensors, read)
        fits = [bits for bits in range(1, 9) if columns > 0 and -(-columns * bits // 32) == wide]
        width = fits[0] if fits else 0
    sides = tensors[scale].shape
    groups = sides[1] if len(sides) == 2 else 1
    return width, columns, -(-columns // groups) if groups > 1 else -1


def _check(path: str, tensors: Tensors, shape: tuple[int, int], size: int, width: int) -> None:
    """Refuse scales, zero points and an order of columns that do not fit a weight.

    Args:
        path: the module's.
        tensors: the checkpoint's.
        shape: the weight's.
        size: of a group; negative, all columns.
        width: bits of a number; 0, they are not packed, nor are zero points.

    Raises:
        CheckpointError: they do not.
    """
    rows, columns = shape
    if width:
        words = -(-columns * width // 32)
        require(f"{path}.weight_packed", tensors, (rows, words), *WORDS)
    else:
        require(f"{path}.weight", tensors, shape, "int8")
    scale = f"{path}.weight_scale"
    groups = 1
    of = tuple(tensors[scale].shape)
    if of not in ((), (1,), (rows,), (1, 1), (rows, 1)):
        groups = -(-columns // size) if size > 0 else 1
        of = (rows, groups)
    require(scale, tensors, of, *FLOATS)
    if (zeros := f"{path}.weight_zero_point") in tensors:
        if width:
            require(zeros, tensors, (-(-rows * width // 32), groups), *WORDS)
        else:
            require(zeros, tensors, of, "int8")
    if (order := f"{path}.weight_g_idx") in tensors:
        require(order, tensors, (columns,), "int32", "int64")


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers, less their zero points, times their scales."""
    return Integers(sources, shape, settings)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return what zero points take once they are unpacked, and the scales beside them."""
    return 16 * sum(nbytes[2:]) + nbytes[1]


class Integers(WholeNumbers, frozen=True, dict=True):
    """A weight of whole numbers, (rows, columns)."""

    @property
    def bits(self) -> int:
        """Of a number: 8 where each has a byte of its own."""
        return self.settings["bits"] or 8

    @cached_property
    def _zeros(self) -> mx.array | None:
        if not self.settings["zero_point"]:
            return None
        zeros = whole(self.sources[2])
        if self.settings["bits"]:
            return bits.stream(zeros, self.bits, self.shape[0]).astype(mx.float32)
        zeros = zeros.reshape(self.shape[0] if zeros.size > 1 else 1, -1)
        signed: mx.array = zeros.astype(mx.float32) + (1 << (self.bits - 1))
        return signed

    @cached_property
    def group_of(self) -> mx.array | None:
        """What ``weight_g_idx`` says, if it is in use."""
        if not self.settings["order"]:
            return None
        order = whole(self.sources[-1]).reshape(-1)
        if bool(mx.any(order == -1).item()):  # as before anything is put into it: not in use
            return None
        return bits.checked(order, self.sources[1].shape[-1], "weight_g_idx")

    def numbers(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows, with half of the range added."""
        numbers = self.sources[0].read(start, stop)
        if self.settings["bits"]:
            if 32 % self.bits:
                return bits.stream(numbers.T, self.bits, self.shape[1]).T
            return bits.fields(numbers, self.bits)[:, : self.shape[1]]
        return (numbers.astype(mx.int32) + (1 << (self.bits - 1))).astype(mx.uint32)

    def zeros(self, start: int, stop: int) -> mx.array:
        """Return the zero points of rows, with half of the range added."""
        if self._zeros is None:
            return super().zeros(start, stop)
        return self._zeros if self._zeros.shape[0] == 1 else self._zeros[start:stop]

    def scales(self, start: int, stop: int) -> mx.array:
        """Return the scales of rows."""
        scale = self.sources[1]
        if len(scale.shape) == 2 and scale.shape[0] == self.shape[0]:
            return scale.read(start, stop).astype(mx.float32)
        scales = whole(scale).reshape(-1, 1).astype(mx.float32)
        return scales if scales.shape[0] == 1 else scales[start:stop]

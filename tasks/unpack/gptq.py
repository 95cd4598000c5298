"""gptq: AutoGPTQ's and GPTQModel's, of 2, 3, 4 and 8 bits.

``qweight`` (columns · bits / 32, rows) of int32, ``qzeros`` (groups, rows · bits / 32), ``scales``
(groups, rows) and ``g_idx``, the group of each column. A weight is (number - zero point) · scale;
the older of the two forms, which is the default, stores each zero point less one (GPTQModel,
``nn_modules/qlinear/torch.py``; AutoGPTQ, ``qlinear_cuda_old.py``).
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
    group_size,
    paths,
    require,
    whole_number,
)
from tasks.unpack.whole_numbers import Transposed, repacking

METHODS: tuple[str, ...] = ("gptq",)
NAME = "gptq"
BITS = (2, 3, 4, 8)


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have ``qweight``."""
    dynamic = settings.get("dynamic")
    own = [each for each in (dynamic or {}).values() if each] if isinstance(dynamic, dict) else []
    symmetric = settings.get("sym") is True and all(each.get("sym", True) for each in own)
    in_order = settings.get("desc_act") is False and not any(each.get("desc_act") for each in own)
    packed = {}
    for path in paths(tensors, ".qweight"):
        names = [f"{path}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
        width, columns, size = _sizes(names, settings, tensors)
        high = tensors[names[0]].shape[1]
        groups = -(-columns // size) if size > 0 else 1
        require(names[0], tensors, (-(-columns * width // 32), high), *WORDS)
        require(names[2], tensors, (groups, high), *FLOATS)
        require(names[1], tensors, (groups, -(-high * width // 32)), *WORDS)
        if names[3] in tensors:
            require(names[3], tensors, (columns,), "int32", "int64")
        there = tuple(name for name in names if name in tensors)
        how = {
            "bits": width,
            "group_size": size if size > 0 else columns,
            "offset": 0 if settings.get("checkpoint_format") == "gptq_v2" else 1,
        }
        held = repacking(
            width, how["group_size"], columns, tensors[names[2]].dtype, centred=symmetric,
            order=names[3] in there and not in_order,
        )  # fmt: skip
        packed[f"{path}.weight"] = Packed((high, columns), there, how, held)
    return Found(NAME, packed) if packed else None


def _sizes(
    names: Sequence[str], settings: Mapping[str, Any], tensors: Tensors
) -> tuple[int, int, int]:
    """Return a weight's bits, columns and group size.

    ``dynamic`` says others for some modules, by patterns: then the weight's own tensors tell.

    Raises:
        CheckpointError: of so many bits it is not unpacked.
    """
    words = tensors[names[0]].shape[0]
    width, size = whole_number(settings, "bits", 0), group_size(settings, "group_size", 128)
    if settings.get("dynamic"):
        if not all(name in tensors for name in names[2:]):
            raise CheckpointError(
                f"config.json has dynamic bits, and of {names[0]} no g_idx tells how many it has. "
                "Get the checkpoint in bfloat16."
            )
        columns, groups = tensors[names[3]].shape[0], tensors[names[2]].shape[0]
        width, size = words * 32 // max(columns, 1), -(-columns // max(groups, 1))
    if width not in BITS:
        raise CheckpointError(
            f"{names[0]} has {width} bits, and GPTQ is unpacked of {', '.join(map(str, BITS))} "
            "bits. Get the checkpoint in bfloat16."
        )
    return width, columns if settings.get("dynamic") else words * 32 // width, size


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers, less their zero points, times their scales."""
    return Gptq(sources, shape, settings)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return twice the size: all of it, and scales and zero points once they are unpacked."""
    return 2 * sum(nbytes)


class Gptq(Transposed, frozen=True, dict=True):
    """A weight that is stored transposed: its words are read at once, and unpacked by rows."""

    @cached_property
    def _zeros(self) -> mx.array:
        numbers = bits.stream(whole(self.sources[1]).T, self.bits, self.shape[0])
        zeros: mx.array = numbers.astype(mx.float32) + self.settings["offset"]
        mx.eval(zeros)
        return zeros

    @cached_property
    def group_of(self) -> mx.array | None:
        """What ``g_idx`` says."""
        if len(self.sources) <= 3:
            return None
        return bits.checked(whole(self.sources[3]).reshape(-1), self._scales.shape[0], "g_idx")

    def numbers(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows."""
        return bits.stream(self._words[:, start:stop], self.bits, self.shape[1]).T

    def zeros(self, start: int, stop: int) -> mx.array:
        """Return the zero points of rows."""
        return self._zeros[start:stop]

    def words(self, start: int, stop: int) -> mx.array:
        """Return the same words by rows: both count from the lowest bit on."""
        words: mx.array = mx.contiguous(self._words[:, start:stop].T).view(mx.uint32)
        return words

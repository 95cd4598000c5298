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

from msgspec import Struct

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, count
from tasks.unpack import bits
from tasks.unpack.packed import Found, Packed, Read, Tensors, paths, require

METHODS: tuple[str, ...] = ("gptq",)
NAME = "gptq"
BITS = (2, 3, 4, 8)


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have ``qweight``."""
    width, size = settings.get("bits"), settings.get("group_size", 128)
    packed = {}
    for path in paths(tensors, ".qweight"):
        if width not in BITS or settings.get("dynamic"):
            what = f"bits = {width!r}" if width not in BITS else "dynamic"
            raise CheckpointError(
                f"config.json has {what}, and GPTQ is unpacked of {', '.join(map(str, BITS))} bits "
                "alike. Get the checkpoint in bfloat16."
            )
        names = [f"{path}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
        words, high = tensors[names[0]].shape
        columns = words * 32 // width
        groups = -(-columns // size) if isinstance(size, int) and size > 0 else 1
        require(names[2], tensors, (groups, high), "float16", "bfloat16", "float32")
        require(names[1], tensors, (groups, high * width // 32), "int32", "uint32")
        there = tuple(name for name in names if name in tensors)
        how = {
            "bits": width,
            "group_size": size if isinstance(size, int) and size > 0 else columns,
            "offset": 0 if settings.get("checkpoint_format") == "gptq_v2" else 1,
        }
        packed[f"{path}.weight"] = Packed((high, columns), there, how)
    return Found(NAME, packed) if packed else None


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers, less their zero points, times their scales."""
    return Gptq(sources, shape, settings)


class Gptq(Struct, frozen=True, dict=True):
    """A weight that is stored transposed: its words are read at once, and unpacked by rows."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    settings: dict[str, Any]
    dtype: str = "float32"
    unit: int = 1

    @cached_property
    def _words(self) -> tuple[mx.array, mx.array, mx.array]:
        words, zeros, scales, *order = (s.read(0, count(s)).reshape(s.shape) for s in self.sources)
        width = self.settings["bits"]
        numbers = bits.stream(zeros.T, width, self.shape[0]).astype(mx.float32)
        group_of = order[0] if order else mx.arange(self.shape[1]) // self.settings["group_size"]
        shifted = (numbers + self.settings["offset"])[:, group_of]  # rows, columns
        return words, shifted, scales.astype(mx.float32).T[:, group_of]

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        words, zeros, scales = self._words
        width = self.settings["bits"]
        numbers = bits.stream(words[:, start:stop], width, self.shape[1]).T.astype(mx.float32)
        return (numbers - zeros[start:stop]) * scales[start:stop]

"""quanto: optimum-quanto's, of 2, 4 and 8 bits and E4M3, as its ``save_pretrained`` writes them.

Whole numbers of 2 and 4 bits: ``weight._data._data``, (groups / parts, group size) of bytes, in
which 4 or 2 parts of the groups lie, the first in the lowest bits; ``weight._scale`` and
``weight._shift``, (groups, 1): a weight is number · scale - shift. 8 bits: ``weight._data``
(rows, columns) and ``weight._scale``, (rows, 1) (``tensor/qbits.py``, ``tensor/packed.py``). Which
it is says ``quanto_qmap.json``, by the module's path. How many columns a weight of groups has, no
tensor says: that is told from config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tasks.core.errors import CheckpointError
from tasks.tensors import mx
from tasks.tensors.rows import Rows, whole
from tasks.unpack import bits
from tasks.unpack.block_fp8 import BlockFp8
from tasks.unpack.packed import FLOATS, Found, Packed, Read, Tensors, paths, require
from tasks.unpack.whole_numbers import WholeNumbers, repacking

METHODS: tuple[str, ...] = ("quanto",)
NAME = "quanto"
MAP = "quanto_qmap.json"
BITS = {"qint2": 2, "qint4": 4}
HIDDEN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "qkv_proj")
ACTIVATIONS = (".input_scale", ".output_scale")


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have ``_scale`` beside them."""
    packed = {}
    for path in paths(tensors, ".weight._scale"):
        said = settings.get("map", {}).get(path)
        kind = said.get("weights", "") if isinstance(said, dict) else ""
        scale = f"{path}.weight._scale"
        dtype = tensors[scale].dtype
        inputs: tuple[str, ...]
        shape: tuple[int, ...]
        if kind in BITS:
            inputs = (f"{path}.weight._data._data", scale, f"{path}.weight._shift")
            size = tensors[inputs[0]].shape[1]
            groups = tensors[scale].shape[0]
            parts = 8 // BITS[kind]
            require(inputs[0], tensors, (-(-groups // parts), size), "uint8")
            require(inputs[2], tensors, (groups, 1), *FLOATS)
            columns = _columns(path, settings["config"], size, groups)
            how: dict[str, Any] = {"bits": BITS[kind], "group_size": size}
            held = repacking(BITS[kind], size, columns, _wider(dtype, tensors[inputs[2]].dtype),
                             centred=True)  # fmt: skip
            shape = (groups * size // columns, columns)
        elif kind in ("qint8", "qfloat8", "qfloat8_e4m3fn"):
            inputs = (f"{path}.weight._data", scale)
            high, wide = shape = tensors[inputs[0]].shape
            require(inputs[0], tensors, (high, wide), "int8" if kind == "qint8" else "uint8")
            groups = high
            how = {"bits": 8 if kind == "qint8" else 0, "group_size": -1}
            held = repacking(8, -1, shape[1], dtype, centred=True) if how["bits"] else None
        else:
            raise CheckpointError(
                f"{MAP} has weights = {kind!r} for {path}, which is not unpacked. Get the "
                "checkpoint in bfloat16."
            )
        require(scale, tensors, (groups, 1), *FLOATS)
        packed[f"{path}.weight"] = Packed(shape, inputs, how, held)
    left_out = tuple(name for name in tensors if name.endswith(ACTIVATIONS))
    return Found(NAME, packed, left_out) if packed else None


def _wider(scale: str, shift: str) -> str:
    """Return the dtype that holds scales and shifts, both of which MLX has in one dtype."""
    return scale if scale == shift else "float32"


def _columns(path: str, config: Mapping[str, Any], size: int, groups: int) -> int:
    """Return how many columns a weight has, of a linear layer by its name.

    Raises:
        CheckpointError: that is not known.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    name = path.rpartition(".")[2]
    heads = config.get("num_attention_heads") or 0
    wide = {name: config.get("hidden_size") for name in HIDDEN} | {
        "o_proj": heads * (config.get("head_dim") or (config.get("hidden_size") or 0) // heads)
        if heads
        else None,
        "down_proj": config.get("moe_intermediate_size" if ".experts." in path else "")
        or config.get("intermediate_size"),
    }
    columns = wide.get(name)
    if not isinstance(columns, int) or columns < 1 or columns % size or groups * size % columns:
        raise CheckpointError(
            f"{path}: how many columns its weight has, quanto does not say, and its name does not "
            "tell. Get the checkpoint in bfloat16."
        )
    return columns


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return the numbers times their scales, less their shifts."""
    if not settings["bits"]:
        return BlockFp8(sources[0], sources[1], shape, 1, shape[1])
    return Quanto(sources, shape, settings)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return what scales and shifts take once they are float32."""
    return 2 * sum(nbytes[1:])


class Quanto(WholeNumbers, frozen=True, dict=True):
    """A weight of whole numbers: of a byte each, or of groups whose parts share bytes."""

    @cached_property
    def _scales(self) -> mx.array:
        return whole(self.sources[1]).astype(mx.float32).reshape(self.shape[0], -1)

    @cached_property
    def _shifts(self) -> mx.array:
        return whole(self.sources[2]).astype(mx.float32).reshape(self.shape[0], -1)

    def numbers(self, start: int, stop: int) -> mx.array:
        """Return the numbers of rows; of 8 bits, with half of the range added."""
        if self.bits == 8:
            octets = self.sources[0].read(start, stop).astype(mx.int32)
            return (octets + 128).astype(mx.uint32)
        each = self.shape[1] // self.group_size
        grouped = bits.from_parts(
            self.sources[0], self.bits, 8 // self.bits, start * each, stop * each,
            lowest_first=True,
        )  # fmt: skip
        return grouped.reshape(stop - start, self.shape[1])

    def zeros(self, start: int, stop: int) -> mx.array:
        """Return half of the range of 8 bits; else 0, beside which there is a shift."""
        return mx.full((1, 1), 128.0 if self.bits == 8 else 0.0)

    def shifts(self, start: int, stop: int) -> mx.array | None:
        """Return what is added to the product."""
        return None if self.bits == 8 else -self._shifts[start:stop]

    def scales(self, start: int, stop: int) -> mx.array:
        """Return the scales of rows."""
        return self._scales[start:stop]

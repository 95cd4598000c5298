"""mlx_packed: MLX's own quantization, back to floats as ``mlx_lm.convert -d`` makes them.

``weight`` (…, columns · bits / 32) of uint32, ``scales`` and, in mode affine, ``biases``
(…, columns / group_size). In mode affine it is computed in the dtype of these, once they are cast
to the target's (``mlx_lm.utils.dequantize_model``, which convert calls after its cast).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from tasks.core.errors import CheckpointError
from tasks.tensors import modes, mx
from tasks.tensors.rows import Rows
from tasks.unpack.packed import FLOATS, Found, Packed, Read, Tensors, paths, require, whole_number

METHODS: tuple[str, ...] = ()  # MLX reads it: only where somebody asks for floats
NAME = "mlx"
OF_FLOATS = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}


def found(settings: Mapping[str, Any], tensors: Tensors, read: Read) -> Found | None:
    """Return the weights that have ``scales`` beside them.

    Args:
        settings: the table ``quantization`` of config.json.
        tensors: the checkpoint's.
        read: of no use here.
    """
    packed = {}
    for path in paths(tensors, ".scales"):
        weight, scales, biases = (f"{path}.{part}" for part in ("weight", "scales", "biases"))
        if weight not in tensors or tensors[weight].dtype != "uint32":
            continue
        if f"{path}.global_scale" in tensors:
            raise CheckpointError(
                f"{path} has a global_scale, which is not unpacked here. Build from the "
                "checkpoint that was not quantized."
            )
        own = settings.get(path)
        said = {**settings, **own} if isinstance(own, dict) else settings
        affine = tensors[scales].dtype != "uint8"
        *lead, groups = tensors[scales].shape
        size = whole_number(said, "group_size", 64)
        columns = groups * size
        bits = tensors[weight].shape[-1] * 32 // columns if columns > 0 else 0
        mode = "affine" if affine else OF_FLOATS.get((bits, size), "")
        sizes, widths = modes.numbers(mode) if mode else ((), ())
        if size not in sizes or bits not in widths or whole_number(said, "bits", 0) != bits:
            raise CheckpointError(
                f"{path} does not fit group_size = {size} and bits = {said.get('bits')}, which "
                "config.json says. Fetch the checkpoint again."
            )
        inputs = (weight, scales, biases) if affine else (weight, scales)
        require(weight, tensors, (*lead, columns * bits // 32), "uint32")
        for name in inputs[1:]:
            require(name, tensors, (*lead, groups), *(FLOATS if affine else ("uint8",)))
        how = {"group_size": size, "bits": bits, "mode": mode}
        packed[f"{path}.weight"] = Packed((*lead, columns), inputs, how)
    return Found(NAME, packed) if packed else None


def rows(sources: Sequence[Rows], shape: tuple[int, ...], settings: Any) -> Rows:
    """Return a weight, dequantized as it is read."""
    return Dequantized(sources, shape, settings)


def held_bytes(nbytes: Sequence[int]) -> int:
    """Return nothing: all is read by rows."""
    return 0


class Dequantized(Struct, frozen=True):
    """A weight that MLX quantized; ``settings`` may have a ``dtype`` to compute in."""

    sources: Sequence[Rows]
    shape: tuple[int, ...]
    settings: dict[str, Any]
    unit: int = 1

    @property
    def dtype(self) -> str:
        """That of the scales, or of what is to be computed in; bfloat16 in modes of floats."""
        if self.settings["mode"] != "affine":
            return "bfloat16"
        return str(self.settings.get("dtype") or self.sources[1].dtype)

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        weight, scales, *biases = (source.read(start, stop) for source in self.sources)
        if self.settings["mode"] == "affine":
            dtype = getattr(mx, self.dtype)
            scales, biases = scales.astype(dtype), [each.astype(dtype) for each in biases]
        return mx.dequantize(
            weight,
            scales,
            biases[0] if biases else None,
            group_size=self.settings["group_size"],
            bits=self.settings["bits"],
            mode=self.settings["mode"],
        )

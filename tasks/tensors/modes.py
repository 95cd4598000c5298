"""modes: which group sizes and bits the installed MLX takes in each mode; nothing is computed."""

from __future__ import annotations

from functools import cache

from tasks.core.quantization import MODES
from tasks.tensors import mx

_GROUP_SIZES = (16, 32, 64, 128, 256, 512)  # that any MLX might take


@cache
def numbers(mode: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the group sizes and the bits per weight that ``mx.quantize`` takes in a mode."""
    (group_size, *_), (bits, *_) = MODES[mode]
    weight = mx.zeros((1, max(_GROUP_SIZES)))

    def takes(group_size: int, bits: int) -> bool:
        try:
            mx.quantize(weight, group_size, bits, mode)
        except ValueError:
            return False
        return True

    return (
        tuple(size for size in _GROUP_SIZES if takes(size, bits)),
        tuple(number for number in range(1, 17) if takes(group_size, number)),
    )

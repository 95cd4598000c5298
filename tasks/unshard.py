"""unshard: whole tensors, by the layout's names, from the checkpoint's stored ones.

A parameter is made by *steps*, each a JSON list:

``["same"]``            copies in every shard; the digests must agree
``["concatenate", a]``  slices, joined on axis ``a``
``["stack", a]``        whole tensors, stacked on a new axis ``a`` (mlx-lm's experts)
``["half_split", h]``   rows of ``h`` heads, from interleaved to half-split rotary order
``["sanitize", name]``  what mlx-lm's ``sanitize`` computes for that parameter

The last is done in ``tasks.architecture``, by mlx-lm itself; ``tasks.rows`` does the others,
block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

VERSION = 1


def sanitized(steps: Sequence[Any]) -> bool:
    """Tell whether mlx-lm has to make the parameter."""
    return any(step[0] == "sanitize" for step in steps)


def half_split(weight: mx.array, *, heads: int) -> mx.array:
    """Reorder the rows of wq or wk from interleaved to half-split rotary order.

    Meta rotates rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + d / 2
    (transformers, ``convert_llama_weights_to_hf.py``).

    Args:
        weight: (heads · d, width).
        heads: number of heads.

    Returns:
        (heads · d, width).
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)  # heads, d / 2, 2, width
    return pairs.swapaxes(1, 2).reshape(rows, width)

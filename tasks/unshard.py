"""unshard: whole tensors, by the layout's names, from the checkpoint's stored ones.

A parameter is made by *steps*, each a JSON list:

``["same"]``            copies in every shard; the digests must agree
``["concatenate", a]``  slices, joined on axis ``a``
``["stack", a]``        whole tensors, stacked on a new axis ``a`` (mlx-lm's experts)
``["half_split", h]``   rows of ``h`` heads, from interleaved to half-split rotary order
``["sanitize", name]``  what mlx-lm's ``sanitize`` computes for that parameter

The last is done in ``tasks.architecture``, by mlx-lm itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

VERSION = 1


def only_joins(steps: Sequence[Any]) -> bool:
    """Tell whether the result is just the inputs' bytes, one after another."""
    return all(step[0] in ("concatenate", "stack") and step[1] == 0 for step in steps)


def unshard(arrays: Sequence[mx.array], steps: Sequence[Any]) -> mx.array:
    """Return the parameter that ``steps`` make of stored tensors.

    Args:
        arrays: the stored tensors, in order.
        steps: what to do, in order.
    """
    arrays = list(arrays)
    for name, *args in steps:
        if name == "same":
            arrays = arrays[:1]
        elif name == "concatenate":
            arrays = [mx.concatenate(arrays, args[0])]
        elif name == "stack":
            arrays = [mx.stack(arrays, args[0])]
        elif name == "half_split":
            arrays = [half_split(arrays[0], heads=args[0])]
        else:
            raise ValueError(f"unknown step {name!r}")
    (array,) = arrays
    return array


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

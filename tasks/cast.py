"""cast: floating tensors to the target's dtype, those that the model lets be cast."""

from __future__ import annotations

import mlx.core as mx

from tasks.model import Model

VERSION = 1
FLOATING = ("float16", "bfloat16", "float32")


def plan(model: Model, dtype: str | None) -> dict[str, str]:
    """Return each parameter's dtype after the cast.

    Args:
        model: the model.
        dtype: what to cast to, or None to cast nothing.
    """
    return {
        p.name: dtype if dtype in FLOATING and p.castable else p.dtype
        for p in model.parameters.values()
    }  # fmt: skip


def cast(array: mx.array, *, dtype: str) -> mx.array:
    """Return ``array`` in another dtype, rounded to nearest, ties to even."""
    return array.astype(getattr(mx, dtype))

"""cast: floating tensors to the target's dtype, those that the model lets be cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from cache.manifests import Tensor
from tasks import arrays, rows
from tasks.model import Model

if TYPE_CHECKING:
    from tasks.build import Builder, Made, Needed
    from tasks.plan import Node, Plan

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


def make(builder: Builder, plan: Plan, node: Node, needed: Needed) -> Made:
    """Cast a layer, and keep what is kept nowhere yet."""
    made: dict[str, Tensor] = {}
    for name, (_, tensor) in needed.items():
        dtype = node.params["dtypes"].get(name, tensor.dtype)
        # What the checkpoint or the store holds stays where it is. What unshard only
        # digested is kept from here on, so that later stages need no checkpoint.
        if dtype == tensor.dtype and builder.store.blobs.has(tensor.digest, tensor.nbytes):
            made[name] = tensor
            continue
        whole = builder.rows(plan, needed, name)
        length = Tensor(dtype, tensor.shape, "").nbytes
        with builder.store.blobs.writing(length) as writer:
            for block in rows.blocks(whole):
                writer.write(arrays.view(cast(block, dtype=dtype)))
        made[name] = Tensor(dtype, tensor.shape, writer.digest)
    return made, []

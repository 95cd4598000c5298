"""cast: floating tensors to the target's dtype, those that the model lets be cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cache.records.manifests import Tensor
from tasks.layouts.model import Model
from tasks.tensors import rows
from tasks.tensors.rows import Rows

if TYPE_CHECKING:
    from tasks.execution.builder import Builder, Made
    from tasks.planning.plan import Needed, Node, Plan

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


def make(builder: Builder, plan: Plan, node: Node, needed: Needed) -> Made:
    """Cast a layer."""
    keep = builder.keeps("cast")
    made: dict[str, Tensor] = {}
    for name, (_, tensor) in needed.items():
        if name in node.params["dtypes"]:
            whole = again(builder, plan, node, needed, name)
            made[name] = rows.digest(builder.store.blobs, whole, keep=keep)
        elif keep:
            made[name] = builder.kept(plan, needed, name)
        else:
            made[name] = tensor
    return made, []


def again(builder: Builder, plan: Plan, node: Node, needed: Needed, name: str) -> Rows:
    """Return a tensor, cast as it is read."""
    whole = builder.rows(plan, needed, name)
    dtype = node.params["dtypes"].get(name)
    return rows.Cast(whole, dtype) if dtype else whole

"""unshard: whole tensors, by the layout's names, from the checkpoint's stored ones.

A parameter is made by *steps*, each a JSON list:

``["same"]``            copies in every shard; the digests must agree
``["concatenate", a]``  slices, joined on axis ``a``
``["stack", a]``        whole tensors, stacked on a new axis ``a`` (mlx-lm's experts)
``["half_split", h]``   rows of ``h`` heads, from interleaved to half-split rotary order
``["sanitize", name]``  what mlx-lm's ``sanitize`` computes for that parameter
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cache.digest import digest_parts
from cache.manifests import Tensor
from tasks import architecture, arrays, rows
from tasks.errors import CheckpointError
from tasks.rows import Rows

if TYPE_CHECKING:
    from tasks.build import Builder, Made, Needed
    from tasks.plan import Node, Plan

VERSION = 1


def make(builder: Builder, plan: Plan, node: Node, needed: Needed) -> Made:
    """Make a layer's parameters; what is not just stored bytes is digested and not kept."""
    blobs = builder.store.blobs
    made: dict[str, Tensor] = {}
    for name, (dtype, shape, inputs, steps) in node.params["tensors"].items():
        if sanitized(steps):
            continue  # all at once, below
        sources = [needed[key] for key in inputs]
        first = sources[0][1].digest
        if steps and steps[0][0] == "same":
            if any(tensor.digest != first for _, tensor in sources):
                raise CheckpointError(
                    f"{plan.checkpoint.folder}: shards disagree on {name}, which each holds "
                    "whole. They are not of one checkpoint."
                )
            sources, steps = sources[:1], steps[1:]
        if not steps:
            made[name] = Tensor(dtype, tuple(shape), first)
        else:
            stored = [builder.rows(plan, needed, key) for key in inputs]
            whole = apply(stored, steps)
            if isinstance(whole, rows.Stored):  # just the inputs, end to end
                found = digest_parts(blobs.chunks(whole.parts))
                blobs.refer(found, whole.parts)
            else:
                found = digest_parts(arrays.view(block) for block in rows.blocks(whole))
            made[name] = Tensor(dtype, tuple(shape), found)
    made |= _sanitize(builder, plan, node, needed)
    return {name: made[name] for name in node.params["tensors"]}, []


def sanitized(steps: Sequence[Any]) -> bool:
    """Tell whether mlx-lm has to make the parameter."""
    return any(step[0] == "sanitize" for step in steps)


def apply(sources: Sequence[Rows], steps: Sequence[Any]) -> Rows:
    """Return the tensor that ``steps`` make of ``sources``, see this module's own docstring."""
    made = list(sources)
    for name, *args in steps:
        if name == "same":
            made = made[:1]
        elif name == "half_split":
            made = [rows.HalfSplit(made[0], args[0])]
        elif name == "concatenate" and args[0] == len(made[0].shape) - 1 > 0:
            made = [rows.Joined(made)]
        elif name == "concatenate" and args[0] == 0:
            made = [rows.end_to_end(made, (sum(s.shape[0] for s in made), *made[0].shape[1:]))]
        elif name == "stack" and args[0] == 0:
            made = [rows.end_to_end(made, (len(made), *made[0].shape))]
        elif name in ("concatenate", "stack"):
            made = [rows.Whole(made, name, args[0])]
        else:
            raise ValueError(f"unknown step {name!r}")
    (whole,) = made
    return whole


def _sanitize(builder: Builder, plan: Plan, node: Node, needed: Needed) -> dict[str, Tensor]:
    """Have mlx-lm make what is no plain tensor of the checkpoint."""
    told = {
        name: (dtype, shape, inputs)
        for name, (dtype, shape, inputs, steps) in node.params["tensors"].items()
        if sanitized(steps)
    }
    if not told:
        return {}
    inputs = {}
    for key in dict.fromkeys(i for _, _, keys in told.values() for i in keys):
        inputs[key] = builder.locate(plan, needed, key)
    made = {}
    need = sum(Tensor(dtype, tuple(shape), "").nbytes for dtype, shape, _ in told.values())
    with builder.store.blobs.scratch(need) as folder:
        outputs = {name: folder / str(number) for number, name in enumerate(told)}
        architecture.compute(plan.checkpoint, inputs, outputs)
        for name, (dtype, shape, _) in told.items():
            made[name] = Tensor(dtype, tuple(shape), builder.store.blobs.adopt(outputs[name]))
    return made

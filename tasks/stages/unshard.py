"""unshard: whole tensors, by the layout's names, from the checkpoint's stored ones.

A parameter is made by *steps*, each a JSON list:

``["same"]``            copies in every shard; the digests must agree
``["concatenate", a]``  slices, joined on axis ``a``
``["stack", a]``        whole tensors, stacked on a new axis ``a`` (mlx-lm's experts)
``["half_split", h]``   rows of ``h`` heads, from interleaved to half-split rotary order
``["sanitize", name]``  what mlx-lm's ``sanitize`` computes for that parameter
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cache.records.manifests import Tensor
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError
from tasks.layouts import architecture
from tasks.tensors import device, rows
from tasks.tensors.rows import Rows

if TYPE_CHECKING:
    from tasks.execution.builder import Builder, Made
    from tasks.planning.plan import Needed, Node, Plan

VERSION = 1
SANITIZE_BYTES = 256 << 20  # what mlx-lm is given and makes at once, unless one parameter is more


def make(builder: Builder, plan: Plan, node: Node, needed: Needed) -> Made:
    """Make a layer's parameters."""
    keep = builder.keeps("unshard")
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
            whole = apply([builder.rows(plan, needed, key) for key in inputs], steps)
            made[name] = rows.digest(builder.store.blobs, whole, keep=keep)
    made |= _sanitize(builder, plan, node, needed)
    return {name: made[name] for name in node.params["tensors"]}, []


def again(builder: Builder, plan: Plan, node: Node, needed: Needed, name: str) -> Rows | None:
    """Return a parameter, joined as it is read; None for one that mlx-lm made, which is kept."""
    _, _, inputs, steps = node.params["tensors"][name]
    if sanitized(steps):
        return None
    return apply([builder.rows(plan, needed, key) for key in inputs], steps)


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


def memory(checkpoint: Checkpoint, told: Mapping[str, Any], *, again: bool = False) -> int:
    """Return how many bytes are held at once besides blocks.

    Args:
        checkpoint: what the parameters are made of.
        told: the layer's tensors, as the action is told.
        again: of what is made again as it is read, not of ``make``.
    """
    whole = [_nbytes(checkpoint, told, [name]) for name in told if _whole(*told[name])]
    batches = [] if again else [_nbytes(checkpoint, told, b) for b in _batches(checkpoint, told)]
    return max([*whole, *batches], default=0)


def _whole(_dtype: str, shape: Sequence[int], _inputs: Sequence[str], steps: Sequence[Any]) -> bool:
    """Tell whether ``apply`` joins on an axis that cannot be read by rows."""
    by_rows = {"stack": (0,), "concatenate": (0, len(shape) - 1)}
    return any(step[1] not in by_rows.get(step[0], step[1:]) for step in steps if len(step) > 1)


def _batches(checkpoint: Checkpoint, told: Mapping[str, Any]) -> list[list[str]]:
    """Return the parameters that mlx-lm has to make, those that it makes at once together."""
    batches: list[list[str]] = []
    for name, (_, _, _, steps) in told.items():
        if not sanitized(steps):
            continue
        if batches and _nbytes(checkpoint, told, [*batches[-1], name]) <= SANITIZE_BYTES:
            batches[-1].append(name)
        else:
            batches.append([name])
    return batches


def _nbytes(checkpoint: Checkpoint, told: Mapping[str, Any], names: Sequence[str]) -> int:
    """Return the size of parameters and of all that they are made of."""
    made = [Tensor(told[name][0], told[name][1], "").nbytes for name in names]
    inputs = {key for name in names for key in told[name][2]}
    return sum(made) + sum(checkpoint.stored[key].nbytes for key in inputs)


def _sanitize(builder: Builder, plan: Plan, node: Node, needed: Needed) -> dict[str, Tensor]:
    """Have mlx-lm make what is no plain tensor of the checkpoint."""
    told = node.params["tensors"]
    made = {}
    for batch in _batches(plan.checkpoint, told):
        keys = dict.fromkeys(key for name in batch for key in told[name][2])
        inputs = {key: builder.locate(plan, needed, key) for key in keys}
        tensors = {name: Tensor(told[name][0], tuple(told[name][1]), "") for name in batch}
        need = sum(tensor.nbytes for tensor in tensors.values())
        with builder.store.blobs.scratch(need) as folder:
            outputs = {name: folder / str(number) for number, name in enumerate(batch)}
            computes = device.device_of(node.params["sanitize"]["device"])
            architecture.compute(plan.checkpoint, computes, inputs, outputs)
            for name, tensor in tensors.items():
                found = builder.store.blobs.adopt(outputs[name])
                made[name] = replace(tensor, digest=found)
    return made

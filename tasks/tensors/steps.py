"""steps: what a parameter is made of stored tensors by: copies, joins, a reordering of rows.

In JSON each is a list: ``["same"]``, ``["concatenate", 0]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from tasks.tensors import rows
from tasks.tensors.rows import Rows


class Same(msgspec.Struct, frozen=True, array_like=True, tag="same"):
    """Copies in every shard: their digests must agree."""


class Concatenate(msgspec.Struct, frozen=True, array_like=True, tag="concatenate"):
    """Slices, joined on an axis."""

    axis: int


class Stack(msgspec.Struct, frozen=True, array_like=True, tag="stack"):
    """Whole tensors, stacked on a new axis, as experts are."""

    axis: int


class HalfSplit(msgspec.Struct, frozen=True, array_like=True, tag="half_split"):
    """Rows of so many heads, from interleaved to half-split rotary order."""

    heads: int


class Sanitize(msgspec.Struct, frozen=True, array_like=True, tag="sanitize"):
    """What a library's own ``sanitize`` computes for the parameter of this name."""

    name: str


Step = Same | Concatenate | Stack | HalfSplit | Sanitize


def read(steps: Iterable[Sequence[Any]]) -> tuple[Step, ...]:
    """Return steps as JSON has them.

    Raises:
        msgspec.ValidationError: one is none.
    """
    return msgspec.convert(tuple(steps), tuple[Step, ...])


def computed_by_library(steps: Iterable[Step]) -> bool:
    """Tell whether a library has to make the parameter."""
    return any(isinstance(step, Sanitize) for step in steps)


def apply(sources: Sequence[Rows], steps: Iterable[Step]) -> Rows:
    """Return the tensor that steps make of tensors, to be read by rows."""
    made = list(sources)
    for step in steps:
        match step:
            case Same():
                made = made[:1]
            case HalfSplit(heads):
                made = [rows.HalfSplit(made[0], heads)]
            case Concatenate(axis) if axis == len(made[0].shape) - 1 > 0:
                made = [rows.Joined(made)]
            case Concatenate(0):
                length = sum(source.shape[0] for source in made)
                made = [rows.end_to_end(made, (length, *made[0].shape[1:]))]
            case Stack(0):
                made = [rows.end_to_end(made, (len(made), *made[0].shape))]
            case Concatenate(axis):
                made = [rows.Whole(made, "concatenate", axis)]
            case Stack(axis):
                made = [rows.Whole(made, "stack", axis)]
            case Sanitize(name):
                raise ValueError(f"{name} is made by a library, not by rows")
    (whole,) = made
    return whole


def lies_in_inputs(steps: Iterable[Step]) -> bool:
    """Tell whether the bytes of what steps make lie in the inputs, one after another."""
    return all(step in (Same(), Concatenate(0), Stack(0)) for step in steps)


def needs_whole(shape: Sequence[int], steps: Iterable[Step]) -> bool:
    """Tell whether steps join on an axis that cannot be read by rows.

    Args:
        shape: of what is made.
        steps: that make it.
    """
    last = len(shape) - 1
    return any(
        (isinstance(step, Stack) and step.axis != 0)
        or (isinstance(step, Concatenate) and step.axis not in (0, last))
        for step in steps
    )


def work(steps: Sequence[Step]) -> Sequence[Step]:
    """Return the steps that make anything: to compare copies makes nothing."""
    return steps[1:] if steps and isinstance(steps[0], Same) else steps

"""steps: how a parameter is made of stored tensors: compared copies, joins, reordered rows.

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


class Packing(msgspec.Struct, frozen=True, array_like=True):
    """How tensors of one kind are packed, that follow each other.

    Attributes:
        count: how many they are.
        shape: of each, unpacked.
        inputs: how many stored tensors make one.
        settings: of the format.
    """

    count: int
    shape: tuple[int, ...]
    inputs: int
    settings: dict[str, Any]


class Unpack(msgspec.Struct, frozen=True, array_like=True, tag="unpack"):
    """Numbers that were packed in a format of ``tasks.unpack``, back to floats.

    Attributes:
        format: its name.
        dtype: of the floats.
        tensors: what is unpacked, in order.
    """

    format: str
    dtype: str
    tensors: tuple[Packing, ...]


class Repack(msgspec.Struct, frozen=True, array_like=True, tag="repack"):
    """Numbers that were packed in a format of ``tasks.unpack``, in MLX's own packing.

    Attributes:
        format: its name.
        part: what is made: ``weight``, ``scales`` or ``biases``.
        dtype: of scales and biases.
        setting: how MLX has them: group size, bits, mode.
        exact: whether a bias that is rounded is an error.
        tensors: what is repacked, in order.
    """

    format: str
    part: str
    dtype: str
    setting: tuple[int, int, str]
    exact: bool
    tensors: tuple[Packing, ...]


class Sanitize(msgspec.Struct, frozen=True, array_like=True, tag="sanitize"):
    """What a library's own ``sanitize`` computes for the parameter of this name."""

    name: str


Step = Same | Concatenate | Stack | HalfSplit | Unpack | Repack | Sanitize


def read(steps: Iterable[Sequence[Any]]) -> tuple[Step, ...]:
    """Return steps as JSON has them.

    Raises:
        msgspec.ValidationError: one is no step.
    """
    return msgspec.convert(tuple(steps), tuple[Step, ...])


def computed_by_library(steps: Iterable[Step]) -> bool:
    """Tell whether a library has to make the parameter."""
    return any(isinstance(step, Sanitize) for step in steps)


def apply(sources: Sequence[Rows], steps: Iterable[Step]) -> Rows:
    """Return the tensor that steps make of ``sources``, to be read by rows.

    Raises:
        ValueError: a library has to make it.
    """
    tensors = list(sources)
    for step in steps:
        match step:
            case Same():
                tensors = tensors[:1]
            case HalfSplit(heads):
                tensors = [rows.HalfSplit(tensors[0], heads)]
            case Concatenate(axis) if axis == len(tensors[0].shape) - 1 > 0:
                tensors = [rows.Joined(tensors)]
            case Concatenate(0):
                length = sum(source.shape[0] for source in tensors)
                tensors = [_end_to_end(tensors, (length, *tensors[0].shape[1:]))]
            case Stack(0):
                tensors = [_end_to_end(tensors, (len(tensors), *tensors[0].shape))]
            case Concatenate(axis):
                tensors = [rows.JoinedInMemory(tensors, "concatenate", axis)]
            case Stack(axis):
                tensors = [rows.JoinedInMemory(tensors, "stack", axis)]
            case Unpack() | Repack() | Sanitize():
                raise ValueError(f"{step} is made of whole tensors elsewhere, not by rows")
    (result,) = tensors
    return result


def _end_to_end(tensors: Sequence[Rows], shape: tuple[int, ...]) -> Rows:
    if all(isinstance(tensor, rows.Stored) for tensor in tensors):
        return rows.end_to_end(tensors, shape)
    return rows.Chained(tensors, shape)


def lies_in_inputs(steps: Iterable[Step]) -> bool:
    """Tell whether what steps make is the inputs' bytes, one after another."""
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
    """Return the steps that make something: comparing copies makes nothing."""
    return steps[1:] if steps and isinstance(steps[0], Same) else steps

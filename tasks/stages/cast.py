"""cast: floating tensors to the target's dtype, those that the model lets be cast."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import prod
from typing import Any, cast

from cache.records.manifests import Tensor, TensorSpec
from tasks.stages.reasons import Reason, changes
from tasks.stages.stage import (
    Context,
    Inputs,
    Keep,
    Key,
    Origin,
    Output,
    Params,
    Planned,
    Result,
    Stage,
    TargetModel,
)  # fmt: skip
from tasks.tensors import arrays, mx, rows
from tasks.tensors.rows import Rows

INFINITY = 0x7C00  # float16's, and the least of its NaN, as an integer
SIGN = 0x8000
MANY = 1 / 1000  # so many zeros are not just the tail of a normal distribution


class CastParams(Params, frozen=True):
    """What is cast.

    Attributes:
        dtypes: the dtype after the cast, by name; other tensors stay as they are.
    """

    dtypes: dict[str, str]


class Narrowed:
    """A tensor cast to float16 as it is read once, which counts what does not fit into it."""

    dtype = "float16"

    def __init__(self, source: Rows) -> None:
        self.source = source
        self.shape = source.shape
        self.unit = source.unit
        self.infinite = 0  # numbers that became infinity
        self.zero = 0  # numbers that became zero, of blocks where many did

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``.

        The block is looked at while it is in the processor's cache, as integers: that takes a
        fiftieth of the time of the cast. What it was cast from is looked at only where need be.
        """
        import numpy as np  # not needed where there is nothing to do

        wide = self.source.read(start, stop)
        narrow = wide.astype(mx.float16)
        bits = np.frombuffer(arrays.view(narrow), np.int16)
        if bits.size == 0:
            return narrow
        if bits.max() >= INFINITY or bits.view(np.uint16).max() >= INFINITY | SIGN:
            self.infinite += _count(mx.isinf(narrow) & mx.isfinite(wide))
        zeros = bits.size - np.count_nonzero(bits)
        if bits.min() == -SIGN:
            zeros += np.count_nonzero(bits == -SIGN)
        if zeros > MANY * bits.size:
            self.zero += _count((narrow == 0) & (wide != 0))
        return narrow

    def notes(self, name: str) -> list[str]:
        """Return what people should know of the tensor ``name``, once it is read."""
        size = prod(self.shape)
        notes = []
        if self.infinite:
            notes.append(
                f"{name}: {self.infinite:,} of {size:,} values are too large for float16, and "
                'infinite in it; dtype = "bfloat16" holds them'
            )
        if self.zero > MANY * size:
            notes.append(
                f"{name}: {self.zero:,} of {size:,} values are too small for float16, and zero in "
                'it; dtype = "bfloat16" holds them'
            )
        return notes


def _count(mask: mx.array) -> int:
    return int(cast("int", mx.sum(mask).item()))


class Cast(Stage[CastParams]):
    """Cast each layer to the target's dtype."""

    name = "cast"
    version = 1
    keep = Keep.CONFIGURED
    params = CastParams
    one_by_one = True

    def plan(self, target: TargetModel) -> Mapping[str, Planned[CastParams]]:
        """Plan to cast each parameter that is not of its dtype."""
        planned = {}
        for layer, parameters in target.layers.items():
            dtypes = {p.name: target.dtype_after_cast(p) for p in parameters}
            params = CastParams({p.name: d for p in parameters if (d := dtypes[p.name]) != p.dtype})
            planned[layer] = Planned(params, target.same_layer(layer))
        return planned

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return the dtype."""
        return target.dtype

    def outputs(self, params: CastParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return tensors of the same names and shapes."""
        outputs = {}
        for key, spec in inputs.items():
            dtype = params.dtypes.get(key.name)
            origin = Origin.VIEW if dtype else Origin.PASSED_ON
            outputs[key.name] = Output(TensorSpec(dtype or spec.dtype, spec.shape), origin, (key,))
        return outputs

    def run(self, params: CastParams, inputs: Inputs, context: Context) -> Result:
        """Cast a layer."""
        tensors: dict[str, Tensor] = {}
        notes: list[str] = []
        for key, tensor in inputs.items():
            if key.name in params.dtypes:
                made = context.made(key) or self.make(params, key, context.rows(key), context)
                tensors |= made.tensors
                notes += made.notes
            else:
                tensors[key.name] = context.pass_on(key) if context.keeps else tensor
        return Result(tensors, tuple(notes))

    def make(self, params: CastParams, key: Key, source: Rows, context: Context) -> Result:
        """Cast a tensor."""
        dtype = params.dtypes[key.name]
        narrow = Narrowed(source) if dtype == Narrowed.dtype else None
        tensor = context.read(key.name, narrow or rows.Cast(source, dtype))
        return Result({key.name: tensor}, tuple(narrow.notes(key.name) if narrow else ()))

    def view(self, params: CastParams, inputs: Inputs, context: Context, name: str) -> Rows:
        """Return a tensor, cast as it is read."""
        source = context.rows(next(key for key in inputs if key.name == name))
        dtype = params.dtypes.get(name)
        return rows.Cast(source, dtype) if dtype else source

    def describe(self, params: CastParams) -> str:
        """Return the dtypes that tensors are cast to."""
        dtypes = sorted({*params.dtypes.values()})
        return f"to {', '.join(dtypes)}" if dtypes else "as it is"

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare dtypes by name."""
        return changes(
            "dtype", old.get("dtypes") or {}, new.get("dtypes") or {}, "the checkpoint's"
        )

"""cast: floating tensors to the target's dtype, those that the model lets be cast."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from cache.records.manifests import TensorSpec
from tasks.layouts.model import Parameter
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
from tasks.tensors import rows
from tasks.tensors.rows import Rows

FLOATING = ("float16", "bfloat16", "float32")


class CastParams(Params, frozen=True):
    """What is cast.

    Attributes:
        dtypes: the dtype after the cast, by name; other tensors stay as they are.
    """

    dtypes: dict[str, str]


def dtype_after(parameter: Parameter, dtype: str | None) -> str:
    """Return a parameter's dtype after a cast to ``dtype``; None casts nothing."""
    return dtype if dtype in FLOATING and parameter.castable else parameter.dtype


class Cast(Stage[CastParams]):
    """Cast each layer to the target's dtype."""

    name = "cast"
    version = 1
    keep = Keep.CONFIGURED
    params = CastParams

    def plan(self, target: TargetModel) -> Mapping[str, Planned[CastParams]]:
        """Plan to cast each parameter that is not of its dtype."""
        planned = {}
        for layer, parameters in target.layers.items():
            dtypes = {p.name: dtype_after(p, target.dtype) for p in parameters}
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
        tensors = {}
        for key, tensor in inputs.items():
            if key.name in params.dtypes:
                view = self.view(params, inputs, context, key.name)
                tensors[key.name] = rows.digest(context.blobs, view, keep=context.keeps)
            else:
                tensors[key.name] = context.pass_on(key) if context.keeps else tensor
        return Result(tensors)

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

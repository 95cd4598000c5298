"""toy_stage: a stage of one file, and the example of CONTRIBUTING.md: weights times a factor."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest import mock

from cache.records.manifests import TensorSpec
from tasks.stages import registry
from tasks.stages.quantize_scheme import parts
from tasks.stages.reasons import Reason, changed_values
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
from tasks.tensors import mx
from tasks.tensors.rows import Rows


class ScaleParams(Params, frozen=True):
    """What is scaled.

    Attributes:
        names: of the weights.
        factor: what each is multiplied by.
    """

    names: list[str]
    factor: float


@dataclass(frozen=True)
class Scaled:
    """A tensor times a factor, made as it is read."""

    source: Rows
    factor: float

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def unit(self) -> int:
        return self.source.unit

    def read(self, start: int, stop: int) -> mx.array:
        return self.source.read(start, stop) * self.factor


class Scale(Stage[ScaleParams]):
    """Scale the weights of each layer's MLP."""

    name = "scale"
    version = 1
    keep = Keep.CONFIGURED
    params = ScaleParams

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ScaleParams]]:
        planned = {}
        for layer, parameters in target.layers.items():
            names = self.names(target, [p.name for p in parameters])
            params = ScaleParams(names, self.factor if names else 1.0)
            planned[layer] = Planned(params, target.same_layer(layer))
        return planned

    def names(self, target: TargetModel, parameters: Sequence[str]) -> list[str]:
        return [name for name in parameters if ".mlp." in name]

    def outputs(self, params: ScaleParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        return {
            key.name: Output(spec, _origin(params, key.name), (key,))
            for key, spec in inputs.items()
        }

    def run(self, params: ScaleParams, inputs: Inputs, context: Context) -> Result:
        outputs = {}
        for key, tensor in inputs.items():
            if key.name in params.names:
                whole = self.view(params, inputs, context, key.name)
                outputs[key.name] = context.read(key.name, whole)
            else:
                outputs[key.name] = context.pass_on(key) if context.keeps else tensor
        return Result(outputs)

    def view(self, params: ScaleParams, inputs: Inputs, context: Context, name: str) -> Rows:
        whole = context.rows(next(key for key in inputs if key.name == name))
        return Scaled(whole, params.factor) if name in params.names else whole

    def describe(self, params: ScaleParams) -> str:
        return f"times {params.factor}" if params.names else "as it is"

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        return changed_values(old, new)


def _origin(params: ScaleParams, name: str) -> Origin:
    return Origin.VIEW if name in params.names else Origin.PASSED_ON


class ScalePacked(Scale):
    """Scale each weight once it is quantized, and the norms."""

    name = "scale-packed"
    keep = Keep.ALWAYS  # what is packed lies in the cache

    def names(self, target: TargetModel, parameters: Sequence[str]) -> list[str]:
        every = (
            parts(name, target.settings[name])[1:] for name in parameters if name in target.settings
        )
        return [*chain(*every), *(name for name in parameters if "norm" in name)]


TOY = Scale(0.5)


@contextmanager
def registered(*, last: Scale | None = None) -> Iterator[Scale]:
    """The registry with the toy stage between cast and quantize, or another at the end."""
    *before, quantize = registry.PIPELINE
    stages = (*registry.PIPELINE, last) if last else (*before, TOY, quantize)
    with mock.patch.object(registry, "PIPELINE", stages):
        yield last or TOY

"""unshard: whole tensors, by the layout's names, from the checkpoint's stored ones."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError
from tasks.layouts import sanitizer
from tasks.layouts.model import Parameter
from tasks.stages.reasons import Reason, changed_values, tensor_changes
from tasks.stages.stage import (
    Context,
    Inputs,
    Keep,
    Key,
    Need,
    Origin,
    Output,
    Params,
    Planned,
    Result,
    Stage,
    TargetModel,
)  # fmt: skip
from tasks.tensors import device, steps
from tasks.tensors.rows import IN_FLIGHT_BYTES, Rows
from tasks.tensors.steps import Same, Step
from tasks.unpack import registry as unpack

SANITIZE_BYTES = 256 << 20  # what a library is given and makes at once, unless one takes more
WORDS = {
    "same": "copies compared",
    "unpack": "unpacked",
    "repack": "repacked",
    "concatenate": "shards joined",
    "stack": "experts stacked",
    "half_split": "rows of wq and wk reordered",
    "sanitize": "the library's sanitize",
}


class Recipe(msgspec.Struct, frozen=True, array_like=True):
    """How a parameter is made.

    Attributes:
        dtype: of the parameter.
        shape: of the parameter.
        inputs: keys of the stored tensors that it is made of, in order.
        steps: what to do with them.
    """

    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    steps: tuple[Step, ...]

    @property
    def spec(self) -> TensorSpec:
        """The parameter's dtype and shape."""
        return TensorSpec(self.dtype, self.shape)


class Sanitizer(msgspec.Struct, frozen=True):
    """What a library's ``sanitize`` depends on besides the tensors.

    Attributes:
        identity: digest of what the library is asked, see ``sanitizer.identity``.
        device: what computes: ``cpu``, ``metal``, ``cuda``.
        machine: the processor.
    """

    identity: str = msgspec.field(name="asked")
    device: str
    machine: str


class UnshardParams(Params, frozen=True):
    """What is joined.

    Attributes:
        tensors: how each parameter is made.
        sanitize: what computes those that a library makes; None if there are none.
    """

    tensors: dict[str, Recipe]
    sanitize: Sanitizer | None = None


class Unshard(Stage[UnshardParams]):
    """Join shards into whole tensors, by the layout's names."""

    name = "unshard"
    version = 1
    keep = Keep.CONFIGURED
    params = UnshardParams

    def plan(self, target: TargetModel) -> Mapping[str, Planned[UnshardParams]]:
        """Plan each parameter by the model's recipe for it."""
        layer_of = {key: layer for layer, keys in target.stored_layers.items() for key in keys}
        recipes = {
            layer: {p.name: _recipe(p) for p in parameters}
            for layer, parameters in target.layers.items()
        }
        computed = {
            layer
            for layer, by_name in recipes.items()
            if any(steps.computed_by_library(recipe.steps) for recipe in by_name.values())
        }
        if computed:  # of all layers the same, and as long as the checkpoint's table
            identity = sanitizer.identity(target.checkpoint, target.model)
            sanitize = Sanitizer(identity, target.computer.device, platform.machine())
        planned = {}
        for layer, by_name in recipes.items():
            reads = {key: layer_of[key] for recipe in by_name.values() for key in recipe.inputs}
            needs = tuple(Need(target.previous, need) for need in dict.fromkeys(reads.values()))
            params = UnshardParams(by_name, sanitize if layer in computed else None)
            planned[layer] = Planned(params, needs, frozenset(reads))
        return planned

    def outputs(self, params: UnshardParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the parameters. Copies that are only compared are passed on."""
        keys = {key.name: key for key in inputs}
        outputs = {}
        for name, recipe in params.tensors.items():
            origin = Origin.VIEW
            made_of = recipe.inputs
            if not steps.work(recipe.steps):
                origin, made_of = Origin.PASSED_ON, recipe.inputs[:1]
            elif steps.computed_by_library(recipe.steps):
                origin = Origin.STORED
            elif steps.lies_in_inputs(recipe.steps):
                origin = Origin.REFERENCE
            read = tuple(keys[key] for key in made_of if key in keys)
            outputs[name] = Output(recipe.spec, origin, read)
        return outputs

    def run(self, params: UnshardParams, inputs: Inputs, context: Context) -> Result:
        """Make a layer's parameters."""
        keys = {key.name: key for key in inputs}
        tensors: dict[str, Tensor] = {}
        for name, recipe in params.tensors.items():
            if steps.computed_by_library(recipe.steps):
                continue  # all at once, below
            first = inputs[keys[recipe.inputs[0]]].digest
            compared = recipe.steps[:1] == (Same(),)
            if compared and any(inputs[keys[key]].digest != first for key in recipe.inputs):
                raise CheckpointError(
                    f"{context.checkpoint.folder}: shards disagree on {name}, which each holds "
                    "whole. They are not of one checkpoint."
                )
            if not steps.work(recipe.steps):
                tensors[name] = Tensor(recipe.dtype, recipe.shape, first)
            else:
                joined = _rows(recipe, keys, context)
                try:
                    tensors[name] = context.read(name, joined)
                except CheckpointError as error:
                    raise CheckpointError(
                        f"{context.checkpoint.folder}: {name}: {error}"
                    ) from error
        tensors |= _sanitize(params, keys, context)
        return Result({name: tensors[name] for name in params.tensors})

    def view(
        self, params: UnshardParams, inputs: Inputs, context: Context, name: str
    ) -> Rows | None:
        """Return a parameter, joined as it is read; None for one that a library made."""
        recipe = params.tensors[name]
        if steps.computed_by_library(recipe.steps):
            return None
        return _rows(recipe, {key.name: key for key in inputs}, context)

    def memory(self, params: UnshardParams, checkpoint: Checkpoint) -> int:
        """Return the size of what is joined as a whole, or made by a library."""
        batches = [_nbytes(checkpoint, params, b) for b in _batches(checkpoint, params)]
        joined = self.view_memory(params, checkpoint)
        return max([joined, *batches]) + IN_FLIGHT_BYTES

    def view_memory(self, params: UnshardParams, checkpoint: Checkpoint) -> int:
        """Return the size of the largest parameter that is joined as a whole, with its inputs.

        Or of what is held while one is unpacked.
        """
        sizes = [
            _nbytes(checkpoint, params, [name])
            for name, recipe in params.tensors.items()
            if steps.needs_whole(recipe.shape, recipe.steps)
        ]
        held = [
            unpack.held_bytes([checkpoint.stored[key].nbytes for key in r.inputs], r.steps)
            for r in params.tensors.values()
            if r.steps
        ]
        return max([*sizes, *held], default=0)

    def describe(self, params: UnshardParams) -> str:
        """Return the kinds of steps, in words."""
        names = {
            step.__struct_config__.tag
            for recipe in params.tensors.values()
            for step in recipe.steps
        }
        return ", ".join(words for name, words in WORDS.items() if name in names) or "as stored"

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare recipes by name, and what a library's ``sanitize`` depends on."""
        reasons = tensor_changes(old.get("tensors") or {}, new.get("tensors") or {})
        if old.get("sanitize") != new.get("sanitize"):
            reasons.append(Reason("what the library's sanitize depends on changed"))
        return reasons + changed_values(old, new, but=("tensors", "sanitize"))


def _recipe(parameter: Parameter) -> Recipe:
    """Return how the model says that a parameter is made."""
    return Recipe(parameter.dtype, parameter.shape, parameter.inputs, steps.read(parameter.steps))


def _rows(recipe: Recipe, keys: Mapping[str, Key], context: Context) -> Rows:
    """Return a parameter, joined as it is read."""
    return unpack.apply([context.rows(keys[key]) for key in recipe.inputs], recipe.steps)


def _batches(checkpoint: Checkpoint, params: UnshardParams) -> list[list[str]]:
    """Return the parameters that a library has to make, those that it makes at once together."""
    batches: list[list[str]] = []
    for name, recipe in params.tensors.items():
        if not steps.computed_by_library(recipe.steps):
            continue
        if batches and _nbytes(checkpoint, params, [*batches[-1], name]) <= SANITIZE_BYTES:
            batches[-1].append(name)
        else:
            batches.append([name])
    return batches


def _nbytes(checkpoint: Checkpoint, params: UnshardParams, names: Iterable[str]) -> int:
    """Return the size of parameters and of all that they are made of."""
    recipes = [params.tensors[name] for name in names]
    inputs = {key for recipe in recipes for key in recipe.inputs}
    outputs = sum(recipe.spec.nbytes for recipe in recipes)
    return outputs + sum(checkpoint.stored[key].nbytes for key in inputs)


def _sanitize(
    params: UnshardParams, keys: Mapping[str, Key], context: Context
) -> dict[str, Tensor]:
    """Have the library make what is no plain tensor of the checkpoint."""
    tensors: dict[str, Tensor] = {}
    if params.sanitize is None:
        return tensors
    computes_on = device.device_of(params.sanitize.device)
    process = context.once(
        ("sanitizer", params.sanitize),
        lambda: sanitizer.Sanitizer(context.checkpoint, context.model, computes_on),
    )
    for batch in _batches(context.checkpoint, params):
        read = dict.fromkeys(key for name in batch for key in params.tensors[name].inputs)
        inputs = {key: context.parts(keys[key]) for key in read}
        with context.blobs.scratch(_nbytes(context.checkpoint, params, batch)) as folder:
            outputs = {name: folder / str(number) for number, name in enumerate(batch)}
            process.compute(inputs, outputs, context.blobs.root)
            for name, path in outputs.items():
                tensor = Tensor(*params.tensors[name].spec, "")
                tensors[name] = replace(tensor, digest=context.blobs.adopt(path))
    return tensors

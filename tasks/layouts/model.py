"""model: a model as a layout names it: its parameters, and the modules that hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from msgspec import Struct, field

from tasks.checkpoints.checkpoint import Checkpoint
from tasks.unpack.packed import Repacking

Verdict = bool | dict[str, Any]  # on quantizing a module: yes, no, or with which settings


class Parameter(NamedTuple):
    """A parameter of the model, and what it is made from.

    Attributes:
        name: in the layout.
        dtype: as made, before any cast.
        shape: as made.
        inputs: keys of stored tensors (``Checkpoint.stored``), in order.
        steps: what to do with them, see ``tasks.stages.unshard``.
        castable: whether the model lets its dtype be changed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    steps: tuple[Any, ...]
    castable: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Module(NamedTuple):
    """A leaf module.

    Attributes:
        path: in the model, dotted.
        names: its parameters', below ``path``, in order.
        quantized_names: the same once it is quantized, affine; None if it cannot be quantized,
            empty if it can but not as ``mx.quantize`` of its weight.
        verdict: what the model itself says of quantizing it: yes, no, or with which settings.
        weights: how many it has, as mlx-lm counts them.
    """

    path: str
    names: tuple[str, ...]
    quantized_names: tuple[str, ...] | None
    verdict: Verdict
    weights: int


class Unpacked(Struct, frozen=True):
    """What is known of a checkpoint that its author packed, and whose plain model this is.

    Attributes:
        note: what people should know.
        repackings: how MLX holds each weight, by the key of the first tensor that it is made of.
    """

    note: str
    repackings: Mapping[str, Repacking | None]


class Model(Struct, frozen=True):
    """A model in a layout.

    Attributes:
        parameters: by name, in the order in which the layout writes them.
        modules: the leaf modules.
        config: config.json as far as it does not depend on the target's settings.
        recipes: per mixed recipe, its word by module path, or why it does not fit the model; a
            number is bits, in groups of the target's size.
        notes: what people should know.
        library: whose classes make it, and compute what is no plain tensor of the checkpoint;
            empty if there can be no such parameter.
        values: of tensors that the library decided by, by name, in base64.
        left_out: tensors of the checkpoint that the library is not told of.
        told: the checkpoint as the library was told of it; None, as it is.
        unpacked: what is known of how it was packed, where that was not left to the library.
        kept: what people should know of weights that stay as they were packed.
        runs: whether the library can be asked to run it.
    """

    parameters: dict[str, Parameter]
    modules: tuple[Module, ...]
    config: dict[str, Any]
    recipes: dict[str, dict[str, int | Verdict] | str]
    notes: tuple[str, ...] = field(default=())
    library: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    told: Checkpoint | None = None
    unpacked: Unpacked | None = None
    kept: tuple[str, ...] = ()
    runs: bool = False


PREFIXES = re.compile(r"^((language_model|model|transformer|backbone)\.)+")
NUMBER = re.compile(r"(?<=[^.])\.\d+(?=\.)")


def layer_names(names: list[str]) -> dict[str, str]:
    """Return the layer of each parameter or tensor name.

    A layer is the path up to its first number (``layers.0``), or for what belongs to no block
    the module's path (``norm``). Prefixes that all models have (``model.``) are dropped, unless
    two layers would then share a name.
    """
    full = {name: _layer(name) for name in names}
    short = {layer: PREFIXES.sub("", layer) for layer in dict.fromkeys(full.values())}
    if len(set(short.values())) < len(short):
        short = {layer: layer for layer in short}
    return {name: short[layer] for name, layer in full.items()}


def _layer(name: str) -> str:
    if match := NUMBER.search(name):
        return name[: match.end()]
    return name.rsplit(".", 1)[0] if "." in name else name

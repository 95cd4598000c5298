"""plan: a target's stages and layers, known from headers and configuration alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cache.digest import digest_record
from cache.memos import Memos
from tasks import architecture, cast, extract, loaders, quantize, unshard
from tasks.checkpoint import Checkpoint, Stored
from tasks.config import Target
from tasks.errors import BuildError
from tasks.layouts import LAYOUTS
from tasks.model import Model, Module, layer_names


@dataclass(frozen=True)
class Node:
    """One stage of one layer of one target.

    Attributes:
        stage: the stage's name.
        target: the target's name.
        layer: the layer's name.
        version: the stage's version.
        params: what the stage is told, JSON; a part of the action's key.
        needs: the nodes whose tensors it reads.
        reads: names of the tensors that it reads of them, or None for all.
        look: what else decides whether there is anything to look at (a file's stamp), JSON.
    """

    stage: str
    target: str
    layer: str
    version: int
    params: dict[str, Any]
    needs: tuple[Node, ...] = ()
    reads: frozenset[str] | None = None
    look: Any = None

    @property
    def name(self) -> str:
        """The task's name."""
        return f"{self.stage}:{self.target}:{self.layer}"

    @cached_property
    def digest(self) -> str:
        """Digest of what this node is told."""
        return digest_record([self.version, self.params, self.look])


@dataclass(frozen=True)
class Plan:
    """A target, worked out.

    Attributes:
        target: what was asked for.
        checkpoint: what it is made from.
        model: the model in the target's layout.
        stages: the nodes of each per-layer stage, in the order of layers.
        names: the built model's tensors, in the order in which they are written.
        config: config.json.
        weights: how many the model has, as mlx-lm counts them.
        notes: what people should know.
    """

    target: Target
    checkpoint: Checkpoint
    model: Model
    stages: dict[str, list[Node]]
    names: list[str]
    config: dict[str, Any]
    weights: int
    notes: tuple[str, ...] = field(default=())

    def stored(self, key: str) -> tuple[Path, Stored]:
        """Return the file of a stored tensor, and where it lies there."""
        stored = self.checkpoint.stored[key]
        return self.checkpoint.folder / stored.file, stored


class Planner:
    """Plans targets; what several have in common is read once."""

    def __init__(self, memos: Memos) -> None:
        self.memos = memos
        self._checkpoints: dict[tuple[Path, str | None], Checkpoint] = {}
        self._models: dict[tuple[Path, str | None, str], Model] = {}

    def plan(self, target: Target) -> Plan:
        """Work a target out.

        Raises:
            BuildError: the checkpoint, the model or a setting makes it impossible. The message
                begins with the target's name.
        """
        try:
            return self._plan(target)
        except BuildError as error:
            raise type(error)(f"{target.name}: {error}") from error

    def _plan(self, target: Target) -> Plan:
        layout = LAYOUTS[target.layout]
        source = (target.source, target.loader)
        if source not in self._checkpoints:
            self._checkpoints[source] = loaders.read(*source, self.memos)
        checkpoint = self._checkpoints[source]
        if (*source, target.layout) not in self._models:
            layout.sources(checkpoint)  # refuses a checkpoint without tokenizer
            self._models[*source, target.layout] = layout.model(checkpoint, self.memos)
        model = self._models[*source, target.layout]
        layout.check(target, model)
        packed = quantize.plan(model, target.quantize)
        config = layout.config(target, model, packed.config)
        casts = cast.plan(model, target.dtype or layout.default_dtype(checkpoint, model))
        stages = _nodes(target, checkpoint, model, casts, packed)
        names = [name for names in _ordered(model, packed) for name in names]
        weights = sum(_weights(model, module, packed) for module in model.modules)
        notes = (*model.notes, *packed.notes)
        return Plan(target, checkpoint, model, stages, names, config, weights, notes)


def _nodes(
    target: Target,
    checkpoint: Checkpoint,
    model: Model,
    casts: dict[str, str],
    packed: quantize.Scheme,
) -> dict[str, list[Node]]:
    layer_of = layer_names(list(model.parameters))
    stored_layer = layer_names(sorted({k.split("#")[0] for k in checkpoint.stored}))
    used = {key for p in model.parameters.values() for key in p.inputs}
    stored_layers: dict[str, dict[str, Any]] = {}
    for key, stored in checkpoint.stored.items():
        if key in used:
            entry = [stored.dtype, list(stored.shape)]
            stored_layers.setdefault(stored_layer[key.split("#")[0]], {})[key] = (entry, stored)
    nodes: dict[str, list[Node]] = {"extract": [], "unshard": [], "cast": [], "quantize": []}
    maker: dict[str, Node] = {}
    for layer, entries in stored_layers.items():
        files = sorted({stored.file for _, stored in entries.values()})
        look = [
            str(checkpoint.folder),
            [[file, *checkpoint.stamps[file]] for file in files],
            [stored.offset for _, stored in entries.values()],
        ]
        tensors = {key: entry for key, (entry, _) in entries.items()}
        node = Node("extract", target.name, layer, extract.VERSION, {"tensors": tensors}, look=look)
        nodes["extract"].append(node)
        maker.update(dict.fromkeys(tensors, node))

    layers: dict[str, list[str]] = {}
    for name in model.parameters:
        layers.setdefault(layer_of[name], []).append(name)
    settings = {
        (f"{path}.weight" if path else "weight"): setting
        for path, setting in packed.settings.items()
    }
    computer = {"mlx": architecture.versions()["mlx"], "device": quantize.backend(target.device)}
    for layer, names in layers.items():
        parameters = [model.parameters[name] for name in names]
        needs = tuple({maker[i].name: maker[i] for p in parameters for i in p.inputs}.values())
        reads = frozenset(i for p in parameters for i in p.inputs)
        tensors = {
            p.name: [p.dtype, list(p.shape), list(p.inputs), list(p.steps)] for p in parameters
        }
        told: dict[str, Any] = {"tensors": tensors}
        if any(step[0] == "sanitize" for p in parameters for step in p.steps):
            told["sanitize"] = architecture.identity(checkpoint)
        unsharded = Node("unshard", target.name, layer, unshard.VERSION, told, needs, reads)
        nodes["unshard"].append(unsharded)
        dtypes = {p.name: casts[p.name] for p in parameters if casts[p.name] != p.dtype}
        casted = Node("cast", target.name, layer, cast.VERSION, {"dtypes": dtypes}, (unsharded,))
        nodes["cast"].append(casted)
        chosen = {name: list(settings[name]) for name in names if name in settings}
        told = {"settings": chosen}
        if chosen:
            told |= computer
        nodes["quantize"].append(
            Node("quantize", target.name, layer, quantize.VERSION, told, (casted,))
        )
    return nodes


def _ordered(model: Model, packed: quantize.Scheme) -> list[list[str]]:
    """Return the built model's tensor names, in runs, in the order of its parameters."""
    by_first: dict[str, list[str]] = {}
    covered: set[str] = set()
    for module in model.modules:
        setting = packed.settings.get(module.path)
        held = quantize.names(module, None)
        if held:
            by_first[held[0]] = quantize.names(module, setting)
            covered.update(held)
    return [
        by_first.get(name, [] if name in covered else [name]) for name in model.parameters
    ]  # fmt: skip


def _weights(model: Model, module: Module, packed: quantize.Scheme) -> int:
    if module.path not in packed.settings:
        return module.weights
    prefix = f"{module.path}." if module.path else ""
    held = [model.parameters[prefix + name] for name in ("weight", "bias") if name in module.names]
    return sum(parameter.size for parameter in held)

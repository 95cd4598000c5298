"""plan: a target's stages and layers, known from headers and configuration alone."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cache.digest import digest_record
from cache.records.manifests import Manifest, Tensor
from cache.records.memos import Memos
from tasks.checkpoints import loaders, sources
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import BuildError
from tasks.core.spec import SourceSpec, Target
from tasks.layouts import LAYOUTS, architecture
from tasks.layouts.model import Model, Module, Parameter, layer_names
from tasks.stages import cast, extract, measure, quantize, quantize_scheme, unshard
from tasks.stages.quantize_scheme import Setting
from tasks.tensors import device

LARGE = 1.25  # times the third largest layer


@dataclass(frozen=True)
class Order:
    """What one stage of one layer is told. Targets that have it in common share it.

    Attributes:
        stage: the stage's name.
        layer: the layer's name.
        version: the stage's version.
        params: what the stage is told, JSON; a part of the action's key.
        reads: names of the tensors that it reads of the stage before, or None for all.
        look: what else decides whether there is anything to look at (a file's stamp), JSON.
    """

    stage: str
    layer: str
    version: int
    params: dict[str, Any]
    reads: frozenset[str] | None = None
    look: Any = None

    @cached_property
    def digest(self) -> str:
        """Digest of all of it."""
        return digest_record([self.version, self.params, self.look])


@dataclass(frozen=True, eq=False)
class Node:
    """One stage of one layer of one target.

    Attributes:
        order: what it is told.
        target: the target's name.
        needs: the nodes whose tensors it reads.
    """

    order: Order
    target: str
    needs: tuple[Node, ...] = ()

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.order.stage

    @property
    def params(self) -> dict[str, Any]:
        """What the stage is told."""
        return self.order.params

    @property
    def name(self) -> str:
        """The task's name."""
        return f"{self.order.stage}:{self.target}:{self.order.layer}"

    def needed(self, made: Mapping[Node, Manifest]) -> Needed:
        """Return the tensors that it reads of what its needs made."""
        return self.given({need: manifest.tensors for need, manifest in made.items()})

    def given(self, made: Mapping[Node, Mapping[str, Tensor]]) -> Needed:
        """Return the tensors that it reads of those that its needs make.

        Where these are of two stages, a tensor may have one name in both: the stage's goes in
        front.
        """
        several = len({need.stage for need in self.needs}) > 1
        return {
            f"{need.stage}:{name}" if several else name: (need, tensor)
            for need, tensors in made.items()
            for name, tensor in tensors.items()
            if self.order.reads is None or name in self.order.reads
        }


Needed = dict[str, tuple[Node, Tensor]]  # tensors by name: who made each, and what it is


@dataclass(frozen=True)
class Outline:
    """What all targets of one checkpoint, layout and device have in common.

    Attributes:
        checkpoint: the checkpoint.
        model: the model in the layout.
        extract: orders by layer of the checkpoint.
        unshard: orders by layer of the model.
        needs: for each of ``unshard``, the layers of ``extract`` that it reads.
        layers: for each of ``unshard``, its parameters.
        orders: of cast and quantize, by what they are told, which most targets have in common.
    """

    checkpoint: Checkpoint
    model: Model
    extract: dict[str, Order]
    unshard: dict[str, Order]
    needs: dict[str, list[str]]
    layers: dict[str, list[Parameter]]
    orders: dict[Any, Order] = field(default_factory=dict)

    @cached_property
    def large(self) -> frozenset[str]:
        """At most two layers of many more weights than the others: embeddings and head, or none."""
        weights = {layer: sum(p.size for p in made) for layer, made in self.layers.items()}
        third = sorted(weights.values())[-3:][0]
        return frozenset(layer for layer, count in weights.items() if count > LARGE * third)

    def order(
        self,
        stage: str,
        layer: str,
        version: int,
        key: str,
        tensors: Mapping[str, str | tuple[Any, ...]],
        computer: Mapping[str, str],
    ) -> Order:
        """Return the order of a stage for a layer, one for all targets that are told alike.

        Args:
            stage: the stage.
            layer: the layer.
            version: the stage's version.
            key: what the stage is told of tensors.
            tensors: that, by their names.
            computer: what it is told besides.
        """
        told = (stage, layer, tuple(tensors.items()), tuple(computer.values()))
        if told not in self.orders:
            # As JSON has it: what is told is compared with what is read back.
            of = {n: list(v) if isinstance(v, tuple) else v for n, v in tensors.items()}
            self.orders[told] = Order(stage, layer, version, {key: of, **computer})
        return self.orders[told]


@dataclass(frozen=True)
class Plan:
    """A target, worked out.

    Attributes:
        target: what was asked for.
        outline: what it shares with other targets.
        stages: the nodes of each per-layer stage that leads to the built model, in the order of
            layers.
        names: the built model's tensors, in the order in which they are written.
        config: config.json.
        weights: how many the model has, as mlx-lm counts them.
        notes: what people should know.
    """

    target: Target
    outline: Outline
    stages: dict[str, list[Node]]
    names: list[str]
    config: dict[str, Any]
    weights: int
    notes: tuple[str, ...] = field(default=())

    @property
    def checkpoint(self) -> Checkpoint:
        """What it is made from."""
        return self.outline.checkpoint

    @cached_property
    def errors(self) -> list[Node]:
        """The nodes that tell the quantization error, of the layers that have any."""
        return _errors(self.outline, self.stages["quantize"])

    def nodes(self, stage: str) -> list[Node]:
        """Return the nodes of a per-layer stage."""
        return self.errors if stage == "error" else self.stages[stage]


class Planner:
    """Plans targets; what several have in common is read once."""

    def __init__(self, memos: Memos, recall: Callable[[Target], Checkpoint | None]) -> None:
        """Make a planner.

        Args:
            memos: what is remembered of checkpoints and models.
            recall: returns a checkpoint that is not here itself, or None if it is to be read.
        """
        self.memos = memos
        self._recall = recall
        self._checkpoints: dict[tuple[SourceSpec, str | None], Checkpoint] = {}
        self._outlines: dict[tuple[SourceSpec, str | None, str, str], Outline] = {}

    def plan(self, target: Target) -> Plan:
        """Work a target out.

        Raises:
            BuildError: the checkpoint, the model or a setting makes it impossible. The message
                begins with the target's name.
        """
        try:
            return self._plan(target)
        except BuildError as error:
            raise type(error)(f"{target.where}: {target.name}: {error}") from error

    def _plan(self, target: Target) -> Plan:
        layout = LAYOUTS[target.layout]
        outline = self._outline(target)
        checkpoint, model = outline.checkpoint, outline.model
        layout.check(target, model)
        scheme = quantize_scheme.plan(model, target.quantize)
        config = layout.config(target, model, scheme.config)
        dtype = target.dtype or layout.default_dtype(checkpoint, model)
        stages = _nodes(target, outline, dtype, scheme)
        names = [name for names in _ordered(model, scheme) for name in names]
        weights = sum(_weights(model, module, scheme) for module in model.modules)
        notes = (*model.notes, *scheme.notes)
        return Plan(target, outline, stages, names, config, weights, notes)

    def _outline(self, target: Target) -> Outline:
        source = (target.source, target.loader)
        backend = device.backend(target.device)
        key = (*source, target.layout, backend)
        if key not in self._outlines:
            if source not in self._checkpoints:
                self._checkpoints[source] = self._recall(target) or loaders.read(
                    sources.open_source(target.source), target.loader, self.memos
                )
            checkpoint = self._checkpoints[source]
            layout = LAYOUTS[target.layout]
            model = layout.model(checkpoint, self.memos)
            layout.sources(checkpoint)  # refuses a checkpoint without tokenizer
            self._outlines[key] = _outline(checkpoint, model, backend)
        return self._outlines[key]


def _outline(checkpoint: Checkpoint, model: Model, backend: str) -> Outline:
    used = {key for p in model.parameters.values() for key in p.inputs}
    stored_layers = _by_layer({key: key.split("#")[0] for key in checkpoint.stored if key in used})
    extracts = {}
    layer_of = {}
    for layer, keys in stored_layers.items():
        extracts[layer] = extracting(checkpoint, layer, keys)
        layer_of.update(dict.fromkeys(keys, layer))

    unshards, needs, layers = {}, {}, {}
    for layer, names in _by_layer({name: name for name in model.parameters}).items():
        layers[layer] = [model.parameters[name] for name in names]
        reads = {key: layer_of[key] for p in layers[layer] for key in p.inputs}
        told: dict[str, Any] = {
            "tensors": {
                p.name: [p.dtype, list(p.shape), list(p.inputs), list(p.steps)]
                for p in layers[layer]
            }
        }
        if any(unshard.sanitized(p.steps) for p in layers[layer]):
            told["sanitize"] = {
                "asked": architecture.identity(checkpoint),
                "device": backend,
                "machine": platform.machine(),
            }
        unshards[layer] = Order("unshard", layer, unshard.VERSION, told, frozenset(reads))
        needs[layer] = list(dict.fromkeys(reads.values()))
    return Outline(checkpoint, model, extracts, unshards, needs, layers)


def extracting(checkpoint: Checkpoint, layer: str, keys: list[str]) -> Order:
    """Return the order that extracts stored tensors."""
    stored = [checkpoint.stored[key] for key in keys]
    tensors = {key: [s.dtype, list(s.shape)] for key, s in zip(keys, stored, strict=True)}
    look = checkpoint.fingerprint(keys)
    return Order("extract", layer, extract.VERSION, {"tensors": tensors}, look=look)


def _by_layer(names: dict[str, str]) -> dict[str, list[str]]:
    """Group keys by the layer of the name that each goes by."""
    layer_of = layer_names(list(dict.fromkeys(names.values())))
    layers: dict[str, list[str]] = {}
    for key, name in names.items():
        layers.setdefault(layer_of[name], []).append(key)
    return layers


def _nodes(
    target: Target, outline: Outline, dtype: str | None, scheme: quantize_scheme.Scheme
) -> dict[str, list[Node]]:
    casts = cast.plan(outline.model, dtype)
    settings = {quantize_scheme.weight_name(path): s for path, s in scheme.settings.items()}
    computer = {
        "mlx": architecture.versions()["mlx"],
        "device": device.backend(target.device),
        "machine": platform.machine(),  # compilers need not round alike on x86-64 and arm64
    }
    extracts = {layer: Node(order, target.name) for layer, order in outline.extract.items()}
    unshards, casted, quantized = [], [], []
    for layer, parameters in outline.layers.items():
        needs = tuple(extracts[need] for need in outline.needs[layer])
        unshards.append(Node(outline.unshard[layer], target.name, needs))

        dtypes = {p.name: casts[p.name] for p in parameters if casts[p.name] != p.dtype}
        order = outline.order("cast", layer, cast.VERSION, "dtypes", dtypes, {})
        casted.append(Node(order, target.name, (unshards[-1],)))

        chosen = {p.name: settings[p.name] for p in parameters if p.name in settings}
        by = computer if chosen else {}
        order = outline.order("quantize", layer, quantize.VERSION, "settings", chosen, by)
        quantized.append(Node(order, target.name, (casted[-1],)))
    return {
        "extract": list(extracts.values()),
        "unshard": unshards,
        "cast": casted,
        "quantize": quantized,
    }


def _errors(outline: Outline, quantized: list[Node]) -> list[Node]:
    found = []
    for node in quantized:
        if not node.params["settings"]:
            continue
        told = ("error", id(node.order))  # which is shared, and kept, as well
        if told not in outline.orders:
            outline.orders[told] = _error(node.order)
        found.append(Node(outline.orders[told], node.target, (*node.needs, node)))
    return found


def _error(quantized: Order) -> Order:
    computer = dict(quantized.params)
    compared = computer.pop("settings")
    reads = {
        part for name, s in compared.items() for part in quantize_scheme.parts(name, Setting(*s))
    }
    told = {"compared": compared, **computer}
    return Order("error", quantized.layer, measure.VERSION, told, frozenset(reads))


def _ordered(model: Model, scheme: quantize_scheme.Scheme) -> list[tuple[str, ...]]:
    """Return the built model's tensor names, in runs, in the order of its parameters."""
    by_first: dict[str, tuple[str, ...]] = {}
    covered: set[str] = set()
    for module in model.modules:
        setting = scheme.settings.get(module.path)
        held = quantize_scheme.names(module, None)
        if held:
            by_first[held[0]] = quantize_scheme.names(module, setting)
            covered.update(held)
    return [
        by_first.get(name, () if name in covered else (name,)) for name in model.parameters
    ]  # fmt: skip


def _weights(model: Model, module: Module, scheme: quantize_scheme.Scheme) -> int:
    if module.path not in scheme.settings:
        return module.weights
    prefix = f"{module.path}." if module.path else ""
    held = [model.parameters[prefix + name] for name in ("weight", "bias") if name in module.names]
    return sum(parameter.size for parameter in held)

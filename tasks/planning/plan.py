"""plan: a target's stages and layers, known from headers and configuration alone."""

from __future__ import annotations

import platform
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from msgspec import Struct, field, structs

from cache.records.memos import Memos
from tasks.checkpoints import loaders
from tasks.checkpoints.adapter import Adapter
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.source import ReadableSource
from tasks.core.errors import ArchitectureError, BuildError, ConfigError
from tasks.core.quantization import Quantize
from tasks.core.spec import Quality, SourceSpec, Target
from tasks.layouts import asking, keeping
from tasks.layouts.model import Model, Parameter, layer_names
from tasks.layouts.registry import LAYOUTS
from tasks.planning.choice import Choice
from tasks.planning.node import Known, Node
from tasks.stages import fuse, quantize_scheme, registry
from tasks.stages.quantize_scheme import Scheme, Schemes, Setting
from tasks.stages.stage import (
    COMPUTER,
    ActionSpec,
    Computer,
    Need,
    Origin,
    Planned,
    Stage,
    TargetModel,
)
from tasks.tensors import device
from tasks.unpack import registry as unpack

# A layer is large if it has so many times the weights of the third largest.
LARGE_LAYER_RATIO = 1.25


class SharedPlan(Struct, frozen=True, dict=True):
    """What all targets of one checkpoint, layout and device have in common.

    Attributes:
        checkpoint: the checkpoint.
        model: the model in the layout.
        computer: what computes.
        stored_layers: keys of stored tensors that are used, by layer of the checkpoint.
        layers: parameters by layer of the model.
    """

    checkpoint: Checkpoint
    model: Model
    computer: Computer
    stored_layers: dict[str, list[str]]
    layers: dict[str, list[Parameter]]
    _planned: dict[tuple[Hashable, ...], dict[str, ActionSpec[Any]]] = field(default_factory=dict)
    _specs: dict[Hashable, ActionSpec[Any]] = field(default_factory=dict)
    _names: dict[Hashable, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Model, backend: str) -> SharedPlan:
        """Work it out; ``backend`` is what computes, see ``tensors.device``."""
        used = {key for p in model.parameters.values() for key in p.inputs}
        stored = {key: key.split("#")[0] for key in checkpoint.stored if key in used}
        layers = _by_layer({name: name for name in model.parameters})
        return cls(
            checkpoint,
            model,
            Computer(asking.versions()["mlx"], backend, platform.machine()),
            _by_layer(stored),
            {layer: [model.parameters[n] for n in names] for layer, names in layers.items()},
        )

    @cached_property
    def large(self) -> frozenset[str]:
        """At most two layers of many more weights than the others: embeddings and head, or none."""
        weights = {
            layer: sum(p.size for p in parameters) for layer, parameters in self.layers.items()
        }
        third = sorted(weights.values())[-3:][0]
        return frozenset(n for n, count in weights.items() if count > LARGE_LAYER_RATIO * third)

    @cached_property
    def schemes(self) -> Schemes:
        """Decides how targets are quantized."""
        return Schemes(self.model)

    def names(self, settings: Mapping[str, Setting]) -> list[str]:
        """Return a built model's tensors in order: one list for all targets with the same.

        Args:
            settings: how modules are quantized, by path.
        """
        key = (tuple(settings), tuple(setting.mode == "affine" for setting in settings.values()))
        if key not in self._names:
            self._names[key] = _ordered(self.model, settings)
        return self._names[key]

    def weights(self, quantized: Iterable[str]) -> int:
        """Return how many weights the model has, as mlx-lm counts them.

        Args:
            quantized: paths of the modules that are quantized.
        """
        count, fewer = self._weights
        return count - sum(fewer[path] for path in fewer.keys() & {*quantized})

    @cached_property
    def _weights(self) -> tuple[int, dict[str, int]]:
        """The weights of the modules, and how many fewer one counts for once it is quantized."""
        fewer = {}
        for module in (each for each in self.model.modules if each.quantized_names is not None):
            prefix = f"{module.path}." if module.path else ""
            counted = [prefix + name for name in ("weight", "bias") if name in module.names]
            size = sum(self.model.parameters[name].size for name in counted)
            fewer[module.path] = module.weights - size
        count = sum(module.weights for module in self.model.modules)
        return count, {path: number for path, number in fewer.items() if number}

    def specs(self, stage: Stage[Any], target: TargetModel) -> dict[str, ActionSpec[Any]]:
        """Return what a stage is asked to do, by layer: one object for all targets alike."""
        fused, dtypes = tuple(target.fused.items()), tuple(target.dtypes.items())
        key = (stage.name, target.roles, fused, dtypes, stage.plan_key(target))
        if key not in self._planned:
            planned = stage.plan(target)
            self._planned[key] = {n: self._spec(stage, n, each) for n, each in planned.items()}
        return self._planned[key]

    def _spec(self, stage: Stage[Any], layer: str, planned: Planned[Any]) -> ActionSpec[Any]:
        key = (type(stage), layer, planned.params.encoded, planned.needs, planned.reads)
        return self._specs.setdefault(key, ActionSpec(stage, layer, planned))


class Growth(NamedTuple):
    """How much larger results are than what they are made of.

    Attributes:
        made: their bytes.
        made_of: those of the checkpoint's tensors that they are made of.
    """

    made: int
    made_of: int


class Plan(Struct, frozen=True, dict=True):
    """A target, worked out.

    Attributes:
        target: what was asked for.
        shared: what it has in common with other targets.
        model: the target as its stages plan it.
        specs: what each stage that leads to the built model is asked to do, by layer, in order.
        names: the built model's tensors, in the order in which they are written.
        config: config.json.
        weights: how many the model has, as mlx-lm counts them.
        notes: what people should know.
        packing: of these, what becomes of weights that are packed in the checkpoint.
        choice: how its modules' settings are chosen, where a budget does.
    """

    target: Target
    shared: SharedPlan
    model: TargetModel
    specs: dict[str, dict[str, ActionSpec[Any]]]
    names: list[str]
    config: dict[str, Any]
    weights: int
    notes: tuple[str, ...] = field(default=())
    packing: tuple[str, ...] = field(default=())
    choice: Choice | None = None

    @property
    def undecided(self) -> bool:
        """Whether its modules' settings are yet to be chosen, of sensitivities not on record.

        Then it is planned as if it were not quantized.
        """
        return self.choice is not None and self.choice.settings is None

    @property
    def checkpoint(self) -> Checkpoint:
        """What it is made from."""
        return self.shared.checkpoint

    @cached_property
    def stages(self) -> dict[str, list[Node]]:
        """The nodes of each stage that leads to the built model, in the order of layers."""
        return _nodes(self.target.name, self.specs, {})

    @property
    def tasks(self) -> int:
        """How many tasks build it."""
        return sum(map(len, self.specs.values())) + 1

    @cached_property
    def measure_specs(self) -> dict[str, dict[str, ActionSpec[Any]]]:
        """What each stage is asked that tells something of the built model, by layer."""
        return _specs(self.shared, self.model, registry.MEASURES, self.specs)

    @cached_property
    def growth(self) -> dict[str, Growth]:
        """What stages need not keep that make more of the checkpoint than it has, by stage."""
        growth = {}
        for stage in registry.KEPT:
            known: Known = {}
            outputs = [(node, name) for node in self.stages[stage] for name in node.outputs(known)]
            made = [(node, name) for node, name in outputs if _is_made(node, name, known)]
            views = {name: node.outputs(known)[name].spec.nbytes for node, name in made}
            made_of = {
                key: self.checkpoint.stored[key].nbytes
                for name in views.keys() & self.shared.model.parameters.keys()
                for key in self.shared.model.parameters[name].inputs
            }
            found = Growth(sum(views.values()), sum(made_of.values()))
            if found.made > found.made_of:
                growth[stage] = found
        return growth

    @property
    def leaves(self) -> list[Node]:
        """The nodes that read the checkpoint."""
        return [node for nodes in self.stages.values() for node in nodes if node.is_leaf]

    @property
    def last(self) -> list[Node]:
        """The nodes that make what is packed."""
        return self.stages[registry.PIPELINE[-1].name]

    @cached_property
    def computer(self) -> dict[str, str] | None:
        """What computes it: MLX's version, device, machine; None if nothing does."""
        computer = {
            key: str(record[key])
            for stage in self.stages.values() for node in stage
            for record in [node.params.record] for key in COMPUTER if key in record
        }  # fmt: skip
        return computer or None

    @cached_property
    def packed(self) -> frozenset[Node]:
        """The same, as a set."""
        return frozenset(self.last)

    @cached_property
    def measures(self) -> dict[str, list[Node]]:
        """The nodes of each of these stages."""
        return _nodes(self.target.name, self.measure_specs, self.stages)

    @cached_property
    def running(self) -> dict[str, list[Node]]:
        """The nodes of each stage that runs a model, or reads what one did: it may take seconds.

        None of a model that cannot be run.

        Raises:
            BuildError: the text that it is run on cannot be read.
        """
        return self._running[0]

    @property
    def why_not_run(self) -> str:
        """Why the model cannot be run; empty if it can."""
        return self._running[1]

    @cached_property
    def _running(self) -> tuple[dict[str, list[Node]], str]:
        if not self.model.model.runs:
            layout = self.target.layout
            return {}, f"models of layout {layout!r} are built here, and not run"
        stages = [stage for stage in registry.RUNNING if stage.name not in self.specs]
        try:
            specs = _specs(self.shared, self.model, stages, self.specs)
        except ArchitectureError as error:
            return {}, str(error)
        return _nodes(self.target.name, specs, self.stages), ""

    @property
    def measuring(self) -> list[Node]:
        """The nodes of all of these stages."""
        return [node for nodes in self.measures.values() for node in nodes]

    def nodes(self, stage: str) -> list[Node]:
        """Return the nodes of a stage."""
        if stage in self.stages:
            return self.stages[stage]
        return self.measures[stage] if stage in self.measures else self.running.get(stage, [])


class Planner:
    """Plans targets; what several have in common is read once."""

    def __init__(
        self,
        memos: Memos,
        open_source: Callable[[Target], ReadableSource],
        recall: Callable[[Target, ReadableSource], Checkpoint | None],
        quality: Quality,
        choose: Callable[[Plan, Quantize], Choice] | None = None,
        read_adapter: Callable[[Target], Adapter] | None = None,
    ) -> None:
        """Make a planner.

        Args:
            memos: what is remembered of checkpoints and models.
            open_source: opens a target's source.
            recall: returns a checkpoint that is not here itself, or None if its source is to be
                read.
            quality: on what text models are run.
            choose: chooses the settings of modules within a budget, given the target as if it were
                not quantized; needed where one has any.
            read_adapter: reads the adapter of a target; needed where one has any.
        """
        self.memos = memos
        self._open_source = open_source
        self.quality = quality
        self._recall = recall
        self._chosen = choose
        self._read_adapter = read_adapter
        self._adapters: dict[SourceSpec, Adapter] = {}
        self._checkpoints: dict[tuple[SourceSpec, str | None], Checkpoint] = {}
        self._shared: dict[tuple[Hashable, ...], SharedPlan | BuildError] = {}

    def plan(self, target: Target) -> Plan:
        """Work a target out.

        Raises:
            BuildError: the checkpoint, the model or a setting makes it impossible.
        """
        layout = LAYOUTS[target.layout]
        shared = self.share(target)
        layout.check(target, shared.model)
        if target.files and not target.files.is_dir():
            raise ConfigError(f"files is {target.files}, which is no folder. Make it, or name one.")
        quantize = target.quantize or None
        if quantize and quantize.chooses:
            return self._choose(target, quantize, shared)
        return self._assemble(target, shared, shared.schemes.plan(quantize))

    def _choose(self, target: Target, quantize: Quantize, shared: SharedPlan) -> Plan:
        """Work a target out whose modules' settings are chosen within a budget.

        Raises:
            BuildError: no choice is within it, or the model cannot be run.
        """
        base = self._assemble(target, shared, Scheme({}, None))
        assert self._chosen is not None
        choice = self._chosen(base, quantize)
        if choice.settings is None:
            return structs.replace(base, choice=choice)
        plan = self._assemble(target, shared, shared.schemes.plan(quantize, choice.settings))
        return structs.replace(plan, choice=choice)

    def _assemble(self, target: Target, shared: SharedPlan, scheme: Scheme) -> Plan:
        layout, checkpoint, model = LAYOUTS[target.layout], shared.checkpoint, shared.model
        config = layout.config(target, model, scheme.config)
        dtype = target.dtype or layout.default_dtype(checkpoint, model)
        settings = {quantize_scheme.weight_name(path): s for path, s in scheme.settings.items()}
        exact: frozenset[str] = frozenset()
        if target.quantize and target.quantize.exact:
            exact = frozenset(shared.schemes.choosable(target.quantize))
        asked = TargetModel(
            checkpoint, model, shared.stored_layers, shared.layers, dtype, settings,
            shared.computer, target.layout, config, self.quality,
            quantize_scheme.candidates(target.quantize or None), self.memos,
            registry.roles(fuses=target.adapter is not None), exact, self._adapter(target),
            dtypes=shared.schemes.dtypes(target.quantize or None),
        )  # fmt: skip
        asked = structs.replace(asked, fused=fuse.dtypes(asked))
        method = target.quantize.method if target.quantize else None
        specs = _specs(shared, asked, registry.pipeline(method), {})
        names, weights = shared.names(scheme.settings), shared.weights(scheme.settings)
        wide = shared.schemes.float32_scales(scheme.settings, dtype, asked.dtypes)
        packing = keeping.notes(target, model, dtype)
        notes = (*model.notes, *packing, *scheme.notes, *wide)
        return Plan(target, shared, asked, specs, names, config, weights, notes, packing)

    def _adapter(self, target: Target) -> Adapter | None:
        """Return a target's adapter, read once for all that have it.

        Raises:
            CheckpointError: it is none, or damaged.
        """
        if target.adapter is None:
            return None
        if target.adapter not in self._adapters:
            assert self._read_adapter is not None
            self._adapters[target.adapter] = self._read_adapter(target)
        return self._adapters[target.adapter]

    def share(self, target: Target) -> SharedPlan:
        """Return what a target has in common with others, worked out once.

        Raises:
            BuildError: the checkpoint or the model makes it impossible.
        """
        backend = device.backend(target.device)
        floats = (target.dtype, bool(target.quantize)) if target.dequantize else None
        key = (target.source, target.loader, target.layout, backend, floats)
        shared = self._once(key, lambda: self._read(target, backend))
        dtype = target.dtype or LAYOUTS[target.layout].default_dtype(
            shared.checkpoint, shared.model
        )
        if not (found := keeping.chosen(target, shared.model, dtype)):
            return shared
        return self._once(
            (*key, dtype, target.keep),
            lambda: SharedPlan.of(
                shared.checkpoint, keeping.kept(shared.model, found, dtype), backend
            ),
        )

    def _once(self, key: tuple[Hashable, ...], work: Callable[[], SharedPlan]) -> SharedPlan:
        """Return what all targets of a key have in common.

        Raises:
            BuildError: of all of them alike: to find out may take seconds.
        """
        if key not in self._shared:
            try:
                self._shared[key] = work()
            except BuildError as error:
                self._shared[key] = error
        shared = self._shared[key]
        if isinstance(shared, BuildError):
            raise shared
        return shared

    def _read(self, target: Target, backend: str) -> SharedPlan:
        source = (target.source, target.loader)
        if source not in self._checkpoints:
            opened = self._open_source(target)
            self._checkpoints[source] = self._recall(target, opened) or loaders.read(
                opened, target.loader, self.memos, named=target.source_name
            )
        checkpoint = self._checkpoints[source]
        layout = LAYOUTS[target.layout]
        if target.dequantize:
            bare = Model({}, (), checkpoint.config, {})
            dtype = target.dtype or layout.default_dtype(checkpoint, bare)
            checkpoint = unpack.dequantized(checkpoint, dtype)
        model = layout.model(checkpoint, self.memos)
        if target.dequantize and not target.quantize:
            model = _as_dequantized(model)
        layout.sources(checkpoint)  # refuses a checkpoint without tokenizer
        return SharedPlan.of(checkpoint, model, backend)


def _is_made(node: Node, name: str, known: Known) -> bool:
    """Tell whether a tensor is made as it is read, by this node or by one before."""
    output = node.outputs(known)[name]
    if output.origin is not Origin.PASSED_ON:
        return output.origin is Origin.VIEW
    (key,) = output.inputs
    makers = [n for n in node.needs if n.stage.name == key.stage and key.name in n.outputs(known)]
    return _is_made(makers[0], key.name, known)


def _as_dequantized(model: Model) -> Model:
    """Return a model whose weights stay in the dtype that they are dequantized to.

    As mlx_lm.convert has it, which casts before, what it makes of modes of floats is not cast.
    """
    parameters = {
        name: parameter._replace(castable=parameter.castable and not _is_of_floats(parameter))
        for name, parameter in model.parameters.items()
    }
    return structs.replace(model, parameters=parameters)


def _is_of_floats(parameter: Parameter) -> bool:
    return any(
        packing[-1].get("mode", "affine") != "affine"
        for step in parameter.steps
        if step[0] == "unpack"
        for packing in step[3]
    )


def _specs(
    shared: SharedPlan,
    model: TargetModel,
    stages: Iterable[Stage[Any]],
    before: Mapping[str, dict[str, ActionSpec[Any]]],
) -> dict[str, dict[str, ActionSpec[Any]]]:
    """Return what ``stages`` are asked to do, given the same of the stages ``before``."""
    planned = {**before}
    for stage in stages:
        previous = next((name for name in reversed(planned) if planned[name]), "")
        asked = structs.replace(model, planned={**planned}, previous=previous)
        planned[stage.name] = shared.specs(stage, asked)
    return {name: specs for name, specs in planned.items() if name not in before}


def _nodes(
    target: str,
    by_stage: Mapping[str, Mapping[str, ActionSpec[Any]]],
    before: Mapping[str, list[Node]],
) -> dict[str, list[Node]]:
    """Return the nodes of some stages, given those of the stages ``before``."""
    by_need = {Need(name, node.layer): node for name, nodes in before.items() for node in nodes}
    for stage, specs in by_stage.items():
        for layer, spec in specs.items():
            needs = tuple(by_need[need] for need in spec.planned.needs)
            by_need[Need(stage, layer)] = Node(spec, target, needs)
    return {
        stage: [by_need[Need(stage, layer)] for layer in specs] for stage, specs in by_stage.items()
    }


def _by_layer(names: dict[str, str]) -> dict[str, list[str]]:
    """Group keys by the layer of the name that each goes by."""
    layer_of = layer_names(list(dict.fromkeys(names.values())))
    layers: dict[str, list[str]] = {}
    for key, name in names.items():
        layers.setdefault(layer_of[name], []).append(key)
    return layers


def _ordered(model: Model, settings: Mapping[str, Setting]) -> list[str]:
    """Return the built model's tensors, in the order of its parameters."""
    by_first: dict[str, tuple[str, ...]] = {}
    covered: set[str] = set()
    for module in model.modules:
        names = quantize_scheme.names(module, None)
        if names:
            by_first[names[0]] = quantize_scheme.names(module, settings.get(module.path))
            covered.update(names)
    runs = (by_first.get(n, () if n in covered else (n,)) for n in model.parameters)
    return [name for run in runs for name in run]

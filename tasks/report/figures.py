"""figures: reads sizes, bits per weight and quantization errors out of a target's manifests."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import hypot, inf, isfinite, log10, nan
from pathlib import Path

from cache.blobs import Blobs
from cache.digest import digest_record
from cache.errors import CacheError
from cache.files.stamp import Stamp
from cache.records.manifests import Manifest, Tensor
from tasks.core.errors import BuildError
from tasks.core.workspace import Workspace
from tasks.execution.builder import Builder
from tasks.planning.plan import Plan
from tasks.quality.divergence import ModelQuality
from tasks.quality.segments import LOGITS
from tasks.stages import forward, measure, quantize_scheme, registry
from tasks.stages.forward import Evaluate
from tasks.stages.forward_params import STATE
from tasks.stages.quantize_scheme import Setting

# What a module is for, told from its path: the first that matches. Names of mlx-lm's models, and
# Meta's.
KINDS = {
    "norm": r"norm[^.]*$|(^|\.)ln_[^.]*$|(^|\.)rms[^.]*$",
    "router": r"router|(^|\.)gate$",
    "experts": r"expert|switch_(mlp|glu)",
    "recurrent": r"mamba|mixer|ssm|conv1d|linear_attn|\.rnn|recurrent|time_mix",
    "attention": r"attn|attention|(^|\.)([qkvo]_proj|w[qkvo])$",
    "mlp": r"mlp|feed_forward|ffn|(^|\.)(fc\d|w\d|gate_proj|up_proj|down_proj)$",
    "embedding": r"embed|(^|\.)(wte|wpe)$",
    "head": r"(^|\.)(lm_head|score|output|classifier)$",
    "other": r"",
}


@dataclass(frozen=True)
class Error:
    """How far a quantized weight is from its cast original.

    Attributes:
        setting: how it was quantized.
        norm: Frobenius norm of the original.
        error_norm: of the difference.
    """

    setting: Setting
    norm: float
    error_norm: float

    @property
    def relative(self) -> float:
        """The difference's norm as a part of the original's."""
        return relative(self.norm, self.error_norm)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, dB."""
        return sqnr(self.relative)


@dataclass(frozen=True)
class Piece:
    """A parameter of the model, with all that it was quantized to.

    Attributes:
        name: the parameter's.
        layer: the layer's.
        weights: how many it holds.
        nbytes: in the built model.
        dtype: in the built model; of a quantized one, of its packed weight.
        error: how far it is from its original; None if it is not quantized.
    """

    name: str
    layer: str
    weights: int
    nbytes: int
    dtype: str
    error: Error | None

    @cached_property
    def path(self) -> str:
        """The module's path."""
        return self.name.rpartition(".")[0] or self.name

    @cached_property
    def module(self) -> str:
        """The module's path within its layer."""
        _, layer, rest = f".{self.path}".partition(f".{self.layer}.")
        return rest if layer else self.path

    @cached_property
    def kind(self) -> str:
        """What the module is for, one of ``KINDS``."""
        return next(kind for kind, pattern in KINDS.items() if re.search(pattern, self.path))

    @cached_property
    def block(self) -> tuple[str, int] | None:
        """The stack of layers that it belongs to, and its number there."""
        match = re.fullmatch(r"(.*)\.(\d+)", self.layer)
        return (match[1], int(match[2])) if match else None


@dataclass(frozen=True)
class Figures:
    """A target as it was last built, in a few numbers.

    Attributes:
        name: the target's.
        source: its source's name.
        layout: its layout.
        nbytes: size of all files.
        weight_bytes: size of the weight files.
        weights: how many the model has.
        settings: how its weights are quantized, or None if that was not measured.
        relative: relative error of all quantized weights together; None if it was not measured.
        quality: how good it is, or None if it was not evaluated.
    """

    name: str
    source: str
    layout: str
    nbytes: int
    weight_bytes: int
    weights: int
    settings: tuple[Setting, ...] | None
    relative: float | None
    quality: ModelQuality | None = None

    @property
    def bits(self) -> float:
        """Bits per weight, scales, biases and headers included."""
        return 8 * self.weight_bytes / self.weights if self.weights else nan

    @property
    def scheme(self) -> str | None:
        """How it is quantized, in words; None if that is not known."""
        settings = self.settings
        if settings is None:
            return None
        if not settings:
            return "not quantized"
        if len(settings) > 1 and len({(s.group_size, s.mode) for s in settings}) == 1:
            bits = ", ".join(str(s.bits) for s in settings)
            return f"{settings[0].mode}, {bits} bits, groups of {settings[0].group_size}"
        return "; ".join(scheme(s) for s in settings)


def scheme(setting: Setting) -> str:
    """Return a setting in words."""
    return f"{setting.mode}, {setting.bits} bits, groups of {setting.group_size}"


def relative(norm: float, error_norm: float) -> float:
    """Return an error's norm as a part of the original's."""
    if not (isfinite(norm) and isfinite(error_norm)):
        return nan
    return error_norm / norm if norm else (inf if error_norm else 0.0)


def sqnr(part: float) -> float:
    """Return the signal to quantization noise ratio of a relative error, dB."""
    return -20 * log10(part) if 0 < part < inf else (inf if part == 0 else -part)


def together(errors: Iterable[Error]) -> float:
    """Return the relative error of several weights together."""
    errors = list(errors)
    return relative(hypot(*(e.norm for e in errors)), hypot(*(e.error_norm for e in errors)))


class Reader:
    """Reads targets' figures, once. Safe in threads.

    To be asked once all is made that these are to be of: a thousand targets that are compared with
    each other would have their manifests looked at a million times.
    """

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self._seen: dict[str, str] = {}
        self._known: dict[str, Figures | None] = {}

    def seen(self, plan: Plan) -> str:
        """Return a digest of which manifests a target's figures are of."""
        name = plan.target.name
        if name not in self._seen:
            workspace = self.builder.workspace
            paths = [str(workspace.packed(name)), _evaluation(workspace, name)]
            paths += [node.manifest_path(workspace) for node in plan.measuring]
            self._seen[name] = digest_record([_stamp(path) for path in paths])
        return self._seen[name]

    def evaluation(self, plan: Plan) -> Stamp | None:
        """Return the stamp of a target's evaluation."""
        return _stamp(_evaluation(self.builder.workspace, plan.target.name))

    def read(self, plan: Plan) -> Figures | None:
        """Return the figures of a target as it was last built, or None if it was not.

        Nothing is built for it. What was measured is None where that is not of what was last
        packed.
        """
        name = plan.target.name
        if name not in self._known:
            self._known[name] = _read(self.builder, plan)
        return self._known[name]

    def errors(self, plan: Plan, packed: Manifest) -> dict[str, Error] | None:
        """Return a target's errors by parameter; None if they are not of what is ``packed``."""
        return _errors(self.builder, plan, packed)


def _stamp(path: str) -> Stamp | None:
    try:
        return Stamp.of(path)
    except FileNotFoundError:
        return None


def _read(builder: Builder, plan: Plan) -> Figures | None:
    packed = Manifest.at(builder.workspace.packed(plan.target.name))
    if packed is None:
        return None
    sizes = {name: tensor.nbytes for name, tensor in packed.tensors.items()}
    errors = _errors(builder, plan, packed)
    settings = None if errors is None else {error.setting for error in errors.values()}
    return Figures(
        plan.target.name,
        plan.target.source_name,
        plan.target.layout,
        sum(sizes.values()),
        sum(sizes[name] for name in packed.action.params["weights"]),
        plan.weights,
        None if settings is None else tuple(sorted(settings, key=lambda s: (s.bits, s))),
        None if errors is None else together(errors.values()),
        evaluated(builder.store.blobs, builder.workspace, plan.target.name, packed),
    )


def evaluated(
    blobs: Blobs, workspace: Workspace, target: str, packed: Manifest
) -> ModelQuality | None:
    """Return how good a target is, or None if what is packed was not evaluated.

    Nothing is planned for it: each manifest tells the weights that it read, and which state.
    """
    last = Manifest.at(_evaluation(workspace, target))
    if last is None or not _is_of(packed, last, _states(workspace, target)):
        return None
    try:
        read = {
            name: b"".join(map(bytes, blobs.chunks(blobs.locate(tensor.digest, tensor.nbytes))))
            for name, tensor in last.tensors.items()
        }
    except (CacheError, OSError):
        return None
    return forward.figures(read)


def _states(workspace: Workspace, target: str) -> dict[tuple[str, str], Manifest]:
    """Return what left each state of a target's models, by stage and digest."""
    left_by = {}
    for stage in registry.RUNNING:
        for path in Path(workspace.manifest(target, stage.name, LOGITS)).parent.glob("*.json"):
            if (manifest := Manifest.at(path)) and STATE in manifest.tensors:
                left_by[stage.name, manifest.tensors[STATE].digest] = manifest
    return left_by


def _is_of(packed: Manifest, last: Manifest, states: Mapping[tuple[str, str], Manifest]) -> bool:
    """Tell whether a model's last segment, and all before, read the weights that were packed."""
    running = {stage.name for stage in registry.RUNNING}  # what they make are no weights
    ahead: list[Manifest | None] = [last]
    while ahead:
        if (manifest := ahead.pop()) is None:
            return False
        for key, record in manifest.action.inputs.items():
            stage, _, name = key.partition(":")
            if name == STATE:
                ahead.append(states.get((stage, record[-1])))
            elif stage not in running and packed.action.inputs.get(name) != record:
                return False  # packed since, or not yet
    return True


def _evaluation(workspace: Workspace, target: str) -> str:
    return workspace.manifest(target, Evaluate.name, LOGITS)


def pieces(plan: Plan, packed: Manifest, errors: dict[str, Error]) -> list[Piece]:
    """Return the parameters of a target, in the order of layers.

    Args:
        plan: the target.
        packed: what it was packed to.
        errors: of what is quantized.
    """
    tensors = {
        name: Tensor(dtype, tuple(shape), digest)
        for name, (dtype, shape, digest) in packed.action.inputs.items()
    }
    pieces = []
    for layer, parameters in plan.shared.layers.items():
        for parameter in parameters:
            name = parameter.name
            error = errors.get(name)
            names = quantize_scheme.parts(name, error.setting) if error else [name]
            nbytes = sum(tensors[part].nbytes for part in names)
            dtype = tensors[name].dtype
            pieces.append(Piece(name, layer, parameter.size, nbytes, dtype, error))
    return pieces


def _errors(builder: Builder, plan: Plan, packed: Manifest) -> dict[str, Error] | None:
    errors: dict[str, Error] = {}
    for node in plan.nodes(measure.Measure.name):
        manifest = Manifest.at(Path(node.manifest_path(builder.workspace)))
        if manifest is None or manifest.action.params != node.params.record:
            return None
        for name, record in manifest.action.inputs.items():
            part = name.removeprefix(f"{plan.model.roles.packed}:")
            if part != name and packed.action.inputs.get(part) != record:
                return None  # packed since, or not yet
        try:
            norms = measure.figures(manifest, builder.contents(plan, node, manifest))
        except (BuildError, CacheError, OSError):
            return None
        for name, setting in node.params.compared.items():
            errors[name] = Error(setting, *norms[name])
    return errors

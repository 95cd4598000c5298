"""forward_params: what a segment of a model is run with, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping

from cache.records.manifests import TensorSpec
from tasks.quality.calls import Call
from tasks.quality.segments import Skeleton
from tasks.stages import quantize
from tasks.stages.quantize_scheme import Setting
from tasks.stages.stage import Params, TargetModel

STATE, GRADIENT = "state", "gradient"


class ForwardParams(Params, frozen=True):
    """What is run.

    Attributes:
        segment: its name.
        whole: whether the model runs as one segment.
        config: digest of config.json, but for what it says of quantizing.
        settings: how each weight that it reads is quantized, by name.
        dtype: of what it leads to, for one sequence.
        shape: of the same.
        nbytes: of the tensors that it reads.
        top_logits: how many of the teacher's are kept; 0 where none are.
        versions: of MLX and of the library.
        device: what computes: ``cpu``, ``metal``, ``cuda``.
        machine: the processor.
        calls: of modules, those that are looked at.
    """

    segment: str
    whole: bool
    config: str
    settings: dict[str, Setting]
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    top_logits: int
    versions: dict[str, str]
    device: str
    machine: str
    calls: tuple[Call, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """Dtype and shape of what it leads to, for one sequence."""
        return TensorSpec(self.dtype, self.shape)


def state_of(segment: str) -> str:
    """Return a name for a segment's state, where those of several segments are read."""
    return f"{segment}.{STATE}"


def is_handed_on(name: str) -> bool:
    """Tell by its name whether a segment's output is there for the next one to begin with."""
    return name.rpartition(".")[2] in (STATE, GRADIENT)


def skeleton_of(target: TargetModel, settings: Mapping[str, Setting]) -> Skeleton:
    """Return the model as it is quantized by the target's settings, or by none."""
    tensors: dict[str, TensorSpec] = {}
    for parameter in (each for parameters in target.layers.values() for each in parameters):
        dtype = target.fused.get(parameter.name) or target.dtype_after_cast(parameter)
        spec = TensorSpec(dtype, parameter.shape)
        if setting := settings.get(parameter.name):
            tensors |= quantize.part_specs(parameter.name, spec, setting)
        else:
            tensors[parameter.name] = spec
    config = target.config if settings else target.model.config
    return Skeleton(target.model.library, config, tensors)

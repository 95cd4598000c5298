"""registry: the stages, in their order. A new one is a module and a line here."""

from __future__ import annotations

from typing import Any

from tasks.core.task_names import GROUPS, PACK
from tasks.stages.activations import Activations
from tasks.stages.awq import Awq
from tasks.stages.awq_quantize import METHOD as AWQ
from tasks.stages.awq_quantize import AwqQuantize
from tasks.stages.cast import Cast
from tasks.stages.divergence import Baseline, Divergence
from tasks.stages.extract import Extract
from tasks.stages.forward import Evaluate, Forward, Teacher
from tasks.stages.fuse import Fuse
from tasks.stages.gptq import METHOD as GPTQ
from tasks.stages.gptq import Gptq
from tasks.stages.gradients import Gradients
from tasks.stages.hessians import Hessians
from tasks.stages.importances import Importances
from tasks.stages.measure import Measure
from tasks.stages.quantize import Quantize
from tasks.stages.sensitivity import Sensitivity
from tasks.stages.stage import Keep, LeafStage, Roles, Stage
from tasks.stages.tokens import Tokens
from tasks.stages.unshard import Unshard

# From the checkpoint to what is packed: each reads the one before.
PIPELINE: tuple[Stage[Any], ...] = (Extract(), Unshard(), Cast(), Fuse(), Quantize())
# Of these, whose results are kept where models.toml does not say.
KEPT = frozenset({"cast"})
# In place of the stage that quantizes, by the method's name: what it takes, and the stage last.
METHODS: dict[str, tuple[Stage[Any], ...]] = {
    GPTQ: (Tokens(), Hessians(), Gptq()),
    AWQ: (Tokens(), Hessians(), Awq(), AwqQuantize()),
}
# What is told of a built model, and is no part of it.
MEASURES: tuple[Stage[Any], ...] = (Measure(),)
EVALUATE, ACTIVATIONS, SENSITIVITY = Evaluate(), Activations(), Sensitivity()
# What people ask for that runs a model, and all that it takes, which is planned only then.
ASKED_FOR: tuple[Stage[Any], ...] = (EVALUATE, ACTIVATIONS, SENSITIVITY)
RUNNING: tuple[Stage[Any], ...] = (
    Tokens(), Teacher(), Forward(), EVALUATE, ACTIVATIONS, Gradients(), Importances(),
    Baseline(), Divergence(), SENSITIVITY,
)  # fmt: skip


def stages() -> tuple[Stage[Any], ...]:
    """Return all stages."""
    stages = (*PIPELINE, *MEASURES, *RUNNING, *(s for each in METHODS.values() for s in each))
    return tuple(
        {stage.name: stage for stage in reversed(stages)}[name]
        for name in dict.fromkeys(stage.name for stage in stages)
    )


def pipeline(method: str | None) -> tuple[Stage[Any], ...]:
    """Return the stages from the checkpoint to what is packed, as a method has them."""
    if method is None:
        return PIPELINE
    quantized = roles().quantized
    return tuple(
        each
        for stage in PIPELINE
        for each in (METHODS[method] if stage.name == quantized else (stage,))
    )


def names() -> tuple[str, ...]:
    """Return the names of all stages, as records have them, in order."""
    return tuple(stage.name for stage in stages())


def groups() -> tuple[str, ...]:
    """Return the groups of all tasks of targets: of the stages, and the others."""
    return (*(stage.group for stage in stages()), *GROUPS)


def building() -> tuple[str, ...]:
    """Return the groups of the tasks that lead to a built model, packing last."""
    return (*(stage.group for stage in PIPELINE), PACK)


def leaves() -> frozenset[str]:
    """Return the groups of the tasks that read the checkpoint."""
    return frozenset(stage.group for stage in PIPELINE if isinstance(stage, LeafStage))


def roles(*, fuses: bool = False) -> Roles:
    """Return which stages do what for a built model, that has an adapter or has none."""
    stages = [stage for stage in PIPELINE if fuses or not isinstance(stage, Fuse)]
    at = next(i for i, stage in enumerate(stages) if isinstance(stage, Quantize))
    return Roles(stages[at - 1].name, stages[at].name, stages[-1].name)


def configurable() -> tuple[str, ...]:
    """Return the names of the stages whose results the cache keeps if it is told to.

    Those of leaves are elsewhere's bytes: references to files of this machine are always kept.
    """
    return tuple(
        stage.name
        for stage in PIPELINE
        if stage.keep is Keep.CONFIGURED or isinstance(stage, LeafStage)
    )

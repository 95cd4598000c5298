"""recorded: what is on record of a target's sensitivities, before it is planned to the end."""

from __future__ import annotations

from tasks.core.errors import ConfigError
from tasks.execution.builder import Builder
from tasks.planning.plan import Plan
from tasks.stages import sensitivity
from tasks.stages.quantize_scheme import Setting
from tasks.stages.sensitivity import Sensitivity


def sensitivities(builder: Builder, plan: Plan) -> dict[str, dict[Setting, float]] | None:
    """Return the sensitivities of a target's weights, by name; None if some are not on record.

    Raises:
        ConfigError: no library runs the model.
    """
    nodes = plan.nodes(Sensitivity.name)
    if not nodes:
        raise ConfigError(
            f"target_bpw and fit need to run the model, and layout {plan.target.layout!r} is of no "
            'library that can be asked to. Use bits, or layout = "mlx-lm".'
        )
    found: dict[str, dict[Setting, float]] = {}
    for node, manifest in zip(nodes, builder.on_record(plan, nodes), strict=True):
        if manifest is None:
            return None
        figures = sensitivity.figures(manifest, builder.contents(plan, node, manifest))
        for name, number in figures.items():
            found.setdefault(name, {})[node.params.setting] = number
    return found

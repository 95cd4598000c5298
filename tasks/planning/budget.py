"""budget: each module's setting, chosen so that least is lost within a size."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from cache.records.manifests import TensorSpec
from tasks.core.errors import ConfigError
from tasks.core.spec import Quantize
from tasks.core.text import size
from tasks.layouts.model import Parameter
from tasks.planning import knapsack
from tasks.planning.knapsack import Option
from tasks.planning.node import total
from tasks.planning.plan import Plan
from tasks.quality import cache_size
from tasks.stages import quantize
from tasks.stages.cast import dtype_after
from tasks.stages.quantize_scheme import Setting, weight_name
from tasks.stages.running import skeleton_of

CONTEXT = 4096  # tokens, where nobody says how many


def choose(
    plan: Plan, asked: Quantize, sensitivities: Mapping[str, Mapping[Setting, float]]
) -> dict[str, Setting]:
    """Return the setting of each module that is chosen, by path.

    Args:
        plan: the target, as if it were not quantized.
        asked: its budget, and what there is to choose of.
        sensitivities: what each setting would cost each weight, by its name.

    Raises:
        ConfigError: the budget is too small.
    """
    paths = {weight_name(path): path for path in plan.shared.schemes.choosable(asked)}
    fixed = plan.shared.schemes.plan(asked).settings
    rest = 0
    options: dict[str, dict[Setting, Option]] = {}
    for parameter in plan.shared.model.parameters.values():
        spec = TensorSpec(dtype_after(parameter, plan.model.dtype), parameter.shape)
        name = parameter.name
        if found := sensitivities.get(name) if name in paths else None:
            options[name] = _told_apart(
                {
                    setting: Option(_packed(parameter, spec, setting), loss)
                    for setting, loss in found.items()
                }
            )
        elif setting := fixed.get(paths.get(name, name.removesuffix("weight").strip("."))):
            rest += _packed(parameter, spec, setting)
        else:
            rest += spec.nbytes
    limit, words = _limit(plan, asked, [paths[name] for name in options])
    chosen = knapsack.choose([[*each.values()] for each in options.values()], limit - rest)
    if chosen is None:
        least = rest + sum(min(o.nbytes for o in each.values()) for each in options.values())
        raise ConfigError(
            f"{words} cannot be: with the fewest bits of all candidates it is {size(least)}, and "
            f"may be {size(max(limit, 0))}. Raise it, or add candidates of fewer bits."
        )
    return {
        paths[name]: [*each][at] for (name, each), at in zip(options.items(), chosen, strict=True)
    }


def _told_apart(options: dict[Setting, Option]) -> dict[Setting, Option]:
    """Return the options of a weight that may be chosen.

    None that costs without a bound; if nothing is known of what any costs, the largest alone.
    """
    bounded = {setting: option for setting, option in options.items() if isfinite(option.loss)}
    if any(option.loss for option in bounded.values()):
        return bounded
    largest = max(options, key=lambda setting: options[setting].nbytes)
    return {largest: options[largest]._replace(loss=0.0)}


def _packed(parameter: Parameter, spec: TensorSpec, setting: Setting) -> int:
    return total(quantize.part_specs(parameter.name, spec, setting).values())


def _limit(plan: Plan, asked: Quantize, quantized: list[str]) -> tuple[int, str]:
    """Return how many bytes the model may have, and what says so."""
    if asked.target_bpw is not None:
        limit = int(min(asked.target_bpw, 64) * plan.shared.weights(quantized) / 8)
        return limit, f"target_bpw = {asked.target_bpw}"
    assert asked.fit is not None
    context = asked.context or CONTEXT
    cache = cache_size.cache_bytes(plan.model.memos, skeleton_of(plan.model, {}), context)
    words = f"fit = {size(asked.fit)}, {size(cache)} of it for the cache of {context} tokens,"
    return asked.fit - cache, words

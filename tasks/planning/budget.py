"""budget: each module's setting, chosen so that least is lost within a size."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import NamedTuple

from cache.records.manifests import TensorSpec
from tasks.core.errors import ConfigError
from tasks.core.quantization import Quantize
from tasks.core.text import size
from tasks.layouts.model import Parameter
from tasks.planning import knapsack
from tasks.planning.knapsack import Option
from tasks.planning.node import total
from tasks.planning.plan import Plan
from tasks.quality import cache_size
from tasks.stages import quantize, quantize_scheme
from tasks.stages.forward_params import skeleton_of
from tasks.stages.quantize_scheme import Setting, weight_name

CONTEXT = 4096  # tokens, where nobody says how many


class Budget(NamedTuple):
    """What there is to choose of, and how large that may be: known before any model is run.

    Attributes:
        words: what says how large.
        nbytes: what the model may have.
        rest: what it has of what nothing is chosen for.
        options: what each module has in each setting that there is to choose of, by path.
        fixed: the settings of the others that are quantized, by path.
    """

    words: str
    nbytes: int
    rest: int
    options: dict[str, dict[Setting, int]]
    fixed: dict[str, Setting]

    @classmethod
    def of(cls, plan: Plan, asked: Quantize) -> Budget:
        """Work it out.

        Args:
            plan: the target, as if it were not quantized.
            asked: its budget, and what there is to choose of.

        Raises:
            ConfigError: it is too small for any choice, or too large for there to be one.
        """
        paths = {weight_name(path): path for path in plan.shared.schemes.choosable(asked)}
        given = plan.shared.schemes.plan(asked).settings
        fixed: dict[str, Setting] = {}
        candidates = quantize_scheme.candidates(asked)
        rest = 0
        options: dict[str, dict[Setting, int]] = {}
        for parameter in plan.shared.model.parameters.values():
            spec = TensorSpec(plan.model.dtype_after_cast(parameter), parameter.shape)
            path = paths.get(parameter.name)
            fitting = [each for each in candidates if spec.shape and not spec.shape[-1] % each[0]]
            if path is not None and fitting:
                options[path] = {each: _packed(parameter, spec, each) for each in fitting}
            elif setting := given.get(at := quantize_scheme.module_path(parameter.name)):
                fixed[at] = setting
                rest += _packed(parameter, spec, setting)
            else:
                rest += spec.nbytes
        nbytes, words = _limit(plan, asked, [*options])
        budget = cls(words, nbytes, rest, options, fixed)
        if budget.fewest > nbytes:
            raise ConfigError(
                f"{words} cannot be: with the fewest bits of all candidates it is "
                f"{size(budget.fewest)}, and may be {size(max(nbytes, 0))}. Raise it, or add "
                "candidates of fewer bits."
            )
        if asked.target_bpw is not None and budget.most < nbytes:
            most = 8 * budget.most / plan.shared.weights([*options])
            raise ConfigError(
                f"{words} leaves nothing to choose: with the most bits of all candidates it is "
                f"{most:.4g}. Lower it, or set bits in place of it."
            )
        return budget

    @property
    def fewest(self) -> int:
        """What the model has with the fewest bits of all that there is to choose of."""
        return self.rest + sum(min(each.values()) for each in self.options.values())

    @property
    def most(self) -> int:
        """The same with the most."""
        return self.rest + sum(max(each.values()) for each in self.options.values())

    def size(self, settings: Mapping[str, Setting]) -> int:
        """Return what the model has in a choice."""
        return self.rest + sum(each[settings[path]] for path, each in self.options.items())

    def choose(self, sensitivities: Mapping[str, Mapping[Setting, float]]) -> dict[str, Setting]:
        """Return the setting of each module that is chosen, by path.

        Args:
            sensitivities: what each setting would cost each weight, by its name.

        Raises:
            ConfigError: what does not cost without a bound is too large.
        """
        options = {
            path: _told_apart(
                {
                    setting: Option(nbytes, sensitivities[weight_name(path)][setting])
                    for setting, nbytes in each.items()
                }
            )
            for path, each in self.options.items()
        }
        left = self.nbytes - self.rest
        chosen = knapsack.choose([[*each.values()] for each in options.values()], left)
        if chosen is None:
            least = sum(min(o.nbytes for o in each.values()) for each in options.values())
            raise ConfigError(
                f"{self.words} cannot be: of some modules it is not known what fewer bits would "
                f"cost, or that has no bound; without these it is {size(self.rest + least)}, and "
                f"may be {size(self.nbytes)}. Raise it, or calibrate on more text."
            )
        return {path: [*each][at] for (path, each), at in zip(options.items(), chosen, strict=True)}


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
    words = f"fit = {size(asked.fit)}, {size(cache)} of it for the cache of {context} tokens"
    return asked.fit - cache, words

"""rules: which modules each of a target's rules is for: the first that matches a module wins."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from tasks.core.errors import ConfigError
from tasks.core.quantization import Rule
from tasks.core.text import listed
from tasks.layouts.model import Model, Parameter


def of_modules(model: Model, rules: Sequence[Rule], why_none: Callable[[], str]) -> dict[str, Rule]:
    """Return the rule of each module that has one, by path: the first that matches it.

    A rule that says a dtype is for whatever has parameters of its own, another for what can be
    quantized. One that matches none may have the checkpoint's own names instead.

    Args:
        model: the model.
        rules: in order.
        why_none: says why a model has no module that can be quantized.

    Raises:
        ConfigError: a rule matches none, or a part of one alone.
    """
    if not rules:
        return {}
    can = [module.path for module in model.modules if module.quantized_names is not None]
    held: dict[str, list[Parameter]] = {}
    for parameter in model.parameters.values() if any(rule.dtype for rule in rules) else ():
        held.setdefault(holder_of(parameter.name), []).append(parameter)
    rule_of: dict[str, Rule] = {}
    for rule in dict.fromkeys(rules):
        paths = [*dict.fromkeys([*can, *held])] if rule.dtype else can
        matched = fnmatch.filter(paths, rule.match) or _by_checkpoint(model, rule, paths, held)
        new = {path: rule for path in matched if path not in rule_of}
        if not new or (rule.says_how and new.keys().isdisjoint(can)):
            kinds = paths if not rule.says_how else can
            taken = [rule_of[path].match for path in kinds if path in matched and path in rule_of]
            if taken:
                raise ConfigError(_taken(rule, [*dict.fromkeys(taken)]))
            raise ConfigError(_unmatched(rule, kinds, why_none, dtype=kinds is not can))
        if rule.dtype and not any(p.castable for path in new for p in held.get(path, ())):
            raise ConfigError(
                f"rule {rule.match!r} has dtype = {rule.dtype!r}, and the model keeps what it "
                f"matches as the checkpoint has it ({listed([*new])}), by the word of "
                f"{model.library}. Drop dtype, or match other modules."
            )
        rule_of |= new
    return rule_of


def dtypes(model: Model, rule_of: dict[str, Rule]) -> dict[str, str]:
    """Return what rules cast parameters to, by name, those that the model lets be cast.

    Args:
        model: the model.
        rule_of: see ``of_modules``.
    """
    said = {path: rule.dtype for path, rule in rule_of.items() if rule.dtype}
    if not said:
        return {}
    found = {p.name: said.get(holder_of(p.name)) for p in model.parameters.values() if p.castable}
    return {name: dtype for name, dtype in found.items() if dtype}


def holder_of(name: str) -> str:
    """Return the path of the module that a parameter is of."""
    return name.rpartition(".")[0]


def _by_checkpoint(
    model: Model, rule: Rule, paths: Iterable[str], held: dict[str, list[Parameter]]
) -> list[str]:
    """Return the modules that a rule matches by the checkpoint's names.

    Raises:
        ConfigError: it matches a part of one alone.
    """
    matched = []
    for path in paths:
        weight = model.parameters.get(f"{path}.weight" if path else "weight")
        theirs = _checkpoint_paths(held[path] if weight is None else [weight])
        if named := [each for each in theirs if fnmatch.fnmatchcase(each, rule.match)]:
            if len(named) < len(theirs):
                raise ConfigError(
                    f"rule {rule.match!r} matches {named[0]} of the checkpoint, which the model "
                    f"has in one with others, as {path}. Match that: it is made as a whole."
                )
            matched.append(path)
    return matched


def _checkpoint_paths(parameters: Iterable[Parameter]) -> list[str]:
    """Return what the checkpoint calls the modules that parameters are made of."""
    names = (key.partition("#")[0] for parameter in parameters for key in parameter.inputs)
    return list(dict.fromkeys(re.sub(r"\.(weight(_\w+)?|bias)$", "", name) for name in names))


def _unmatched(rule: Rule, paths: list[str], why_none: Callable[[], str], *, dtype: bool) -> str:
    """Return what to say of a rule that has no effect, with the nearest that would have one."""
    from difflib import get_close_matches  # that only a mistake pays

    what = "module" if dtype else "module that can be quantized"
    if not paths:
        return f"rule {rule.match!r} matches no {what}: {why_none()}"
    patterns = {re.sub(r"\.\d+\.", ".*.", path): None for path in paths}
    near = get_close_matches(rule.match, [*paths, *patterns], 1)
    return (
        f"rule {rule.match!r} matches no {what}. There are {', '.join(paths[:3])}, … "
        f"({len(paths)} in all); "
        + (f"near is {near[0]!r}; " if near else "")
        + "'*' matches any run of characters."
    )


def _taken(rule: Rule, earlier: list[str]) -> str:
    """Return what to say of a rule that earlier ones, by what they match, leave nothing."""
    names = listed([repr(match) for match in earlier])
    return (
        f"rule {rule.match!r} is for no module: the first rule that matches one is its only one, "
        f"and all that it matches have {names} before it. Put it first, or drop one."
    )

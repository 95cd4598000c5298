"""choosing: what models.lock has of a choice stands; else it is made, of what is on record.

Sensitivities are not the same to the bit on all machines, nor is Python's help, which is the text
by default: a choice that was locked is taken as long as models.toml and the model ask for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import structs, to_builtins

from cache.digest import digest_record
from tasks.core.errors import ConfigError
from tasks.core.program import COMMAND
from tasks.core.quantization import Quantize, Rule
from tasks.core.spec import Quality
from tasks.core.text import toml
from tasks.planning.budget import Budget
from tasks.planning.choice import Choice, Origin
from tasks.planning.lock_format import Built
from tasks.planning.lockfile import Lock
from tasks.planning.plan import Plan
from tasks.quality import imatrix, text
from tasks.stages import quantize_scheme
from tasks.stages.quantize_scheme import Setting
from tasks.stages.stage import COMPUTER

Sensitivities = Mapping[str, Mapping[Setting, float]]  # by the weight's name and the setting


def choose(
    plan: Plan,
    asked: Quantize,
    lock: Lock,
    sensitivities: Callable[[], Sensitivities | None],
    *,
    anew: bool = False,
) -> Choice:
    """Choose each module's setting within a target's budget.

    Args:
        plan: the target, as if it were not quantized.
        asked: its budget, and what there is to choose of.
        lock: models.lock.
        sensitivities: returns them, if they are on record.
        anew: whether what is locked is to be left alone.

    Raises:
        ConfigError: the budget is too small, or the lock is strict and has no such choice.
        BuildError: the text to calibrate on cannot be read.
    """
    budget = Budget.of(plan, asked)
    built = None if anew else lock.targets.get(plan.target.name)
    was = (built.chosen_for if built else None) or {}
    absent = _absent(plan.model.quality, was)
    choice = Choice(
        budget.words, budget.nbytes, budget.fewest, budget.most,
        quantize_scheme.candidates(asked), len(budget.options),
        _record(plan, asked, was if absent else {}), absent=absent,
    )  # fmt: skip
    if built and built.chosen is not None:
        settings = _settings(built, budget)
        why = _differences(plan, choice.record, built, lock)
        if not why and settings is None:
            why = f"what {lock.path.name} has of it is no choice of these candidates"
        if not why and not built.is_chosen:
            why = f"what {lock.path.name} has of it is not what was chosen"
        if not why and settings is not None:
            return _made(choice, budget, settings, Origin.LOCKED)
        choice = structs.replace(choice, anew=why)
    if lock.strict:
        cause = choice.anew or f"{lock.path.name} has none for {plan.target.name}"
        raise ConfigError(
            f"--locked builds with the settings that {lock.path.name} has for {budget.words}: "
            f"{cause}. If that is wanted, run {COMMAND} without --locked, and commit the file."
        )
    known = sensitivities()
    if known is None:
        return choice
    return _made(choice, budget, budget.choose(known), Origin.SENSITIVITIES)


def _made(
    choice: Choice, budget: Budget, settings: Mapping[str, Setting], origin: Origin
) -> Choice:
    chosen = budget.size(settings)
    return structs.replace(choice, settings=settings, chosen=chosen, origin=origin)


def _absent(quality: Quality, was: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what is calibrated on and not here, where a choice for such is locked.

    That choice is of what was there: a clone builds with it, though it has neither.
    """
    if quality.imatrix is not None and "imatrix" in was:
        files: tuple[str, ...] = (quality.imatrix,)
    elif "text" in was:
        files = quality.text or ()
    else:
        files = ()
    return tuple(file for file in files if not Path(file).exists())


def _record(plan: Plan, asked: Quantize, was: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a choice is made for, short enough for models.lock to have it.

    Args:
        plan: the target, as if it were not quantized.
        asked: its budget, and what there is to choose of.
        was: what models.lock has of what is calibrated on and not here.

    Raises:
        BuildError: that cannot be read.
    """
    quality = plan.model.quality
    record = {
        "target_bpw": asked.target_bpw,
        "fit": asked.fit,
        "context": asked.context,
        "exact": asked.exact or None,
        "candidates": [list(each) for each in quantize_scheme.candidates(asked)],
        "rules": [_rule(rule) for rule in asked.rules],
        **_calibration(quality, was, exact=asked.exact),
        "model": _unquantized(plan),
    }
    return {key: value for key, value in record.items() if value not in (None, [])}


def _rule(rule: Rule) -> dict[str, Any]:
    """Return a rule; without a dtype, as locks have it that were written before there was one."""
    said: dict[str, Any] = to_builtins(rule)
    return {key: value for key, value in said.items() if key != "dtype" or value}


def _calibration(quality: Quality, was: Mapping[str, Any], *, exact: bool) -> dict[str, Any]:
    """Return what the choice is calibrated on."""
    if quality.imatrix is not None and not exact:
        return {"imatrix": was.get("imatrix") or imatrix.content(Path(quality.imatrix))}
    own = "default"
    if quality.text is not None:
        own = was.get("text") or text.digest(text.own(quality))
    return {
        "text": own,
        "samples": quality.samples,
        "sequence_length": quality.sequence_length,
        "seed": quality.seed,
        **({"top_logits": quality.top_logits} if exact else {}),
    }


def _unquantized(plan: Plan) -> str:
    """Return a digest of the model before it is quantized, but for what computes it."""
    made_by = [
        [node.layer, {k: v for k, v in node.params.record.items() if k not in COMPUTER}]
        for stage, nodes in plan.stages.items()
        if stage != plan.model.roles.quantized
        for node in nodes
    ]
    return digest_record([plan.target.layout, plan.model.dtype or "", made_by])


_OF_TEXT = ("text", "samples", "sequence_length", "seed", "top_logits")
_WORDS = {
    "candidates": "the candidates",
    "rules": "the rules",
    "text": "the text to calibrate on",
    "imatrix": "the importance matrix",
    "model": "the model before it is quantized",
}


def _differences(plan: Plan, record: Mapping[str, Any], built: Built, lock: Lock) -> str:
    """Return why a choice that is locked is for something else; nothing if it is not."""
    source = lock.sources.get(plan.target.source_name)
    if source is None or source.record != built.source:
        return f"it is locked of another {plan.target.source_name}"
    was = built.chosen_for or {}
    found = []
    follows: set[str] = set()  # what is another with something else that is
    if ("imatrix" in record) != ("imatrix" in was):
        follows.update(_OF_TEXT)
    if record.get("exact") != was.get("exact"):
        follows.add("top_logits")
    for key in dict.fromkeys([*record, *was]):
        if key in follows or record.get(key) == was.get(key):
            continue
        if word := _WORDS.get(key):
            found.append(
                f"{word} {'are' if key in ('candidates', 'rules') else 'is'} not what is locked"
            )
        else:
            now, then = (toml(each[key]) if key in each else "none" for each in (record, was))
            found.append(f"{key} is {now}, and {then} in {lock.path.name}")
    return "; ".join(found)


def _settings(built: Built, budget: Budget) -> dict[str, Setting] | None:
    """Return the locked settings of what there is to choose for; None if they are no choice."""
    locked = {path: Setting(*each) for path, each in (built.chosen or {}).items()}
    settings = {path: locked.pop(path) for path in budget.options if path in locked}
    if any(settings.get(path) not in options for path, options in budget.options.items()):
        return None
    if locked != budget.fixed:
        return None
    return settings if budget.size(settings) <= budget.nbytes else None

"""reasons: why a task runs, in words: how its parameters and inputs differ from the last time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache.records.manifests import Action

NAMES_SHOWN = 3  # in a short list
CONTENTS = "it reads other contents"
Explain = Callable[[Mapping[str, Any], Mapping[str, Any]], "list[Reason]"]


@dataclass(frozen=True)
class Reason:
    """One reason.

    Attributes:
        fact: what changed.
        names: of the tensors or layers concerned; none if it concerns all.
    """

    fact: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.fact} ({shortened(self.names)})" if self.names else self.fact


def joined(reasons: Iterable[Reason]) -> str:
    """Return reasons as one line of text."""
    return "; ".join(map(str, reasons))


def shortened(names: Sequence[str]) -> str:
    """Return names as text: the first few, and how many there are."""
    more = f", … {len(names)} in all" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def contents(names: Iterable[str]) -> list[Reason]:
    """Return the reason that the inputs of these names have other contents; none without names."""
    named = tuple(names)
    return [Reason(CONTENTS, named)] if named else []


def between(old: Action, new: Action, explain: Explain) -> list[Reason]:
    """Return how two actions of one stage and layer differ.

    Args:
        old: of what is there.
        new: of what is asked for.
        explain: the stage's ``explain``.
    """
    reasons = []
    if old.version != new.version:
        reasons.append(Reason(f"mlx-make's {new.stage} {old.version} → {new.version}"))
    if old.params != new.params:
        reasons += explain(old.params, new.params)
    both = [name for name in new.inputs if name in old.inputs]
    return reasons + contents(name for name in both if old.inputs[name] != new.inputs[name])


def of_packing(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[Reason]:
    """Return how a target's packing differs, given two of ``planning.bundle.params``."""
    if old is None:  # by another version
        return []
    changed = [key for key, value in new.items() if old.get(key) != value]
    return [
        Reason(f"{key} {old.get(key)} → {new[key]}" if key in _SHOWN_VALUES else f"{key} changed")
        for key in changed
    ]


_SHOWN_VALUES = ("mlx-make's pack", "layout", "max_shard_size")  # no digests


def changed_values(
    old: Mapping[str, Any], new: Mapping[str, Any], but: Sequence[str] = ()
) -> list[Reason]:
    """Return one reason for each value that both have and that changed.

    Args:
        old: values by name.
        new: the same, now.
        but: names that are left out.
    """
    return [
        Reason(f"{key} {old[key]} → {value}")
        for key, value in new.items()
        if key not in but and old.get(key) not in (None, value)
    ]


def changes(what: str, old: Mapping[str, Any], new: Mapping[str, Any], absent: str) -> list[Reason]:
    """Return one reason for each way in which a value by tensor changed.

    Args:
        what: the value's name.
        old: values by the tensor's name.
        new: the same, now.
        absent: what stands for the value of a tensor that has none.
    """
    ways: dict[tuple[Any, Any], list[str]] = {}
    for name in {**old, **new}:
        was, now = old.get(name, absent), new.get(name, absent)
        if was != now:
            ways.setdefault((was, now), []).append(name)
    return [Reason(f"{what} {was} → {now}", tuple(names)) for (was, now), names in ways.items()]


def tensor_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
    """Return which tensors changed, are new, or are gone."""
    changed = tuple(name for name in new if name in old and old[name] != new[name])
    fact = "of another dtype or shape, or made in another way"
    reasons = [Reason(fact, changed)] if changed else []
    return reasons + come_and_gone(old, new, "new", "gone")


def come_and_gone(
    old: Mapping[str, Any], new: Mapping[str, Any], come: str, gone: str
) -> list[Reason]:
    """Return the names that only one of two tables has.

    Args:
        old: a table by name.
        new: the same, now.
        come: what is said of names that only ``new`` has.
        gone: what is said of names that only ``old`` has.
    """
    ways = {
        come: tuple(name for name in new if name not in old),
        gone: tuple(name for name in old if name not in new),
    }
    return [Reason(fact, names) for fact, names in ways.items() if names]

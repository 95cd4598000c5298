"""reasons: why a task runs, in words, from what it was told before and what it is told now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache.records.manifests import Action

SHOWN = 3  # names in a short list
CONTENTS = "it reads other contents"


@dataclass(frozen=True)
class Reason:
    """One reason.

    Attributes:
        fact: what is different.
        names: of the tensors or layers that it is about, if it is not about all.
    """

    fact: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.fact} ({some(self.names)})" if self.names else self.fact


def joined(found: Iterable[Reason]) -> str:
    """Return reasons as one line of text."""
    return "; ".join(map(str, found))


def some(names: Sequence[str]) -> str:
    """Return names, cut where they are many."""
    more = f", … {len(names)} in all" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def contents(names: Iterable[str]) -> list[Reason]:
    """Return the reason that what a task reads has other contents, if anything has."""
    named = tuple(names)
    return [Reason(CONTENTS, named)] if named else []


def between(old: Action, new: Action) -> list[Reason]:
    """Return what differs in two actions of one stage and layer.

    Args:
        old: of what is there.
        new: of what is asked for.
    """
    found = []
    if old.version != new.version:
        found.append(Reason(f"mlx-make's {new.stage} {old.version} → {new.version}"))
    for key in dict.fromkeys((*new.params, *old.params)):
        was, now = old.params.get(key), new.params.get(key)
        if was == now:
            continue
        if key == "settings":
            found += _settings(was or {}, now or {})
        elif key == "dtypes":
            found += _changes("dtype", was or {}, now or {}, "the checkpoint's")
        elif key == "tensors":
            found += _tensors(was or {}, now or {})
        elif key == "sanitize":
            found.append(Reason("what mlx-lm's sanitize depends on changed"))
        elif was is not None and now is not None:
            found.append(Reason(f"{key} {was} → {now}"))
    both = [name for name in new.inputs if name in old.inputs]
    return found + contents(name for name in both if old.inputs[name] != new.inputs[name])


def of_files(old: Any, new: Any) -> list[Reason]:
    """Return which of a checkpoint's files are others, given two of ``extract.look``."""
    if old is None:  # by another version
        return []
    if isinstance(new, str):
        return [Reason("the checkpoint is not here: its record is used")]
    if isinstance(old, str):
        return [Reason("the checkpoint is here again")]
    before, after = ({name: stamp for name, *stamp in look[1]} for look in (old, new))
    found = [
        f"checkpoint file {name} {'changed' if name in before else 'is new'}"
        for name in after
        if before.get(name) != after[name]
    ]
    found += [
        f"checkpoint file {name} is not used any more" for name in before if name not in after
    ]
    if old[0] != new[0]:
        found = [f"the checkpoint lies in {new[0]}, not in {old[0]}"]
    return [Reason(fact) for fact in found or ["its tensors are others, or lie elsewhere"]]


def of_parts(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[Reason]:
    """Return how what a target's packing is told differs, given two of ``pack.told``."""
    if old is None:  # by another version
        return []
    changed = [key for key, value in new.items() if old.get(key) != value]
    return [
        Reason(f"{key} {old.get(key)} → {new[key]}" if key in _SHORT else f"{key} changed")
        for key in changed
    ]


_SHORT = ("mlx-make's pack", "layout", "max_shard_size")  # no digests


def _settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
    """Compare how tensors are quantized: group size, bits, mode by name."""
    found = []
    for at, key in ((1, "bits"), (0, "group_size"), (2, "mode")):
        before = {name: setting[at] for name, setting in old.items() if name in new}
        after = {name: setting[at] for name, setting in new.items() if name in old}
        found += _changes(f"quantize.{key}", before, after, "")
    return found + _come_and_gone(old, new, "now quantized", "not quantized any more")


def _changes(
    what: str, old: Mapping[str, Any], new: Mapping[str, Any], absent: str
) -> list[Reason]:
    """Return one reason for each way in which a value by tensor changed."""
    ways: dict[tuple[Any, Any], list[str]] = {}
    for name in {**old, **new}:
        was, now = old.get(name, absent), new.get(name, absent)
        if was != now:
            ways.setdefault((was, now), []).append(name)
    return [Reason(f"{what} {was} → {now}", tuple(names)) for (was, now), names in ways.items()]


def _tensors(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
    odd = tuple(name for name in new if name in old and old[name] != new[name])
    found = [Reason("of another dtype or shape, or made in another way", odd)] if odd else []
    return found + _come_and_gone(old, new, "new", "gone")


def _come_and_gone(
    old: Mapping[str, Any], new: Mapping[str, Any], come: str, gone: str
) -> list[Reason]:
    ways = {
        come: tuple(name for name in new if name not in old),
        gone: tuple(name for name in old if name not in new),
    }
    return [Reason(fact, names) for fact, names in ways.items() if names]

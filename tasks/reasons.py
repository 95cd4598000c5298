"""reasons: why a task runs, in words, from what it was told before and what it is told now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cache.manifests import Action

SHOWN = 3  # names in a reason
CONTENTS = "contents of "


def between(old: Action, new: Action) -> list[str]:
    """Return what differs in two actions of one stage and layer.

    Args:
        old: of what is there.
        new: of what is asked for.
    """
    found = []
    if old.version != new.version:
        found.append(f"mlx-make's {new.stage} {old.version} → {new.version}")
    before, after = old.params, new.params
    for key in before.keys() | after.keys():
        was, now = before.get(key), after.get(key)
        if was == now:
            continue
        if key == "settings":
            found += _settings(was or {}, now or {})
        elif key == "dtypes":
            found += _changes("dtype", was or {}, now or {}, "as it is")
        elif key == "tensors":
            found += _tensors(was or {}, now or {})
        elif key == "sanitize":
            found.append("mlx, mlx-lm or the checkpoint's configuration, which sanitize depends on")
        elif was is not None and now is not None:
            found.append(f"{key} {was} → {now}")
    changed = [n for n in new.inputs if old.inputs.get(n) != new.inputs[n]]
    changed += [n for n in old.inputs if n not in new.inputs]
    if changed:
        found.append(f"{CONTENTS}{some(changed)}")
    return found


def of_files(old: Any, new: Any) -> list[str]:
    """Return which of a checkpoint's files are others, given two of ``Order.look``."""
    if not isinstance(old, list) or not isinstance(new, list):
        return [
            "the checkpoint is here again" if isinstance(new, list) else "the checkpoint is gone"
        ]
    before, after = ({name: stamp for name, *stamp in look[1]} for look in (old, new))
    found = [
        f"checkpoint file {name} changed"
        for name in after
        if before.get(name, after[name]) != after[name]
    ]
    found += [f"checkpoint file {name} is new" for name in after.keys() - before.keys()]
    found += [f"checkpoint file {name} is gone" for name in before.keys() - after.keys()]
    if old[0] != new[0]:
        found.append(f"the checkpoint lies in {new[0]}, was {old[0]}")
    return found or ["its tensors lie elsewhere in the checkpoint's files"]


def of_parts(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """Return how what a target's packing is told differs, given two of ``pack.told``."""
    if old is None:  # by another version
        return []
    short = (int, float)
    return [
        f"{key} {old.get(key)} → {value}"
        if isinstance(value, short) or key == "layout"
        else f"{key} changed"
        for key, value in new.items()
        if old.get(key) != value
    ]


def _settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Compare how tensors are quantized: group size, bits, mode by name."""
    found = []
    for at, key in ((1, "bits"), (0, "group_size"), (2, "mode")):
        before = {name: setting[at] for name, setting in old.items() if name in new}
        after = {name: setting[at] for name, setting in new.items() if name in old}
        found += _changes(f"quantize.{key}", before, after, "")
    if names := [name for name in new if name not in old]:
        found.append(f"now quantized: {some(names)}")
    if names := [name for name in old if name not in new]:
        found.append(f"quantized no more: {some(names)}")
    return found


def _changes(what: str, old: Mapping[str, Any], new: Mapping[str, Any], absent: str) -> list[str]:
    """Return one reason for each way in which a value by tensor changed."""
    ways: dict[tuple[Any, Any], list[str]] = {}
    for name in {**old, **new}:
        way = (old.get(name, absent), new.get(name, absent))
        if way[0] != way[1]:
            ways.setdefault(way, []).append(name)
    return [f"{what} {was} → {now} ({some(names)})" for (was, now), names in ways.items()]


def _tensors(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = [f"{name} is new" for name in new if name not in old]
    found += [f"{name} is gone" for name in old if name not in new]
    found += [
        f"{name} has another dtype or shape, or is made in another way"
        for name in new
        if name in old and old[name] != new[name]
    ]
    return found[:SHOWN] + ([f"{len(found) - SHOWN} more such"] if len(found) > SHOWN else [])


def short(reason: str) -> str:
    """Return a reason without the names of tensors, as it is for many layers."""
    if reason.startswith(CONTENTS):
        return f"{CONTENTS}what it reads"
    return reason.partition(" (")[0]


def some(names: list[str]) -> str:
    """Return names, cut where they are many."""
    more = f", … {len(names)} in all" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

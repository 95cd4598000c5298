"""text: numbers, sizes and times as people write and read them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import inf, isnan
from pathlib import Path
from typing import Any

UNITS = {
    "": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30,
}  # fmt: skip
NUMBER = r"\s*([0-9]{1,18})(?:\.([0-9]{1,18}))?\s*"  # of a size; its unit follows
SIZE = rf"{NUMBER}([A-Za-z]*)\s*"


def count(number: float) -> str:
    """Return a number of weights: ``1.1 B``, ``135 M``."""
    for unit, one in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= one:
            return f"{number / one:.3g} {unit}"
    return f"{number:.0f}"


def plural(count: int, thing: str) -> str:
    """Return how many things there are: ``1 task``, ``2 tasks``."""
    return f"{count} {thing}{'s' if count != 1 else ''}"


def listed(names: Sequence[str]) -> str:
    """Return the first three names, and a mark if there are more."""
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


def some(facts: Sequence[str], most: int, separator: str = ", ") -> str:
    """Return the first ``most`` facts, and how many more there are."""
    more = f" and {len(facts) - most} more" if len(facts) > most else ""
    return separator.join(facts[:most]) + more


def toml(value: Any) -> str:
    """Return a value as TOML spells it, in one line."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{name} = {toml(item)}" for name, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False)
    return str(value).lower()


def percent(part: float) -> str:
    """Return a fraction in percent, with three digits."""
    if isnan(part) or part == inf:
        return "not finite"
    return "0 %" if part == 0 else f"{100 * part:#.3g}".rstrip(".") + " %"


def decibel(value: float) -> str:
    """Return a value in decibels: ``31.2 dB``."""
    if isnan(value) or value == -inf:
        return "not finite"
    return "exact" if value == inf else f"{value:.1f} dB"


def seconds(value: float) -> str:
    """Return a time in seconds: ``12 ms``, ``3.4 s``, ``2 min 5 s``, ``1 h 3 min``."""
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    if value < 99.5:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size_bytes(text: str) -> int | None:
    """Return the bytes of a size such as ``2.5GB``, rounded down, or None if it is no size."""
    match = re.fullmatch(SIZE, text)
    if not match or match[3] not in UNITS:
        return None
    part = int((match[2] or "").ljust(18, "0"))  # in 10⁻¹⁸, since a float would round
    return int(match[1]) * UNITS[match[3]] + part * UNITS[match[3]] // 10**18


def size(count: float) -> str:
    """Return a number of bytes: ``1.5 GB``, in powers of ten."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= 0.9995 * factor:  # as it is rounded
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Return a time in seconds: ``3.4 s``, from a minute on as a clock: ``2:05 min``."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{clock(seconds)} {_unit(seconds)}"


def clock(seconds: float) -> str:
    """Return a time in seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _unit(seconds: float) -> str:
    return "h" if round(seconds) >= 3600 else "min"

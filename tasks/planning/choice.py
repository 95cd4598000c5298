"""choice: how a target's modules are quantized within a budget, and where that comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum
from typing import Any

from msgspec import Struct

from tasks.core.text import listed, plural, size
from tasks.stages.quantize_scheme import Setting


class Origin(Enum):
    """Where a choice comes from."""

    OPEN = "to be chosen"
    LOCKED = "locked"
    SENSITIVITIES = "chosen"


class Choice(Struct, frozen=True):
    """What each module's setting is within a budget.

    Attributes:
        budget: what models.toml says of it, in words.
        nbytes: what the model may have.
        fewest: what it has with the fewest bits of all candidates.
        most: with the most.
        settings: by the module's path; None while what decides is not on record.
        chosen: what it has with them; None likewise.
        origin: where they come from.
        record: what is chosen for, as models.lock has it.
        anew: why what models.lock has is not taken; nothing, where it is, or has none.
        absent: files that it was chosen by and that are not here: what is locked stands.
    """

    budget: str
    nbytes: int
    fewest: int
    most: int
    candidates: tuple[Setting, ...]
    modules: int
    record: dict[str, Any]
    settings: Mapping[str, Setting] | None = None
    chosen: int | None = None
    origin: Origin = Origin.OPEN
    anew: str = ""
    absent: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """It, for people."""
        within = f"at most {size(max(self.nbytes, 0))} ({self.budget})"
        if self.settings is None or self.chosen is None:
            return (
                f"then {plural(self.modules, 'module')} are each given one of "
                f"{plural(len(self.candidates), 'setting')} ({_listed(self.candidates)}), for "
                f"{within}: with the fewest bits it is {size(self.fewest)}, with the most "
                f"{size(self.most)}. Quantizing and packing follow"
            )
        counts = Counter(self.settings.values())
        each = ", ".join(f"{counts[s]} × {_short(s)}" for s in sorted(counts, key=_by_bits))
        origin = "as models.lock has it" if self.origin is Origin.LOCKED else "chosen now"
        if self.absent:
            origin += f" ({listed(self.absent)} not being here)"
        if self.anew:
            origin = f"chosen anew, since {self.anew}"
        return f"{each}: {size(self.chosen)} of {within}, {origin}"

    @property
    def json(self) -> dict[str, Any]:
        """It, for scripts."""
        settings = {path: s._asdict() for path, s in (self.settings or {}).items()}
        return {
            "state": self.origin.value,
            "budget": self.budget,
            "anew": self.anew,
            "candidates": [setting._asdict() for setting in self.candidates],
            "modules": self.modules,
            "bytes": self.chosen,
            "most_bytes_allowed": self.nbytes,
            "bytes_of_fewest_bits": self.fewest,
            "bytes_of_most_bits": self.most,
            "settings": settings if self.settings is not None else None,
        }


def _by_bits(setting: Setting) -> tuple[int, int, str]:
    return setting.bits, -setting.group_size, setting.mode


def _short(setting: Setting) -> str:
    mode = "" if setting.mode == "affine" else f" {setting.mode}"
    return f"{setting.bits} bits{mode} in groups of {setting.group_size}"


def _listed(settings: tuple[Setting, ...]) -> str:
    """Return settings in words: bits that go with the same groups together."""
    by_rest: dict[tuple[int, str], list[int]] = {}
    for setting in sorted(settings, key=_by_bits):
        by_rest.setdefault((setting.group_size, setting.mode), []).append(setting.bits)
    return "; ".join(
        f"{', '.join(map(str, bits))} bits{'' if mode == 'affine' else f' {mode}'} in groups of "
        f"{group_size}"
        for (group_size, mode), bits in by_rest.items()
    )

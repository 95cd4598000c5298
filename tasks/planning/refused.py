"""refused: targets that cannot be planned, and how that is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tasks.core.spec import Target
from tasks.core.text import some

MAX_TARGETS = 10  # targets in one message


@dataclass(frozen=True)
class Refused:
    """A target that cannot be planned.

    Attributes:
        target: what was asked for.
        reason: the fact and its cause, then what to do.
        undecided: whether that is only that its modules' settings are yet to be chosen.
    """

    target: Target
    reason: str
    undecided: bool = False


def messages(refused: Iterable[Refused]) -> list[str]:
    """Return what to tell of some targets: what they share, as an absent checkpoint, once."""
    by_reason: dict[str, dict[str, Target]] = {}
    for each in refused:
        by_reason.setdefault(each.reason, {})[each.target.name] = each.target
    return [f"{_head(targets)}: {reason}" for reason, targets in by_reason.items()]


def _head(targets: dict[str, Target]) -> str:
    first, *_ = targets.values()
    return f"{first.where}: {some([*targets], MAX_TARGETS)}"

"""progress: how far each target of a run is, at what rate it goes, and how long it takes still."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.cli.doit_adapter import with_needs
from tasks.core.task_names import PACK, task_name
from tasks.execution import log
from tasks.execution.log import Entry
from tasks.planning.node import Node, total
from tasks.planning.plan import Plan
from tasks.stages import registry

OUTCOMES = tuple(outcome for outcome in log.OUTCOMES if outcome != "failed")
LEAST_SECONDS = 2.0  # of work before an estimate means something, and the part of all of it
LEAST_PART = 0.02


class Pace:
    """Rates over the latter half of the time so far, so that they follow a change of pace."""

    def __init__(self) -> None:
        self._start = 0.0
        self._seen: deque[tuple[float, int, int]] = deque()

    def see(self, now: float, done: int, moved: int) -> None:
        """Take note of how much is done; of any two that are alike, the first counts.

        Args:
            now: seconds.
            done: weight of the tasks that are done.
            moved: bytes read and written.
        """
        if not self._seen:
            self._start = now
        elif self._seen[-1][1:] == (done, moved):
            return
        self._seen.append((now, done, moved))
        while len(self._seen) > 2 and self._seen[1][0] < (self._start + now) / 2:
            self._seen.popleft()

    def rate(self, now: float) -> float | None:
        """Return bytes a second, or None as long as that means nothing."""
        if not self._seen:
            return None
        (begin, _, before), (_, _, moved) = self._seen[0], self._seen[-1]
        if now - begin < LEAST_SECONDS / 2 or moved == before:
            return None
        return (moved - before) / (now - begin)

    def left(self, now: float, total: int) -> float | None:
        """Return the seconds left until ``total`` is done, or None as long as none can tell."""
        if not self._seen:
            return None
        (begin, before, _), (end, done, _) = self._seen[0], self._seen[-1]
        if end - begin < LEAST_SECONDS or done - before < LEAST_PART * total:
            return None
        # Counted down from when something was last done: one task may take long.
        left = (total - done) * (end - begin) / (done - before) - (now - end)
        return left if left > 0 else None


@dataclass
class Work:
    """One target's part of a run.

    Attributes:
        target: its name.
        weights: bytes of the layer that each of its tasks deals with, by the task's name.
        last: the last of its per-layer stages in the run.
        state: ``waiting``, the stage that began last, ``done``, ``failed``, ``up to date``.
        began: when its first task did, seconds.
        ended: when its last task did.
        layers: how many have gone through the last stage.
        done: weight of the tasks that are done.
        moved: bytes read and written.
        outcomes: of the tasks that were looked into, by name.
        size: of the built model, in bytes.
        bits_per_weight: of the built model.
    """

    target: str
    weights: dict[str, int]
    last: str
    state: str = "waiting"
    began: float | None = None
    ended: float | None = None
    layers: int = 0
    done: int = 0
    moved: int = 0
    outcomes: dict[str, str] = field(default_factory=dict)
    size: int = 0
    bits_per_weight: float = 0.0
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        self.all_layers = sum(name.startswith(f"{self.last}:") for name in self.weights)
        self.weight = sum(self.weights.values())

    def begin(self, stage: str, now: float) -> None:
        """A task of it begins."""
        if self.began is None:
            self.pace.see(now, self.done, self.moved)
            self.began = now
        if self.state not in ("failed", "done"):  # errors may be measured after packing
            self.state = stage

    def finish(self, task: str) -> None:
        """A task of it is done, or was up to date."""
        self.done += self.weights[task]
        self.layers += task.startswith(f"{self.last}:")

    def log(self, entry: Entry) -> None:
        """A task of it was looked into; one whose result was lost may be so again."""
        self.outcomes[entry.task] = entry.outcome
        self.moved += entry.bytes_read + entry.bytes_written

    @property
    def seconds(self) -> float:
        """What it took."""
        return (self.ended or 0.0) - (self.began or 0.0)

    def counts(self) -> Counter[str]:
        """Return how many tasks had each outcome."""
        return Counter(list(self.outcomes.values()))

    def rate(self, now: float) -> float | None:
        """Return bytes read and written a second, or None."""
        return self.pace.rate(now) if self._at_work(now) else None

    def left(self, now: float) -> float | None:
        """Return the seconds left, or None."""
        return self.pace.left(now, self.weight) if self._at_work(now) else None

    def _at_work(self, now: float) -> bool:
        if self.began is None or self.ended is not None:
            return False
        self.pace.see(now, self.done, self.moved)
        return True


class Overall:
    """All targets' parts of a run together."""

    def __init__(self) -> None:
        self._pace = Pace()

    def see(self, works: Iterable[Work], now: float) -> tuple[float | None, float | None]:
        """Return bytes read and written a second, and the seconds left; None: nobody can tell."""
        works = list(works)
        moved = sum(work.moved for work in works)
        self._pace.see(now, sum(work.done for work in works), moved)
        return self._pace.rate(now), self._pace.left(now, sum(work.weight for work in works))


def works(
    plans: Mapping[str, Plan], tasks: Mapping[str, Any], selected: Iterable[str]
) -> dict[str, Work]:
    """Return each target's part of a run.

    Args:
        plans: by target.
        tasks: doit's, by name.
        selected: names of those that were asked for.
    """
    run = set(with_needs(tasks, selected))
    measures = tuple(f"{stage.group}:" for stage in registry.MEASURES)
    measured = any(name.startswith(measures) for name in run)
    parts = {}
    for target, plan in plans.items():
        weights: dict[str, int] = {}
        last = ""
        names = [stage.name for stage in registry.stages()] if measured else [*plan.specs]
        for stage in names:
            asked = {n.name: _weight(n) for n in plan.nodes(stage) if n.name in run}
            weights |= asked
            last = next(iter(plan.nodes(stage))).stage.group if asked else last
        if (packing := task_name(PACK, target)) in run:
            weights[packing] = sum(map(_weight, plan.last))
        if weights:
            parts[target] = Work(target, weights, last)
    return parts


def _weight(node: Node) -> int:
    """Return the bytes of a layer, as it comes from the checkpoint."""
    while node.needs and not node.needs[0].is_leaf:
        node = node.needs[0]
    return total(node.output_specs().values())

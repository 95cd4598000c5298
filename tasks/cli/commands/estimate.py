"""estimate: how long a run takes, by what the build log says of earlier ones."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from tasks.core.task_names import is_packing
from tasks.execution.log import Entry
from tasks.planning.steps import SETTLED, Step


def estimate(steps: Iterable[Step], log: Iterable[Entry], count: int) -> float | None:
    """Return how many seconds steps will take, by earlier ones; None if too little is known.

    Layers run in ``count`` threads at once, packing comes after, or meanwhile, and then takes no
    time.
    """
    seconds: defaultdict[tuple[str, bool], float] = defaultdict(
        float
    )  # by stage, and whether any bytes are moved
    amounts: Counter[tuple[str, bool]] = Counter()  # bytes, or else tasks
    for entry in log:
        moved = entry.bytes_read + entry.bytes_written
        if entry.outcome != "failed":
            kind = (entry.group, moved > 0)
            seconds[kind] += entry.seconds
            amounts[kind] += moved or 1
    layers = last = 0.0
    for step in steps:
        moved = step.moved.read + step.moved.written
        kind = (step.stage, moved > 0)
        if step.state in SETTLED or (not moved and not amounts[kind]):
            continue
        if not amounts[kind]:
            return None
        took = seconds[kind] / amounts[kind] * (moved or 1)
        if is_packing(step.task):
            last += took
        else:
            layers += took
    return layers / count + last

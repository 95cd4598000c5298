"""knapsack: one option of each item, within a budget, so that what is lost in all is least.

The multiple-choice knapsack problem. Its linear relaxation is solved exactly, by the edges of each
item's lower convex hull (Sinha and Zoltners 1979): that bounds what any choice can reach. Where the
choice that it gives is not within ``TOLERANCE`` of the bound, options that no better choice can
have are left out, and dynamic programming over what is lost, in steps so small that all of them
together are within it, finds one that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

TOLERANCE = 0.001  # of the optimum
MOST_STEPS = 1 << 22


class Option(NamedTuple):
    """One way to have an item.

    Attributes:
        nbytes: what it takes of the budget.
        loss: what is lost by it, at least 0.
    """

    nbytes: int
    loss: float


class _Edge(NamedTuple):
    """A step along an item's hull: from an option to one that takes more and loses less.

    Attributes:
        item: the item.
        start: number of its option.
        stop: of the next.
        nbytes: how much more it takes.
        gain: how much less is lost.
    """

    item: int
    start: int
    stop: int
    nbytes: int
    gain: float


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Return the number of the option of each item; None if the budget is too small for any choice.

    The loss of all is within ``TOLERANCE`` of the least.
    """
    chosen = [min(range(len(each)), key=lambda i: each[i]) for each in items]
    left = budget - sum(items[i][at].nbytes for i, at in enumerate(chosen))
    if left < 0:
        return None
    edges = sorted(
        (edge for number, options in enumerate(items) for edge in _hull(number, options)),
        key=lambda edge: (-edge.gain / edge.nbytes, edge.item, edge.start),
    )
    bound, price = _relaxed(items, chosen, edges, left)
    for edge in edges:
        if chosen[edge.item] == edge.start and edge.nbytes <= left:
            chosen[edge.item] = edge.stop
            left -= edge.nbytes
    loss = _loss(items, chosen)
    if loss - bound <= TOLERANCE * bound:
        return chosen
    return _refined(items, budget, chosen, bound, price)


def _loss(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[at].loss for options, at in zip(items, chosen, strict=True))


def _hull(item: int, options: Sequence[Option]) -> list[_Edge]:
    """Return the edges of the lower convex hull of an item's options, from the fewest bytes up."""
    points: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: options[i]):
        if points and options[i].loss >= options[points[-1]].loss:
            continue
        while len(points) > 1 and _slope(options, points[-2], points[-1]) <= _slope(
            options, points[-2], i
        ):
            points.pop()
        points.append(i)
    return [
        _Edge(
            item,
            start,
            stop,
            options[stop].nbytes - options[start].nbytes,
            options[start].loss - options[stop].loss,
        )
        for start, stop in pairwise(points)
    ]


def _slope(options: Sequence[Option], start: int, stop: int) -> float:
    """Return how much less is lost for each byte."""
    return (options[start].loss - options[stop].loss) / (
        options[stop].nbytes - options[start].nbytes
    )


def _relaxed(
    items: Sequence[Sequence[Option]], least: Sequence[int], edges: Sequence[_Edge], left: int
) -> tuple[float, float]:
    """Return the loss where options may be taken in part, and what the last byte of it saved."""
    loss = _loss(items, least)
    for edge in edges:
        part = min(1.0, left / edge.nbytes)
        loss -= part * edge.gain
        left -= edge.nbytes
        if part < 1:
            return max(loss, 0.0), edge.gain / edge.nbytes
    return loss, 0.0


def _refined(
    items: Sequence[Sequence[Option]],
    budget: int,
    chosen: list[int],
    bound: float,
    price: float,
) -> list[int]:
    """Return a choice within ``TOLERANCE`` of the least loss, given one, and a bound."""
    import numpy as np

    slack = _loss(items, chosen) - bound
    open_items: dict[int, list[int]] = {}
    result = [*chosen]
    for number, options in enumerate(items):
        costs = [option.loss + price * option.nbytes for option in options]
        kept = [i for i, cost in enumerate(costs) if cost - min(costs) <= slack * (1 + 1e-9)]
        if len(kept) == 1:
            result[number] = kept[0]
            budget -= options[kept[0]].nbytes
        else:
            open_items[number] = kept
    floor = {n: min(items[n][i].loss for i in kept) for n, kept in open_items.items()}
    span = sum(items[n][chosen[n]].loss - floor[n] for n in open_items)
    step = max(TOLERANCE * bound / max(len(open_items), 1), span / MOST_STEPS)
    if not open_items or step <= 0:
        return chosen
    count = int(span / step) + 1
    least = np.full(count, np.iinfo(np.int64).max // 2)
    least[0] = 0
    taken: dict[int, tuple[np.ndarray, list[int]]] = {}
    for number, kept in open_items.items():
        steps = [int((items[number][i].loss - floor[number]) / step) for i in kept]
        best = np.full(count, np.iinfo(np.int64).max // 2)
        which = np.zeros(count, np.uint8)
        for at, (i, up) in enumerate(zip(kept, steps, strict=True)):
            if up < count:
                reached = least[: count - up] + items[number][i].nbytes
                better = reached < best[up:]
                best[up:][better] = reached[better]
                which[up:][better] = at
        least = best
        taken[number] = which, steps
    fits = np.flatnonzero(least <= budget)
    if not len(fits):
        return chosen
    at = int(fits[0])
    for number in reversed(open_items):
        which, steps = taken[number]
        result[number] = open_items[number][which[at]]
        at -= steps[which[at]]
    return min(chosen, result, key=lambda each: _loss(items, each))

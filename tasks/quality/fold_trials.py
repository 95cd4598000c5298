"""fold_trials: whether a segment says the same once a fold's channels are scaled: it is tried.

A candidate's rows are multiplied by numbers that differ from row to row. What other modules are
then given tells which of their channels each row makes: several, where heads share values. With
their columns divided by the same, all that the segment makes must be as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tasks.quality.calls import Seen
from tasks.quality.folds import Fold
from tasks.quality.segments import weight_of
from tasks.tensors import mx

TOLERANCE = 1e-3  # of what is made, as a part of its norm: float32, and no more than rounding
ADDED = (0.0, 1.0)  # what models add to a norm's weight: nothing, or one


class Made(NamedTuple):
    """What a segment makes, and what modules are given on the way there.

    Attributes:
        result: the state, or the logits.
        given: by the module's path.
    """

    result: mx.array
    given: Mapping[str, Seen]


class Proven(NamedTuple):
    """A fold that leaves a segment as it is.

    Attributes:
        fold: the fold.
        added: what is added to a norm's weight before it multiplies.
        rows: of each tensor of columns, by name, the row that makes each of them: (columns,).
        lead: of how many experts, where these make the channels: (experts,), or ().
        made: how many channels there are, or each expert has.
    """

    fold: Fold
    added: float
    rows: Mapping[str, np.ndarray]
    lead: tuple[int, ...]
    made: int


class Trials:
    """Tries the folds of a segment."""

    def __init__(
        self, weights: Mapping[str, mx.array], run: Callable[[Mapping[str, mx.array]], Made]
    ) -> None:
        """Begin.

        Args:
            weights: what the segment reads, by name, in float32.
            run: runs it with some of them replaced.
        """
        self._weights = weights
        self._run = run
        self._as_it_is = run({})

    def prove(self, fold: Fold) -> Proven | None:
        """Return how a fold's channels are scaled, or None if they cannot be."""
        first = self._weights[fold.scaled[0]]
        lead, count = (first.shape[:-2], first.shape[-2]) if first.ndim > 1 else ((), first.size)
        for added in ADDED if first.ndim == 1 else ADDED[:1]:
            for rows in self._maps(fold, count, lead, added):
                for others in self._others(fold, rows):
                    proven = Proven(fold, added, {**rows, **others}, lead, count)
                    if self._leaves_as_it_is(proven):
                        return proven
        return None

    def _maps(
        self, fold: Fold, count: int, lead: tuple[int, ...], added: float
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield which rows may make which channels: each its own, or as a trial tells."""
        columns = {
            weight_of(path): self._weights[weight_of(path)].shape[-1] for path in fold.inputs
        }
        if {*columns.values()} == {count}:
            yield dict.fromkeys(columns, np.arange(count))
        tags = _tags((count,), np.float32)
        made = self._run(scaled(self._weights, fold, added, np.broadcast_to(tags, (*lead, count))))
        found = {}
        for path in fold.inputs:
            was, now = (np.array(each.given[path].inputs) for each in (self._as_it_is, made))
            if was.shape != now.shape or (rows := _rows_of(was, now, tags)) is None:
                return
            found[weight_of(path)] = rows
        if any(not np.array_equal(rows, np.arange(count)) for rows in found.values()):
            yield found

    def _others(
        self, fold: Fold, rows: Mapping[str, np.ndarray]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield which further parameters may be given the channels: none, one of them, or all."""
        maps = {len(each): each for each in rows.values()}
        found = {
            name: maps[columns]
            for name in fold.others
            if (columns := self._weights[name].shape[-1]) in maps
        }
        yield {}
        for name, each in found.items():
            yield {name: each}
        if len(found) > 1:
            yield found

    def _leaves_as_it_is(self, proven: Proven) -> bool:
        tags = _tags((*proven.lead, proven.made), np.float32)
        replaced = scaled(self._weights, proven.fold, proven.added, tags)
        for name, rows in proven.rows.items():
            weight = replaced.get(name, self._weights[name])
            by = tags[..., rows]
            if proven.lead and proven.lead != weight.shape[:-2]:
                return False
            replaced[name] = weight / mx.array(by)[..., None, :]
        made = self._run(replaced)
        for path in proven.fold.inputs:
            was, now = self._as_it_is.given[path], made.given[path]
            factor = mx.array(tags[..., proven.rows[weight_of(path)]])
            if proven.lead and was.experts is None:
                return False
            factor = factor if was.experts is None or not proven.lead else factor[was.experts]
            if not _close(was.inputs * factor, now.inputs):
                return False
        return _close(self._as_it_is.result, made.result)


def scaled(
    weights: Mapping[str, mx.array], fold: Fold, added: float, by: np.ndarray
) -> dict[str, mx.array]:
    """Return what makes a fold's channels, with its rows multiplied.

    Args:
        weights: by name.
        fold: the fold.
        added: what is added to a norm's weight before it multiplies.
        by: (…, rows).
    """
    result = {}
    for name in fold.scaled:
        weight, factor = weights[name], mx.array(by)
        if weight.ndim == by.ndim + 1:
            result[name] = weight * factor[..., None]
        elif name == fold.scaled[0]:
            result[name] = (weight + added) * factor - added
        else:
            result[name] = weight * factor
    return result


def _tags(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return numbers from 1 to 2, of which no two of a row are alike."""
    size = int(np.prod(shape))
    order = np.random.default_rng(0).permutation(size)
    tags: np.ndarray = (1 + (order + 0.5) / size).astype(dtype).reshape(shape)
    return tags


def _rows_of(was: np.ndarray, now: np.ndarray, tags: np.ndarray) -> np.ndarray | None:
    """Return which tag each channel was multiplied by; None if some was not, or it cannot be told.

    Args:
        was: what a module was given: (…, channels).
        now: what it is given with the tags.
        tags: (rows,).
    """
    was, now = (each.reshape(-1, each.shape[-1]).astype(np.float64) for each in (was, now))
    squares = (was**2).sum(axis=0)
    if not squares.all():
        return None
    ratio = (was * now).sum(axis=0) / squares
    if not np.linalg.norm(now - was * ratio) <= TOLERANCE * np.linalg.norm(now):
        return None
    order = np.argsort(tags)
    at = np.clip(np.searchsorted(tags[order], ratio - 0.5 / len(tags)), 0, len(tags) - 1)
    rows: np.ndarray = order[at]
    return rows if (np.abs(tags[rows] - ratio) < 0.25 / len(tags)).all() else None


def _close(one: mx.array, other: mx.array) -> bool:
    """Tell whether two are the same, token by token: the norm of the first is often enormous."""
    one, other = (each.astype(mx.float32) for each in (one, other))
    if one.shape != other.shape:
        return False
    distance, norm = (mx.linalg.norm(each, axis=-1) for each in (one - other, one))
    return bool(mx.all(distance <= TOLERANCE * norm).item())

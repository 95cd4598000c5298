"""tally: what benchmarks that do harm at random have in common: seeds, and a table of outcomes."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from measure import BenchmarkError

Round = tuple[int, Sequence[str]]  # a seed, and the kinds of harm that are done by it at once


def parser(description: str, *, count: int, what: str) -> ArgumentParser:
    """Return the arguments that all have: ``count`` of each ``what``, and the first seed."""
    arguments = ArgumentParser(description=description.split("\n")[0])
    arguments.add_argument("--count", type=int, default=count, help=f"of each {what}")
    arguments.add_argument("--first", type=int, default=0, help="the first seed")
    arguments.add_argument("--show", type=int, default=3, help="of each way to go wrong")
    return arguments


def rounds(groups: Iterable[Sequence[str]], arguments: Namespace) -> Iterator[Round]:
    """Yield every seed with each group of kinds."""
    for group in groups:
        for seed in range(arguments.first, arguments.first + arguments.count):
            yield seed, group


def run(
    rounds: Iterable[Round],
    attempt: Callable[..., tuple[str, str]],
    outcomes: Iterable[str],
    *,
    heading: str,
    show: int,
) -> None:
    """Make attempts, and print a table of their outcomes; interrupted, of those so far.

    Args:
        rounds: what is tried.
        attempt: returns the outcome of a seed and of kinds, and its details.
        outcomes: those that are right.
        heading: of the table's first two columns.
        show: so many details of each outcome that is wrong are printed.

    Raises:
        BenchmarkError: something came out wrong.
    """
    right, begin, builds = [*outcomes], time.monotonic(), 0
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    with suppress(KeyboardInterrupt):
        for seed, kinds in rounds:
            outcome, detail = attempt(seed, *kinds)
            builds += 1
            for kind in kinds:
                counts[kind][outcome] += 1
            if outcome not in right and counts[kinds[0]][outcome] <= show:
                print(f"{outcome}: {detail}\n", file=sys.stderr, flush=True)
    columns = dict.fromkeys([*right, *(name for of in counts.values() for name in of)])
    print(f"| {heading} | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for kind, of in counts.items():
        print(f"| {kind} | {of.total()} | {' | '.join(str(of[name]) for name in columns)} |")
    total = sum(map(Counter.total, counts.values()))
    print(f"\n{total} in {builds} attempts, {time.monotonic() - begin:.0f} s")
    if len(columns) > len(right):
        raise BenchmarkError("not all came out right")

"""tally: what benchmarks that do harm at random have in common: seeds, batches, and a table.

Attempts are made in processes of their own, a batch in each. One that dies or hangs is an outcome
as any other, and what thousands of builds leave in a process (MLX keeps a thread for each thread
that ever asked it) goes with it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from measure import BenchmarkError

Round = tuple[int, Sequence[str]]  # a seed, and the kinds of harm that are done by it at once
Attempt = Callable[..., tuple[str, str]]  # of a seed and of kinds, the outcome and its details
BATCH = 200
HANGS_SECONDS = 120  # on a busy machine


def parser(description: str, *, count: int, what: str) -> ArgumentParser:
    """Return the arguments that all have: ``count`` of each ``what``, and the first seed."""
    arguments = ArgumentParser(description=description.split("\n")[0])
    arguments.add_argument("--count", type=int, default=count, help=f"of each {what}")
    arguments.add_argument("--first", type=int, default=0, help="the first seed")
    arguments.add_argument("--show", type=int, default=3, help="of each way to go wrong")
    arguments.add_argument("--minutes", type=float, default=1e9, help="after which it ends")
    return arguments


def rounds(groups: Iterable[Sequence[str]], arguments: Namespace) -> Iterator[Round]:
    """Yield every seed with each group of kinds."""
    for group in groups:
        for seed in range(arguments.first, arguments.first + arguments.count):
            yield seed, group


def run(
    rounds: Iterable[Round],
    prepare: Callable[[Path], Attempt],
    outcomes: Iterable[str],
    *,
    heading: str,
    arguments: Namespace,
    most_bytes: float = float("inf"),
    batch: int = BATCH,
) -> None:
    """Make attempts, and print a table of their outcomes; interrupted, of those so far.

    Args:
        rounds: what is tried.
        prepare: returns what makes an attempt, given an empty folder, in a process that began as a
            fork of this one, which must not have asked MLX for anything.
        outcomes: those that are right.
        heading: of the table's first two columns.
        arguments: those of ``parser``.
        most_bytes: of memory that a process may take.
        batch: how many attempts a process makes.

    Raises:
        BenchmarkError: something came out wrong.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, too
    right, begin, attempts = [*outcomes], time.monotonic(), 0
    end = begin + 60 * arguments.minutes
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    left = iter(rounds)
    with suppress(KeyboardInterrupt):
        while (some := [*islice(left, batch)]) and time.monotonic() < end:
            for (_, kinds), (outcome, detail) in zip(some, _batch(some, prepare), strict=False):
                attempts += 1
                for kind in kinds:
                    counts[kind][outcome] += 1
                if outcome not in right and counts[kinds[0]][outcome] <= arguments.show:
                    print(f"{outcome}: {detail}\n", file=sys.stderr, flush=True)
                if time.monotonic() > end:
                    break
    columns = dict.fromkeys([*right, *(name for of in counts.values() for name in of)])
    print(f"| {heading} | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    for kind, of in counts.items():
        print(f"| {kind} | {of.total()} | {' | '.join(str(of[name]) for name in columns)} |")
    total = sum(map(Counter.total, counts.values()))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    seconds = time.monotonic() - begin
    print(f"\n{total} in {attempts} attempts, {seconds:.0f} s, {peak / 1e6:.0f} MB at most")
    if len(columns) > len(right):
        raise BenchmarkError("not all came out right")
    if peak > most_bytes:
        raise BenchmarkError(f"a process took more than {most_bytes / 1e6:.0f} MB")


def asked(question: Callable[[Path], list[str]]) -> list[str]:
    """Return what a function says of an empty folder, in a process of its own."""
    one = [(0, ("",))]
    ((said, _),) = _batch(one, lambda folder: lambda *_: (json.dumps(question(folder)), ""))
    answer: list[str] = json.loads(said)
    return answer


def _batch(
    rounds: Sequence[Round], prepare: Callable[[Path], Attempt]
) -> Iterator[tuple[str, str]]:
    """Yield the outcome of each attempt, and its details."""
    left = list(rounds)
    while left:
        for outcome in _forked(left, prepare):
            left.pop(0)
            yield outcome


def _forked(
    rounds: Sequence[Round], prepare: Callable[[Path], Attempt]
) -> Iterator[tuple[str, str]]:
    """Yield outcomes until a process ends, the last for what ended it before its time."""
    sys.stdout.flush()
    sys.stderr.flush()
    receive, send = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        process = os.fork()
        if not process:
            os.close(receive)
            _attempt(rounds, prepare, Path(folder), send)
        os.close(send)
        number, cause = 0, ""
        with open(receive, "rb", buffering=0) as lines:
            buffer = b""
            try:
                while True:
                    if not select.select([lines], [], [], HANGS_SECONDS)[0]:
                        cause = "hangs"
                        os.kill(process, signal.SIGKILL)
                    if not (data := lines.read(1 << 16)):
                        break
                    *whole, buffer = (buffer + data).split(b"\n")
                    for line in whole:
                        number += 1
                        outcome, detail = json.loads(line)
                        yield outcome, detail
            except BaseException:
                os.kill(process, signal.SIGKILL)
                raise
            finally:
                _, status = os.waitpid(process, 0)
        if number < len(rounds):
            seed, kinds = rounds[number]
            code = os.waitstatus_to_exitcode(status)
            yield cause or f"the process ends with {code}", f"{', '.join(kinds)}, seed {seed}"


def _attempt(
    rounds: Sequence[Round], prepare: Callable[[Path], Attempt], folder: Path, send: int
) -> None:
    """Make attempts, and end this process."""
    try:
        os.setsid()  # an interrupt is for the process that prints
        attempt = prepare(folder)
        for seed, kinds in rounds:
            outcome, detail = attempt(seed, *kinds)
            _write(send, json.dumps([outcome, detail]).encode() + b"\n")
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def _write(number: int, data: bytes) -> None:
    while data:
        data = data[os.write(number, data) :]

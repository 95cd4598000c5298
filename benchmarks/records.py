"""records: damages records of a small project; prints a Markdown table of outcomes.

    python benchmarks/records.py              # 100 of each kind, one at a time
    python benchmarks/records.py --count 10000 --together
    python benchmarks/records.py --checkpoint llama-2 --kinds "memo tokenizers"

A record is a memo, a reference, an action, a manifest, models.lock, doit's database, the build log
or a source's record. After each, doit builds the project: it must come out equal to the byte, or,
of models.lock, or of the record by which build/ is known to be ours, be refused with a message. A
traceback is wrong in any case. Damaged together, a build meets most of the kinds at once,
models.lock excepted, since nothing is built without it. Interrupted, it prints what it has.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from measure import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT / "tests"))

from support import records


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--together", action="store_true", help="several kinds in each build")
    parser.add_argument("--checkpoint", default="llama", help="the kind of checkpoint")
    parser.add_argument("--kinds", nargs="*", help=", ".join(records.KINDS))
    parser.add_argument("--show", type=int, default=3, help="of each way to go wrong")
    told = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    begin = time.monotonic()
    builds = 0
    with tempfile.TemporaryDirectory() as folder:
        project = records.Damaged.create(Path(folder), told.checkpoint)
        with suppress(KeyboardInterrupt):  # so far, then
            for seed, kinds in _rounds(told.kinds or project.kinds(), told):
                outcome = project.attempt(seed, *kinds)
                builds += 1
                for kind in kinds:
                    counts[kind][outcome.outcome] += 1
                wrong = outcome.outcome not in records.OUTCOMES
                if wrong and counts[kinds[0]][outcome.outcome] <= told.show:
                    print(f"{outcome.outcome}: {outcome.detail}\n", file=sys.stderr, flush=True)
    found = dict.fromkeys([*records.OUTCOMES, *(name for of in counts.values() for name in of)])
    print(f"| record | damaged | {' | '.join(found)} |\n|---|---|{'---|' * len(found)}")
    for kind, of in counts.items():
        print(f"| {kind} | {of.total()} | {' | '.join(str(of[name]) for name in found)} |")
    total = sum(map(Counter.total, counts.values()))
    print(f"\n{total} in {builds} builds, {time.monotonic() - begin:.0f} s")
    if found.keys() - set(records.OUTCOMES):
        raise BenchmarkError("not all came out right")


def _rounds(kinds: list[str], told: argparse.Namespace) -> Iterator[tuple[int, list[str]]]:
    """Yield a seed, and the kinds to damage by it, until each kind had its count."""
    alone = [kind for kind in kinds if not told.together or kind == "models.lock"]
    for kind in alone:
        for seed in range(told.first, told.first + told.count):
            yield seed, [kind]
    left = dict.fromkeys([kind for kind in kinds if kind not in alone], told.count)
    seed = told.first
    while left:
        chosen = [kind for kind in left if random.Random(f"{seed} {kind}").random() < 0.8]
        for kind in chosen:
            left[kind] -= 1
        left = {kind: count for kind, count in left.items() if count}
        if chosen:
            yield seed, chosen
        seed += 1


if __name__ == "__main__":
    main()

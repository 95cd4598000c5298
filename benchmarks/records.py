"""records: damages records of a small project, one at a time; prints a Markdown table of outcomes.

    python benchmarks/records.py              # 100 of each kind
    python benchmarks/records.py --count 10000 --kinds models.lock doit.json

A record is a memo, a reference, an action, a manifest, models.lock, doit's database, the build log
or a source's record. After each, doit builds the project: it must come out equal to the byte, or,
of models.lock, or of the record by which build/ is known to be ours, be refused with a message. A
traceback is wrong in any case.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
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
    parser.add_argument("--checkpoint", default="llama", help="the kind of checkpoint")
    parser.add_argument("--kinds", nargs="*", help=", ".join(records.KINDS))
    parser.add_argument("--show", type=int, default=3, help="of each way to go wrong")
    told = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        project = records.Damaged.create(Path(folder), told.checkpoint)
        for kind in told.kinds or project.kinds():
            for seed in range(told.first, told.first + told.count):
                outcome = project.attempt(kind, seed)
                counts[kind][outcome.outcome] += 1
                wrong = outcome.outcome not in records.OUTCOMES
                if wrong and counts[kind][outcome.outcome] <= told.show:
                    print(f"{outcome.outcome}: {outcome.detail}\n", file=sys.stderr, flush=True)
    found = dict.fromkeys([*records.OUTCOMES, *(name for of in counts.values() for name in of)])
    print(f"| record | damaged | {' | '.join(found)} |\n|---|---|{'---|' * len(found)}")
    for kind, of in counts.items():
        print(f"| {kind} | {of.total()} | {' | '.join(str(of[name]) for name in found)} |")
    total = sum(map(Counter.total, counts.values()))
    print(f"\n{total} in {time.monotonic() - begin:.0f} s")
    if found.keys() - set(records.OUTCOMES):
        raise BenchmarkError("not all came out right")


if __name__ == "__main__":
    main()

"""cuts: builds killed, or refused a step by the system, at random; prints a table of outcomes.

    python benchmarks/cuts.py              # 25 of each harm
    python benchmarks/cuts.py --count 1000 --harms SIGKILL EIO

Each build is a process of its own, from nothing or over another build. At one of the files that
it opens, renames, makes or removes it gets a signal, or that step fails with an error of the
system. What is in build/ must then be what was there or what is wanted, whole; no traceback may
be printed; and the next build must come out equal to the byte and leave nothing behind.
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

from support import cuts


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=25, help="of each harm")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--harms", nargs="*", default=cuts.HARMS, help=", ".join(cuts.HARMS))
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        attempts = cuts.Cuts(Path(folder))
        for harm in arguments.harms:
            for seed in range(arguments.first, arguments.first + arguments.count):
                outcome, detail = attempts.attempt(harm, seed)
                counts[harm][outcome] += 1
                if detail:
                    print(f"{detail}\n", file=sys.stderr, flush=True)
    print(
        f"| harm | builds | {' | '.join(cuts.OUTCOMES)} |\n|---|---|{'---|' * len(cuts.OUTCOMES)}"
    )
    for harm, of in counts.items():
        print(f"| {harm} | {of.total()} | {' | '.join(str(of[name]) for name in cuts.OUTCOMES)} |")
    total = sum(map(Counter.total, counts.values()))
    print(f"\n{total} in {time.monotonic() - begin:.0f} s")
    if any(of["wrong"] for of in counts.values()):
        raise BenchmarkError("not all came out right")


if __name__ == "__main__":
    main()

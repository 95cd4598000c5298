"""cuts: builds killed, refused a call of the system, or left without power; prints a table.

    python benchmarks/cuts.py              # 25 of each harm
    python benchmarks/cuts.py --count 1000 --harms SIGKILL power

Each build is a process of its own, from nothing or over another build. At one of its calls of the
system about a file of the project, any from open to fsync, it gets a signal, or that call fails or
is cut short. Or the power goes, there or after the build's end: names and bytes are lost that
nobody synced. What is in build/ must then be what was there or what is wanted, whole, and what is
wanted if the build said so; no traceback may be printed; and the next build must come out equal to
the byte and leave nothing behind. It takes Linux and gcc, for tests/support/hook/faults.c.
Interrupted, it prints what it has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

from measure import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT / "tests"))

from support import faults


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    faults.begin()
    from support import cuts

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=25, help="of each harm")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--harms", nargs="*", default=cuts.HARMS, help=", ".join(cuts.HARMS))
    arguments = parser.parse_args()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name, suppress(KeyboardInterrupt):
        attempts = cuts.Cuts(Path(name))
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

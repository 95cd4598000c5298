"""inputs: damages a checkpoint's files, models.toml and models.lock; prints a table of outcomes.

    python benchmarks/inputs.py                # 1,000 of each kind
    python benchmarks/inputs.py --count 10000 --kinds weights.pth plain/checkpoint/config.json
    python benchmarks/inputs.py --together --kinds plain/checkpoint/{tokenizer.json,README.md}

Each is read in this process: weights must have the tensors and bytes that mx.load or torch.load
finds, or be refused; all others be read or refused with a message. An exception of any other type
would be a traceback. Nothing may take 20 s, nor all of it 1 GiB. Interrupted, it prints what it
has.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from measure import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT / "tests"))

from support import inputs

# torch refuses more than it must of an archive of which all that is read is whole.
HARMLESS = (*inputs.OUTCOMES, "refused by torch alone")


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kinds", nargs="*", help="files, such as weights.pth")
    parser.add_argument("--together", action="store_true", help="all of them at once")
    parser.add_argument("--show", type=int, default=2, help="of each way to go wrong")
    told = parser.parse_args()
    counts: dict[str, Counter[str]] = {}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        files = inputs.Inputs(Path(folder))
        kinds = [*(told.kinds or files.kinds)]
        for group in [kinds] if told.together else [[kind] for kind in kinds]:
            counts |= {kind: Counter() for kind in group}
            for seed in range(told.first, told.first + told.count):
                outcome, detail = files.attempt(seed, *group)
                for kind in group:
                    counts[kind][outcome] += 1
                if outcome not in HARMLESS and counts[group[0]][outcome] <= told.show:
                    print(f"{outcome}: {detail}\n", file=sys.stderr, flush=True)
    found = dict.fromkeys([*HARMLESS, *(name for of in counts.values() for name in of)])
    print(f"| file | damaged | {' | '.join(found)} |\n|---|---|{'---|' * len(found)}")
    for kind, of in counts.items():
        print(f"| {kind} | {of.total()} | {' | '.join(str(of[name]) for name in found)} |")
    total, peak = sum(map(Counter.total, counts.values())), inputs.peak_bytes()
    print(f"\n{total} in {time.monotonic() - begin:.0f} s, peak memory {peak / 1e6:.0f} MB")
    if found.keys() - set(HARMLESS) or peak > 1 << 30:
        raise BenchmarkError("not all came out right")


if __name__ == "__main__":
    main()

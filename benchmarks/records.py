"""records: damages records of a small project; prints a Markdown table of outcomes.

    TMPDIR=/dev/shm python benchmarks/records.py   # 100 of each kind, one at a time
    python benchmarks/records.py --count 10000 --together --minutes 30
    python benchmarks/records.py --checkpoint llama-2 --kinds "memo tokenizers"

A record is a memo, a reference, an action, a manifest, models.lock, doit's database, the build log
or a source's record. After each, doit builds the project: it must come out equal to the byte, or,
of models.lock, or of the record by which build/ is known to be ours, be refused with a message. A
traceback is wrong in any case. Damaged together, a build meets most of the kinds at once,
models.lock excepted, since nothing is built without it.
"""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import tally
from measure import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from support import records


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = tally.parser(__doc__, count=100, what="kind")
    parser.add_argument("--together", action="store_true", help="several kinds in each build")
    parser.add_argument("--checkpoint", default="llama", help="the kind of checkpoint")
    parser.add_argument("--kinds", nargs="*", help=", ".join(records.KINDS))
    arguments = parser.parse_args()

    def prepare(folder: Path) -> tally.Attempt:
        attempt: tally.Attempt = records.Damaged.create(folder, arguments.checkpoint).attempt
        return attempt

    def kinds(folder: Path) -> list[str]:
        return list(records.Damaged.create(folder, arguments.checkpoint).kinds())

    rounds = _rounds(arguments.kinds or tally.asked(kinds), arguments)
    tally.run(rounds, prepare, records.OUTCOMES, heading="record | damaged", arguments=arguments)


def _rounds(kinds: list[str], arguments: Namespace) -> Iterator[tally.Round]:
    """Yield a seed, and the kinds to damage by it, until each kind had its count."""
    alone = [kind for kind in kinds if not arguments.together or kind == "models.lock"]
    yield from tally.rounds([[kind] for kind in alone], arguments)
    left = dict.fromkeys([kind for kind in kinds if kind not in alone], arguments.count)
    seed = arguments.first
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

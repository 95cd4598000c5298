"""cuts: builds killed, refused a call of the system, or left without power; prints a table.

    python benchmarks/cuts.py              # 25 of each harm
    python benchmarks/cuts.py --count 1000 --harms SIGKILL power

Each build is a process of its own, from nothing or over another build, of a checkpoint in a folder
or on a hub, and with a remote store or without: a folder, which comes to harm as the project does,
or a server. At one of its calls of the system about a file of the project, any from open to fsync,
it gets a signal, or that call fails or is cut short. Or the power goes, there or after the build's
end: names and bytes are lost that nobody synced. What is in build/ must then be what was there or
what is wanted, whole, and what is wanted if the build said so; no traceback may be printed; and the
next build must come out equal to the byte and leave nothing behind, and so must one by what is in
the store then. It takes Linux and gcc, for tests/support/hook/faults.c. Interrupted, it prints what
it has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tally
from measure import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from support import faults


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    faults.begin()
    from support import cuts

    parser = tally.parser(__doc__, count=25, what="harm")
    parser.add_argument("--harms", nargs="*", default=cuts.HARMS, help=", ".join(cuts.HARMS))
    parser.add_argument("--sources", nargs="*", default=cuts.SOURCES, help=", ".join(cuts.SOURCES))
    arguments = parser.parse_args()
    rounds = tally.rounds([[harm] for harm in arguments.harms], arguments)

    def prepare(folder: Path) -> tally.Attempt:
        attempts = cuts.Cuts(folder, sources=tuple(arguments.sources))
        return lambda seed, harm: attempts.attempt(harm, seed)

    right = [outcome for outcome in cuts.OUTCOMES if outcome != "wrong"]
    tally.run(rounds, prepare, right, heading="harm | builds", arguments=arguments)


if __name__ == "__main__":
    main()

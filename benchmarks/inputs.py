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

import sys
import tempfile
from pathlib import Path

import tally
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
    parser = tally.parser(__doc__, count=1000, what="kind")
    parser.add_argument("--kinds", nargs="*", help="files, such as weights.pth")
    parser.add_argument("--together", action="store_true", help="all of them at once")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = inputs.Inputs(Path(folder))
        kinds = [*(arguments.kinds or files.kinds)]
        groups = [kinds] if arguments.together else [[kind] for kind in kinds]
        rounds = tally.rounds(groups, arguments)
        try:
            tally.run(
                rounds, files.attempt, HARMLESS, heading="file | damaged", show=arguments.show
            )
        finally:
            peak = inputs.peak_bytes()
            print(f"peak memory {peak / 1e6:.0f} MB")
    if peak > 1 << 30:
        raise BenchmarkError("it took more than 1 GiB")


if __name__ == "__main__":
    main()

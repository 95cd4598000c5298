"""unseen: weights that change under the same size, time and inode; prints a Markdown table.

    TMPDIR=/dev/shm python benchmarks/unseen.py            # 50 of each kind
    python benchmarks/unseen.py --count 500 --kinds pth bin

Between two builds, or at a moment of one, on disks with a ctime and on such as have none. What is
built must be made of the files as they were or as they are, never of both, or be an error that the
next build, or mlx-make lock and that, puts right.
"""

from __future__ import annotations

import sys

import tally
from measure import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from support import unseen


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong; all that did was printed.
    """
    parser = tally.parser(__doc__, count=50, what="kind")
    parser.add_argument("--kinds", nargs="*", default=unseen.KINDS, help=", ".join(unseen.KINDS))
    arguments = parser.parse_args()
    tally.run(
        tally.rounds([[kind] for kind in arguments.kinds], arguments),
        lambda folder: unseen.Unseen(folder).attempt,
        unseen.OUTCOMES,
        heading="weights | changes",
        arguments=arguments,
    )


if __name__ == "__main__":
    main()

"""phases: where a build's time goes, and that it is the same build in any number of threads.

    python benchmarks/phases.py CHECKPOINT                               # as many as doit takes
    python benchmarks/phases.py CHECKPOINT --threads 1 4 16 --repeats 5

A checkpoint is built to 4 bits from nothing, then to 8 bits beside what the cache has by then; on
a GPU where MLX has one. Prints a Markdown table, medians by number of threads: the whole command,
and of it, by the build log, the start until the first layer, the layers, packing after them, and
the end. The weight files of all builds must be equal to the byte.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from measure import BenchmarkError, measure

BITS = {4: "4 bit, from nothing", 8: "8 bit after 4 bit"}


class Phases(NamedTuple):
    """Seconds."""

    wall: float
    start: float
    layers: float
    packing: float
    end: float


def build(folder: Path, checkpoint: Path, bits: int, threads: int | None) -> tuple[Phases, str]:
    """Builds a model; what it took, and the digest of its weight files."""
    models = folder / "models.toml"
    models.write_text(f'[models.model]\nsource = "{checkpoint}"\nquantize = {{ bits = {bits} }}\n')
    count = [] if threads is None else ["-n", str(threads)]
    os.sync()  # which ``measure`` does first, too: then it has nothing to do
    begin = time.time()
    wall = measure([sys.executable, "-m", "doit", *count, f"models={models}"]).seconds
    entries = [json.loads(line) for line in (folder / ".mlx-make" / "log.jsonl").open()]
    entries = [entry for entry in entries if entry["run"] == entries[-1]["run"]]
    ends = defaultdict(list)
    for entry in entries:
        ends[entry["task"].startswith("pack:")].append(entry["start"] + entry["seconds"])
    first = min(entry["start"] for entry in entries)
    marks = [begin, first, max(ends[False]), *ends[True], begin + wall]
    digest = hashlib.sha256()
    for path in sorted((folder / "build" / "model").glob("*.safetensors")):
        digest.update(path.read_bytes())
    steps = [after - before for before, after in itertools.pairwise(marks)]
    return Phases(wall, *steps), digest.hexdigest()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[None])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    phases_of: dict[tuple[int, int | None], list[Phases]] = defaultdict(list)
    digests: dict[int, str] = {}
    for _ in range(arguments.repeats):
        for threads in arguments.threads:
            # What a build replaced may still be on its way out of there.
            with tempfile.TemporaryDirectory(
                dir=arguments.scratch, ignore_cleanup_errors=True
            ) as folder:
                for bits in BITS:
                    phases, digest = build(
                        Path(folder), arguments.checkpoint.resolve(), bits, threads
                    )
                    phases_of[bits, threads].append(phases)
                    if digests.setdefault(bits, digest) != digest:
                        raise BenchmarkError(f"{bits} bits in {threads} threads: other bytes")
    print("| what | threads | wall, s | start | layers | packing | end | sha256 |")
    print("|---|---|---|---|---|---|---|---|")
    for (bits, threads), all_phases in sorted(phases_of.items(), key=lambda item: item[0][0]):
        medians = [f"{statistics.median(each):.2f}" for each in zip(*all_phases, strict=True)]
        cells = [BITS[bits], threads or "doit's", *medians, digests[bits][:16]]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()

"""remote: how fast blobs go to and from a remote store, beside obstore alone.

One S3 server on loopback (rclone), the same objects, the same run: each way is measured in turn,
as often as is asked for, and the medians are compared. obstore reads and writes what it is
given and checks nothing; the remote store checks every byte against its BLAKE3.

    python benchmarks/remote.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import obstore
from measure import ROOT, BenchmarkError
from obstore.store import S3Store

from cache.remote.content import blake3_of
from cache.remote.remote import Remote

MIB = 1 << 20
SETS = {"64 blobs of 1 MiB": [MIB] * 64, "8 of 32 MiB": [32 * MIB] * 8, "1 of 512 MiB": [512 * MIB]}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    sys.path.insert(0, str(ROOT / "tests"))
    from support import servers

    print("| objects | direction | obstore MB/s | remote MB/s | ratio |\n|---|---|---|---|---|")
    for title, sizes in SETS.items():
        with tempfile.TemporaryDirectory() as folder, servers.s3(Path(folder)) as server:
            os.environ |= server.environ
            blobs = [os.urandom(size) for size in sizes]
            measure(title, {blake3_of([blob]): blob for blob in blobs}, server.url, rounds)


class Alone:
    """obstore by itself."""

    def __init__(self, url: str) -> None:
        self.store = S3Store.from_url(f"{url}/alone", client_options={"allow_http": True})

    def push(self, blobs: dict[str, bytes]) -> None:
        """Put all blobs there."""
        for name, blob in blobs.items():
            obstore.put(self.store, name, blob)

    def fetch(self, blobs: dict[str, bytes]) -> None:
        """Get all blobs from there."""
        for name, blob in blobs.items():
            if sum(len(piece) for piece in obstore.get(self.store, name)) != len(blob):
                raise BenchmarkError(f"{name} is not whole")


class Ours:
    """What mlx-make makes of it, `Remote`."""

    def __init__(self, url: str) -> None:
        self.remote = Remote(f"{url}/ours", warn=sys.exit)

    def push(self, blobs: dict[str, bytes]) -> None:
        """Put all blobs there."""
        for name, blob in blobs.items():
            chunks = [memoryview(blob)[at : at + 8 * MIB] for at in range(0, len(blob), 8 * MIB)]
            self.remote.push(name, len(blob), chunks, replace=True)

    def fetch(self, blobs: dict[str, bytes]) -> None:
        """Get all blobs from there."""
        for name, blob in blobs.items():
            for _ in self.remote.fetch(name, len(blob)):
                pass


def measure(title: str, blobs: dict[str, bytes], url: str, rounds: int) -> None:
    """Print the rows of one set of objects."""
    alone, ours = Alone(url), Ours(url)
    total = sum(map(len, blobs.values()))
    for direction in ("push", "fetch"):
        one, other = (partial(getattr(way, direction), blobs) for way in (alone, ours))
        alone_seconds, our_seconds = medians(one, other, rounds)
        print(
            f"| {title} | {direction} | {total / alone_seconds / 1e6:.0f} "
            f"| {total / our_seconds / 1e6:.0f} | {alone_seconds / our_seconds:.2f} |",
            flush=True,
        )
    ours.remote.close()


def medians(
    first: Callable[[], None], second: Callable[[], None], rounds: int
) -> tuple[float, float]:
    """Return the median seconds of two ways, run in turn after one round that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for way, taken in zip((first, second), seconds, strict=True):
            begin = time.perf_counter()
            way()
            taken.append(time.perf_counter() - begin)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


if __name__ == "__main__":
    main()

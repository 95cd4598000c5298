"""many_blobs: what looking after a cache of millions of blobs takes; prints a Markdown table.

    python benchmarks/many_blobs.py                      # 2 million blobs, an inode each
    python benchmarks/many_blobs.py --blobs 100000 --scratch /mnt

The blobs are of 8 bytes under their own digests, and an action's entry names each ten of them: what
layers of tiny tensors would leave. Measured, each by a process of its own: `doit cache stats`,
`doit cache verify --quick`, `doit cache gc` with nothing to remove, with a cap of half of it, and
with one that nothing is within. A file system that keeps small files in their inodes
(`mkfs.ext4 -O inline_data`) needs no block for each.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from measure import ROOT, measure

sys.path.insert(0, str(ROOT))

from cache.digest import digest
from cache.folder import claim
from cache.records.manifests import Action, Manifest, Tensor

IN_AN_ACTION = 10
COMMANDS = (
    "stats",
    "verify --quick",
    "gc",
    "gc --max-size {half} --dry-run",
    "gc --max-size {half}",
    "gc --max-size 1",
)


def fill(cache: Path, blobs: int) -> int:
    """Write a cache; return the bytes of its files."""
    claim(cache)
    for folder in ("blobs", "actions"):
        for number in range(256):
            (cache / folder / f"{number:02x}").mkdir(parents=True)
    size = 0
    for first in range(0, blobs, IN_AN_ACTION):
        tensors = {}
        for number in range(first, min(first + IN_AN_ACTION, blobs)):
            data = number.to_bytes(8, "little")
            key = digest(data)
            with open(f"{cache}/blobs/{key[:2]}/{key[2:]}", "xb", buffering=0) as file:
                file.write(data)
            tensors[f"{number}"] = Tensor("uint8", (len(data),), key)
        action = Action("cast", 1, {"first": first}, {})
        entry = Manifest(action, tensors).to_bytes()
        (cache / "actions" / action.key[:2] / f"{action.key[2:]}.json").write_bytes(entry)
        size += len(entry) + sum(tensor.nbytes for tensor in tensors.values())
    return size


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blobs", type=int, default=2_000_000)
    parser.add_argument("--scratch", type=Path, help="default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        (work / "checkpoint").mkdir()
        (work / "models.toml").write_text('[models.model]\nsource = "checkpoint"\n')
        cache = work / ".mlx-make" / "cache"
        size = fill(cache, arguments.blobs)
        print("| blobs | command | wall, s | CPU, s | peak memory, MB |")
        print("|---|---|---|---|---|")
        for command in COMMANDS:
            called = command.format(half=size // 2)
            doit = [sys.executable, "-m", "doit", "cache", *called.split()]
            usage = measure([*doit, f"models={work / 'models.toml'}"])
            cells = [f"{arguments.blobs:,}", f"`doit cache {command}`", f"{usage.seconds:.1f}"]
            cells += [f"{usage.processor:.1f}", f"{usage.peak_rss / 1e6:,.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        shutil.rmtree(cache)


if __name__ == "__main__":
    main()

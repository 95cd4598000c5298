"""many_blobs: what looking after a cache of millions of blobs takes; prints a Markdown table.

    python benchmarks/many_blobs.py                      # 2 million blobs, an inode each
    python benchmarks/many_blobs.py --blobs 100000 --scratch /mnt
    python benchmarks/many_blobs.py --blobs 0 --references 200000    # that lie in weight files

The blobs are of 8 bytes under their own digests, and an action's entry names each ten of them: what
layers of tiny tensors would leave. References name their bytes in containers, as those of a model's
weight files do, 10,000 in each, and no entry names them. Measured, each by a process of its own:
`doit cache stats`, `doit cache verify --quick`, `doit cache gc` with nothing to remove, with a cap
of half of it, and with one that nothing is within. A file system that keeps small files in their
inodes (`mkfs.ext4 -O inline_data`) needs no block for each.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from measure import ROOT, measure

sys.path.insert(0, str(ROOT))

from cache.blobs import CONTAINERS
from cache.digest import digest
from cache.folder import claim
from cache.records.manifests import Action, Manifest, Tensor
from cache.records.sealed import seal

IN_AN_ACTION = 10
IN_A_CONTAINER = 10_000
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


def refer(cache: Path, references: int) -> int:
    """Write references, and the containers in which their bytes lie; return the bytes of these."""
    for first in range(0, references, IN_A_CONTAINER):
        name = f"{first:032x}"
        numbers = range(first, min(first + IN_A_CONTAINER, references))
        data = [b"reference" + number.to_bytes(7, "little") for number in numbers]
        (cache / "blobs" / CONTAINERS).mkdir(exist_ok=True)
        (cache / "blobs" / CONTAINERS / name).write_bytes(b"".join(data))
        for at, each in enumerate(data):
            key = digest(each)
            record = seal(key, [[f"{CONTAINERS}/{name}", at * len(each), len(each)]])
            with open(f"{cache}/blobs/{key[:2]}/{key[2:]}.parts", "xb", buffering=0) as file:
                file.write(record)
    return 16 * references


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blobs", type=int, default=2_000_000)
    parser.add_argument("--references", type=int, default=0)
    parser.add_argument("--scratch", type=Path, help="default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        work = Path(scratch)
        (work / "checkpoint").mkdir()
        (work / "models.toml").write_text('[models.model]\nsource = "checkpoint"\n')
        cache = work / ".mlx-make" / "cache"
        size = fill(cache, arguments.blobs) + refer(cache, arguments.references)
        print("| blobs and references | command | wall, s | CPU, s | peak memory, MB |")
        print("|---|---|---|---|---|")
        for command in COMMANDS:
            called = command.format(half=size // 2)
            doit = [sys.executable, "-m", "doit", "cache", *called.split()]
            usage = measure([*doit, f"models={work / 'models.toml'}"])
            count = arguments.blobs + arguments.references
            cells = [f"{count:,}", f"`doit cache {command}`", f"{usage.seconds:.1f}"]
            cells += [f"{usage.processor:.1f}", f"{usage.peak_rss / 1e6:,.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        shutil.rmtree(cache)


if __name__ == "__main__":
    main()

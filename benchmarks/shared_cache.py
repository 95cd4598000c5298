"""shared_cache: checkouts that have one cache folder in common, some of which collect garbage.

    python benchmarks/shared_cache.py                        # 100 checkouts, 8 at a time
    python benchmarks/shared_cache.py --checkouts 300 --together 16

Each checkout builds a tiny Llama, changes its settings, builds it again, and once more as it was
at first; half of them have a checkpoint of their own, whose tensors the cache may refer to. Between
their builds, and beside those of all others, every other one runs `cache gc`, with caps of
different sizes, also of what its own targets need, or `cache verify`; and every fifth is deleted as
soon as it is done, its checkpoint too. No command may fail or print a traceback, and all that is
built must be equal to the byte to what is built alone. Each command is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoint
from measure import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT))

from cache.digest import digest_file

SHAPE = checkpoint.Shape(layers=4, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=512)
SETTINGS = (
    "quantize = { bits = 4 }",
    "quantize = { bits = 8 }",
    'dtype = "float16"\nquantize = { bits = 4 }',
    'dtype = "float16"\nquantize = { bits = 6, group_size = 32 }',
    'dtype = "float32"',
    'quantize = { mode = "mxfp4" }',
)
CARE = (  # of the cache, by those that take care of it
    ["cache", "gc"],
    ["cache", "gc", "--max-size", "100kB"],
    ["cache", "gc", "--max-size", "1B", "--all"],
    ["cache", "verify"],
    ["cache", "gc", "--max-size", "500kB", "--all"],
)
REMOVED = re.compile(r"^removed (\d+)", re.MULTILINE)


class Checkout:
    """A project's folder, whose cache lies in ``cache``."""

    def __init__(self, folder: Path, source: Path, cache: Path) -> None:
        self.folder = folder
        self._source = source
        self._cache = cache
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        folder.mkdir(parents=True)

    def build(self, setting: str) -> str:
        """Build a model, and return a digest of its weights."""
        text = f'[cache]\ndir = "{self._cache}"\n[models.m]\nsource = "{self._source}"\n{setting}\n'
        (self.folder / "models.toml").write_text(text)
        self.run([])
        self.counts["builds"] += 1
        weights = self.folder / "build" / "m" / "model.safetensors"
        return digest_file(weights) if weights.exists() else "nothing"

    def run(self, arguments: list[str]) -> None:
        """Run a command, and take note of what is wrong with it."""
        command = [sys.executable, "-m", "doit", *arguments]
        done = subprocess.run(
            [*command, f"models={self.folder / 'models.toml'}"],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        if done.returncode or "Traceback" in said:
            self.wrong.append(f"{' '.join(arguments) or 'a build'}: {said[-2000:]}")
        self.counts["files removed"] += sum(map(int, REMOVED.findall(done.stdout)))

    def again(self) -> int:
        """Return how many of its tasks ran since what they had made was gone."""
        log = self.folder / ".mlx-make" / "log.jsonl"
        return sum("blob lost" in line for line in log.read_text().splitlines())


def settings_of(number: int) -> Iterator[str]:
    """Yield what a checkout builds, one after another."""
    first, second = (SETTINGS[(number + more) % len(SETTINGS)] for more in (0, 1 + number % 3))
    yield from (first, second, first)


def work(checkout: Checkout, number: int, expected: dict[str, str]) -> Checkout:
    """Have a checkout build, and perhaps take care of the cache, as its number says."""
    for setting in settings_of(number):
        if checkout.build(setting) != expected[setting]:
            checkout.wrong.append(f"other bytes of: {setting}")
        if number % 2:
            checkout.run(CARE[number // 2 % len(CARE)])
            checkout.counts["gc and verify"] += 1
    checkout.counts["made again"] += checkout.again()
    if number % 5 == 0:
        shutil.rmtree(checkout.folder)
    return checkout


def main() -> None:
    """Run it.

    Raises:
        BenchmarkError: something came out wrong.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkouts", type=int, default=100)
    parser.add_argument("--together", type=int, default=8)
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.together) as pool:
        scratch = Path(folder)
        source = scratch / "checkpoint"
        checkpoint.write_transformers(source, SHAPE, dtype="bfloat16", seed=0)
        alone = Checkout(scratch / "alone", source, scratch / "alone" / "cache")
        expected = {setting: alone.build(setting) for setting in SETTINGS}
        checkouts = []
        for number in range(arguments.checkouts):
            own = scratch / f"{number}" / "checkpoint"
            checkouts.append(
                Checkout(own.parent, own if number % 4 > 1 else source, scratch / "cache")
            )
            if number % 4 > 1:
                shutil.copytree(source, own)
        numbers = range(len(checkouts))
        done = pool.map(work, checkouts, numbers, [expected] * len(checkouts))
        counts: Counter[str] = sum((each.counts for each in done), Counter())
        wrong = [*alone.wrong, *(fact for each in checkouts for fact in each.wrong)]
    print("| checkouts | at a time | " + " | ".join(counts) + " | failed or wrong |")
    print("|---|---|" + "---|" * (len(counts) + 1))
    print(f"| {len(checkouts)} | {arguments.together} | "
          f"{' | '.join(map(str, counts.values()))} | {len(wrong)} |")  # fmt: skip
    print(f"\n{time.monotonic() - begin:.0f} s")
    if wrong:
        raise BenchmarkError("\n".join(wrong[:10]))


if __name__ == "__main__":
    main()

"""flips: a bit of each object of a remote store is flipped in turn; prints a Markdown table.

    python benchmarks/flips.py                # without the checkpoint, and without a signing key
    python benchmarks/flips.py --checkpoint   # with it: what is corrupt is made again
    python benchmarks/flips.py --signed

One machine builds a small Llama to 4 bits into an empty remote, a server on loopback. Then, for
each object that lies there, one bit of it is flipped, and a machine with an empty cache builds the
same models.toml by the same models.lock. What it builds must be equal to the byte, or nothing at
all and an error: anything else ends the run. Then the remote is put back as it was.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from measure import ROOT, BenchmarkError

sys.path.insert(0, str(ROOT / "tests"))

from support import checkpoints, inside, servers

MODELS = """\
[models.model]
source = "checkpoint"
dtype = "float16"
quantize = { bits = 4 }
"""
OUTCOMES = ("not asked for", "right, none made again", "right, some made again", "an error")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--checkpoint", action="store_true", help="the second machine has it")
    parser.add_argument("--signed", action="store_true", help="set a signing key")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, servers.faulty() as server:
        os.environ["MLX_MAKE_CACHE_REMOTE"] = f"http://127.0.0.1:{server.port}/store"
        if arguments.signed:
            os.environ["MLX_MAKE_SIGNING_KEY"] = "a key"
        one = Path(folder) / "one"
        checkpoints.make("llama", one / "checkpoint", num_hidden_layers=arguments.layers)
        (one / "models.toml").write_text(MODELS)
        inside.doit(one, "-o", os.devnull)
        begin = time.monotonic()
        outcomes_of = flip_each(one, server, with_checkpoint=arguments.checkpoint)
        seconds = time.monotonic() - begin
    print(f"| object | number | {' | '.join(OUTCOMES)} |\n|---|---|{'---|' * len(OUTCOMES)}")
    for kind, outcomes in outcomes_of.items():
        counts = " | ".join(str(outcomes[name]) for name in OUTCOMES)
        print(f"| {kind} | {outcomes.total()} | {counts} |")
    print(f"\n{sum(map(Counter.total, outcomes_of.values()))} objects, {seconds:.0f} s")


def flip_each(
    one: Path, server: servers.Faulty, *, with_checkpoint: bool
) -> Mapping[str, Counter[str]]:
    """Return how often a build on another machine came out how, by the kind of object.

    Raises:
        BenchmarkError: a wrong output, or half of one.
    """
    expected, whole = contents(one), dict(server.objects)
    outcomes_of: dict[str, Counter[str]] = defaultdict(Counter)
    for number, (path, data) in enumerate(sorted(whole.items())):
        bit = int(hashlib.sha256(path.encode()).hexdigest(), 16) % (8 * len(data))
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        server.objects = whole | {path: bytes(wrong)}
        server.requests.clear()
        two = one.parent / f"two-{number}"
        two.mkdir()
        for name in ("models.toml", "models.lock"):
            shutil.copy(one / name, two)
        memos = ".mlx-make/cache/memos"  # only to save seconds of imports: of no stage
        for kind in ("architectures", "tokenizers"):
            if (one / memos / kind).exists():
                shutil.copytree(one / memos / kind, two / memos / kind)
        if with_checkpoint:
            (two / "checkpoint").symlink_to(one / "checkpoint")
        output = two / "output"
        done = inside.doit(two, "--locked", "-o", str(output), expect=None)
        said = done.stderr + (output.read_text() if output.exists() else "")
        if done.returncode and (contents(two) or "ERROR" not in said or "Traceback" in said):
            raise BenchmarkError(f"{path}, bit {bit}: {said}")
        if not done.returncode and contents(two) != expected:
            raise BenchmarkError(f"{path}, bit {bit}: the output is wrong")
        asked = any(it.path == path and it.method == "GET" for it in server.requests)
        made_again = any(not task.startswith("extract") for task in done.computed)
        outcome = OUTCOMES[3 if done.returncode else 2 if made_again else 1 if asked else 0]
        outcomes_of["record" if "/records/" in path else "blob"][outcome] += 1
        shutil.rmtree(two)
        gc.collect()  # and with it connections
    return outcomes_of


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a machine's built model."""
    return {path.name: path.read_bytes() for path in (folder / "build" / "model").glob("*")}


if __name__ == "__main__":
    main()

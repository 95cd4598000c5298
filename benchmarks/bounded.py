"""A model that is calibrated, rounded by GPTQ and evaluated within a limit of memory; and killed.

Random weights of any shape, by default one block of 8 B parameters' widths: what is held at once is
of one block, or of the embeddings, so more blocks take longer and no more memory. With --kills the
same is built once more, killed so often, at random moments, and compared with the first, byte by
byte: the model and what was said of it.

    python benchmarks/bounded.py /tmp/scratch
    python benchmarks/bounded.py /tmp/scratch --hidden 512 --intermediate 1408 --kills 10
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
from measure import ROOT, PeakMemory

TASKS = ("activations:model", "pack:model", "evaluate:model")
LONGEST_SECONDS = 24 * 3600


def _project(folder: Path, source: Path, asked: argparse.Namespace) -> None:
    folder.mkdir()
    lines = [
        f'[build]\nmemory = "{asked.memory}"',
        f"[quality]\nsamples = {asked.samples}\nsequence_length = {asked.sequence_length}",
        f'[models.model]\nsource = "{source}"\ndtype = "float32"\ndevice = "cpu"',
        'quantize = { bits = 4, method = "gptq" }',
    ]
    (folder / "models.toml").write_text("\n".join(lines))


def _run(folder: Path, until: float | None = None) -> tuple[int, PeakMemory, str, float]:
    """Build, and kill that after a while; return status, peaks, what it printed and seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "doit", f"models={folder / 'models.toml'}", *TASKS],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    peak = PeakMemory(process.pid)
    peak.start()
    try:
        printed, _ = process.communicate(timeout=until or LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it began
        printed, _ = process.communicate()
    peak.stop()
    return process.returncode, peak, printed, time.perf_counter() - start


def _made(folder: Path, printed: str) -> dict[str, str]:
    """Return digests of the built model's files, and what was said of it."""
    built = folder / "build" / "model"
    made = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in sorted(built.iterdir())}
    return made | {"evaluate": "".join(re.findall(r"^model: perplexity .*$", printed, re.M))}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scratch", type=Path, help="a folder; what is made in it is removed again")
    checkpoint.add_shape_arguments(parser)
    parser.set_defaults(layers=1, hidden=4096, intermediate=14336, kv_heads=8, vocab=128256)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=16)
    parser.add_argument("--memory", default="4GiB", help="[build] memory (default: 4GiB)")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = asked.scratch / "bounded"
    folder.mkdir(parents=True)
    try:
        _measure(folder, asked)
    finally:
        shutil.rmtree(folder)


def _measure(folder: Path, asked: argparse.Namespace) -> None:
    shape = checkpoint.shape_of(asked)
    source = folder / "checkpoint"
    checkpoint.write_transformers(source, shape, dtype="bfloat16", seed=asked.seed)
    _project(folder / "whole", source, asked)
    status, peak, printed, seconds = _run(folder / "whole")
    if status:
        sys.exit(printed[-3000:])
    print(f"{shape}: {seconds:.0f} s, peak {peak.rss / 1e6:.0f} MB, of that anonymous ", end="")
    print(f"{peak.anonymous / 1e6:.0f} MB; {_made(folder / 'whole', printed)['evaluate']}")
    if not asked.kills:
        return
    _project(folder / "killed", source, asked)
    chance = random.Random(asked.seed)
    kills, moments, most = 0, [], 0
    while kills < asked.kills:
        moment = chance.uniform(1, 1.5 * seconds / asked.kills + 5)
        status, peak, again, _ = _run(folder / "killed", moment)
        most = max(most, peak.rss)
        if status == 0:  # it was done before: begun anew
            shutil.rmtree(folder / "killed")
            _project(folder / "killed", source, asked)
            continue
        if status != -signal.SIGKILL:
            sys.exit(again[-3000:])
        kills += 1
        moments.append(round(moment))
    status, peak, again, _ = _run(folder / "killed")
    if status:
        sys.exit(again[-3000:])
    same = _made(folder / "killed", again) == _made(folder / "whole", printed)
    print(f"killed {kills} times, after {moments} s each: peak {most / 1e6:.0f} MB, ", end="")
    print("the same bytes" if same else "OTHER BYTES")
    sys.exit(not same)


if __name__ == "__main__":
    main()

"""Models that are calibrated, chosen, rounded and evaluated again and again: the same to the bit.

By one thread and by several, BLAS being told of one and of several, each from nothing: what each
stage made, of whatever layer, has the same digest each time.

With --blocks of a model's first blocks alone.

    python benchmarks/repeat.py CHECKPOINT --samples 2 --sequence-length 64
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT
from quality import first_blocks

from cache.records.manifests import Manifest

WAYS = ((1, 1), (2, 2), (8, 4), (2, 1), (1, 2))  # -n, and the threads that BLAS is told of
MODELS = {
    "gptq": '{ bits = 4, method = "gptq" }',
    "awq-4bit": '{ bits = 4, method = "awq" }',
    "budget": "{ target_bpw = 4.5, group_size = 64 }",
}
GROUPS = ("pack", "activations", "sensitivity", "evaluate")


def _made(checkpoint: Path, asked: argparse.Namespace, count: int, threads: int) -> dict[str, str]:
    """Return the digest of each tensor that was made, by target, stage, layer and name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [
            f"[quality]\nsamples = {asked.samples}\nsequence_length = {asked.sequence_length}",
            f"[defaults]\nsource = {json.dumps(str(checkpoint.resolve()))}",
            f'dtype = "float32"\ndevice = "{asked.device}"',
            *(f"[models.{target}]\nquantize = {said}" for target, said in MODELS.items()),
        ]
        (folder / "models.toml").write_text("\n".join(lines))
        doit = [sys.executable, "-m", "doit", "-n", str(count), f"models={folder / 'models.toml'}"]
        done = subprocess.run(
            [*doit, *GROUPS],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{done.stdout}\n{done.stderr}")
        made: dict[str, str] = {}
        for path in sorted((folder / ".mlx-make" / "manifests").rglob("*.json")):
            if manifest := Manifest.at(path):
                where = str(path.relative_to(folder))
                made |= {f"{where} {n}": each.digest for n, each in manifest.tensors.items()}
        return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--blocks", type=int, help="of the model, the first so many alone")
    asked = parser.parse_args()
    first: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        checkpoint: Path = asked.checkpoint
        if asked.blocks:
            checkpoint = Path(name) / "checkpoint"
            first_blocks(asked.checkpoint, checkpoint, asked.blocks)
        for count, threads in WAYS:
            made = _made(checkpoint, asked, count, threads)
            first = first or made
            other = [name for name in {**first, **made} if first.get(name) != made.get(name)]
            said = "the same" if not other else f"{len(other)} OTHERS: {other[:5]}"
            print(f"-n {count}, BLAS of {threads}: {len(made)} tensors, {said}", flush=True)
            if other:
                sys.exit(1)


if __name__ == "__main__":
    main()

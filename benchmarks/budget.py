"""A budget beside uniform bits of the same size, and beside ``mlx_lm.dynamic_quant``, in turn.

The same text to calibrate on; KL divergence on held-out text, of whole models as mlx-lm loads them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from measure import Usage, measure
from quality import PEER, fast_linear, tokens_of

GROUP_SIZE = 64
SCALE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
HEAD = "| | bits/weight | s | CPU s | peak MB | KL |\n|---|---|---|---|---|---|"
HALF = 0.5  # bits per weight more, where 4 and 5 are the candidates
# What is built, in turn: the last has each module tried in the whole model, which takes hours.
TARGETS = ("two", "peer", "uniform", "budget", "one-group-size", "exact")


def _divergence(teacher: Path, folder: Path, tokens: Any) -> float:
    """Return the mean KL divergence of a model from its teacher, nats by the token.

    Of weights as floats: a CPU takes too long for packed ones.
    """
    import mlx.core as mx
    from mlx_lm.utils import dequantize_model, load_model

    models = [load_model(teacher)[0], dequantize_model(load_model(folder)[0])]
    total, count = 0.0, 0
    with fast_linear():
        for row in tokens:
            logits = (model(row[None, :-1]).astype(mx.float32) for model in models)
            said, found = (each - mx.logsumexp(each, axis=-1, keepdims=True) for each in logits)
            nats = mx.sum(mx.exp(said) * (said - found), axis=-1)
            total, count = total + cast("float", nats.sum().item()), count + nats.size
    return total / count


def _project(folder: Path, asked: argparse.Namespace) -> float:
    """Write a models.toml; return the bits per weight that 4 bits have."""
    uniform = 4 + 2 * SCALE_BITS[asked.dtype] / GROUP_SIZE
    two = "[{ bits = 4 }, { bits = 5 }]"
    settings = {
        "plain": "false",
        "uniform": "{ bits = 4 }",
        "budget": f"{{ target_bpw = {uniform} }}",
        "one-group-size": f"{{ target_bpw = {uniform}, group_size = {GROUP_SIZE} }}",
        "two": f"{{ target_bpw = {uniform + HALF}, candidates = {two} }}",
        "exact": f"{{ target_bpw = {uniform + HALF}, candidates = {two}, exact = true }}",
    }
    tables = [
        f"[quality]\nsamples = {asked.samples}\nsequence_length = {asked.sequence_length}",
        f"[defaults]\nsource = {json.dumps(str(asked.checkpoint.resolve()))}",
        f"dtype = {json.dumps(asked.dtype)}\ndevice = {json.dumps(asked.device)}",
        *(f"[models.{name}]\nquantize = {setting}" for name, setting in settings.items()),
    ]
    (folder / "models.toml").write_text("\n".join(tables))
    return uniform


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=SCALE_BITS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS[:-1])
    asked = parser.parse_args()
    import mlx.core as mx

    mx.set_default_device(getattr(mx, asked.device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uniform = _project(folder, asked)
        doit = [sys.executable, "-m", "doit", f"models={folder / 'models.toml'}"]
        measure([*doit, "pack:plain"])
        teacher = folder / "build" / "plain"
        calibration, held_out = tokens_of(teacher, asked)
        mx.save_safetensors(str(folder / "tokens.safetensors"), {"tokens": calibration})
        peer = [sys.executable, "-c", PEER, "dynamic_quant"]
        peer += [str(folder / "tokens.safetensors"), asked.device]
        peer += ["--model", str(teacher), "--mlx-path", str(folder / "build" / "peer")]
        peer += ["--target-bpw", str(uniform + HALF), "--low-bits", "4", "--high-bits", "5"]
        print(HEAD, flush=True)
        for target in asked.targets:
            usage = measure(peer if target == "peer" else [*doit, f"pack:{target}"])
            bits = uniform + (HALF if target in ("two", "peer", "exact") else 0)
            nats = _divergence(teacher, folder / "build" / target, held_out)
            print(_row(target, bits, usage, nats), flush=True)


def _row(target: str, bits: float, usage: Usage, nats: float) -> str:
    return (
        f"| {target} | {bits} | {usage.seconds:.1f} | {usage.processor:.1f} "
        f"| {usage.peak_rss / 1e6:.0f} | {nats:.4f} |"
    )


if __name__ == "__main__":
    main()

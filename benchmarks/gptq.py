"""method = "gptq" beside ``mlx_lm.gptq``: the same text, samples and group size, in turn.

Time, memory, and perplexity on held-out text, as mlx-lm itself measures it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from measure import Usage, measure

# mlx_lm.gptq on tokens of a file, in place of those that it would download.
PEER = """
import sys
import mlx.core as mx
from mlx_lm.quant import gptq
tokens, device = sys.argv.pop(1), sys.argv.pop(1)
mx.set_default_device(getattr(mx, device))
gptq.load_data = lambda *_: mx.load(tokens)["tokens"]
gptq.main()
"""


def _tokens(folder: Path, asked: argparse.Namespace) -> tuple[Any, Any]:
    """Return the tokens to calibrate and evaluate on, as mlx-make cuts them: (samples, tokens)."""
    import mlx.core as mx
    from transformers import AutoTokenizer

    from tasks.core.spec import Quality
    from tasks.quality import text

    tokenizer = AutoTokenizer.from_pretrained(folder)
    cut = {"samples": asked.samples, "length": asked.sequence_length, "seed": 0}
    texts = cast("list[list[str]]", [text.calibration(Quality()), text.evaluation(Quality())])
    calibration, held_out = (mx.array(text.windows(each, tokenizer, **cut)) for each in texts)
    return calibration[:, :-1], held_out  # of the last of a sequence mlx-make needs nothing


def _perplexity(folder: Path, tokens: Any) -> float:
    from mlx_lm.perplexity import eval_ppl
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        perplexity: float = eval_ppl(model, tokens, batch_size=1)[0]
    return perplexity


def _project(folder: Path, asked: argparse.Namespace) -> None:
    """Write a models.toml: as stored, rounded to nearest, and by GPTQ in groups of two sizes."""
    rest = '[{ match = "*embed_tokens", bits = 6 }]'  # mlx_lm.gptq's own, of what is no Linear
    settings = {
        "plain": "false",
        "nearest": f"{{ bits = {asked.bits}, group_size = {asked.group_size}, rules = {rest} }}",
        "gptq": f"{{ bits = {asked.bits}, group_size = {asked.group_size}, "
        f'method = "gptq", rules = {rest} }}',
        "finer": f'{{ bits = {asked.bits}, group_size = 32, method = "gptq", rules = {rest} }}',
    }
    tables = [
        f"[quality]\nsamples = {asked.samples}\nseed = 0",
        f"sequence_length = {asked.sequence_length}",
        f"[defaults]\nsource = {json.dumps(str(asked.checkpoint.resolve()))}",
        f"device = {json.dumps(asked.device)}",
        *(f"[models.{name}]\nquantize = {setting}" for name, setting in settings.items()),
    ]
    (folder / "models.toml").write_text("\n".join(tables))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--perplexity", action=argparse.BooleanOptionalAction, default=True)
    asked = parser.parse_args()
    import mlx.core as mx

    mx.set_default_device(getattr(mx, asked.device))
    usages: dict[str, Usage] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _project(folder, asked)
        calibration, held_out = _tokens(asked.checkpoint, asked)
        mx.save_safetensors(str(folder / "tokens.safetensors"), {"tokens": calibration})
        doit = [sys.executable, "-m", "doit"]
        doit += [f"models={folder / 'models.toml'}"]
        usages["mlx-make, gptq"] = measure([*doit, "pack:gptq"])
        usages["then another group size"] = measure([*doit, "pack:finer"])
        peer = [sys.executable, "-c", PEER, str(folder / "tokens.safetensors"), asked.device]
        peer += [
            "--model",
            str(asked.checkpoint.resolve()),
            "--mlx-path",
            str(folder / "build" / "peer"),
        ]
        peer += ["--bits", str(asked.bits), "--group-size", str(asked.group_size)]
        usages["mlx_lm.gptq"] = measure(peer)
        base = usages["mlx_lm.gptq"]
        print("| | s | of the peer's | peak MB | of the peer's |\n|---|---|---|---|---|")
        for what, usage in usages.items():
            print(
                f"| {what} | {usage.seconds:.1f} | {usage.seconds / base.seconds:.2f} "
                f"| {usage.peak_rss / 1e6:.0f} | {usage.peak_rss / base.peak_rss:.2f} |"
            )
        if asked.perplexity:
            measure([*doit, "pack:nearest", "pack:plain"])
            print("\n| | perplexity |\n|---|---|")
            for target in ("plain", "nearest", "gptq", "finer", "peer"):
                print(f"| {target} | {_perplexity(folder / 'build' / target, held_out):.3f} |")


if __name__ == "__main__":
    main()

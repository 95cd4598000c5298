"""Calibrated quantization beside mlx-lm's: the same text, samples and group size, in turn.

``method = "gptq"`` beside ``mlx_lm.gptq``, ``method = "awq"`` beside ``mlx_lm.awq``: time of the
wall and of the processor, peak memory, perplexity on held-out text as mlx-lm itself measures it.
With --rounds each runs so often, ours and the peer's in turn and from nothing: medians are shown.
With --blocks of a model's first blocks alone, of which perplexity says nothing. With --peer-blocks
1 2 the peer does the first block, and the first two, and a line through both says what all take.
On a GPU, what MLX's arrays held at most is shown beside the memory of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast
from unittest import mock

from measure import measure

# Notes what MLX's arrays held at most, as a process ends.
NOTED = """
import atexit, os, sys
import mlx.core as mx
def note():
    with open(os.environ["ARRAYS_PEAK"], "w") as file:
        file.write(str(mx.get_peak_memory()))
if "ARRAYS_PEAK" in os.environ:
    atexit.register(note)
"""
OURS = f"""{NOTED}
import runpy
runpy.run_module("doit", run_name="__main__")
"""
# The peer on tokens of a file, in place of those that it would download.
PEER = f"""{NOTED}
import importlib
method, tokens, device = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
mx.set_default_device(getattr(mx, device))
peer = importlib.import_module(f"mlx_lm.quant.{{method}}")
peer.load_data = lambda *_, **__: mx.load(tokens)["tokens"]
os.chdir(os.path.dirname(tokens))  # one writes what it found out to where it is called
peer.main()
"""
METHODS = ("gptq", "awq")
# How the peers round embeddings, which both leave to the nearest.
EMBEDDINGS = {"gptq": {"bits": 6}, "awq": {"bits": 4, "group_size": 32}}


class Cost(NamedTuple):
    """What a run takes.

    Attributes:
        seconds: of wall.
        processor: seconds of processors.
        peak: of memory, MB.
        arrays: MB that MLX's arrays held at most, on a GPU.
    """

    seconds: float
    processor: float
    peak: float
    arrays: float = 0.0

    def beyond(self, few: Cost, blocks: float) -> Cost:
        """Return what more blocks take, by a line through this and a run of fewer.

        Args:
            few: the run of fewer.
            blocks: how many more, for each by which this has more than that.
        """
        return Cost(*(now + blocks * (now - then) for now, then in zip(self, few, strict=True)))


HEADS = ("wall s", "processor s", "peak MB", "arrays MB")


def tokens_of(folder: Path, asked: argparse.Namespace) -> tuple[Any, Any]:
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


@contextlib.contextmanager
def fast_linear() -> Iterator[None]:
    """Have NumPy multiply on a CPU: its BLAS is 30 times as fast as that of MLX's wheels."""
    import mlx.core as mx

    from tasks.tensors import blas

    nn: Any = importlib.import_module("mlx.nn")
    with contextlib.ExitStack() as stack:
        if mx.default_device() == mx.Device(mx.cpu):
            for kind, name in ((nn.Linear, "__call__"), (nn.Embedding, "as_linear")):
                stack.enter_context(mock.patch.object(kind, name, blas.linear))
        yield


def _perplexity(folder: Path, tokens: Any) -> float:
    """Return mlx-lm's perplexity, of weights as floats: a CPU takes too long for packed ones."""
    from mlx_lm.perplexity import eval_ppl
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(folder)
    with contextlib.redirect_stdout(io.StringIO()), fast_linear():
        perplexity: float = eval_ppl(dequantize_model(model), tokens, batch_size=1)[0]
    return perplexity


def _project(folder: Path, asked: argparse.Namespace) -> None:
    """Write a models.toml: as stored, by each method, rounded to nearest, and in other groups."""
    common: dict[str, Any] = {"bits": asked.bits, "group_size": asked.group_size}
    settings: dict[str, str] = {"plain": "false"}
    for method, embeddings in EMBEDDINGS.items():
        rules = [{"match": "*embed_tokens", **embeddings}]
        settings[f"nearest-{method}"] = _toml({**common, "rules": rules})
        settings[f"by-{method}"] = _toml({**common, "method": method, "rules": rules})
        other = {"group_size": 128 if asked.group_size == 32 else 32}
        settings[f"{method}-again"] = _toml({**common, **other, "method": method, "rules": rules})
    tables = [
        f"[quality]\nsamples = {asked.samples}\nseed = 0",
        f"sequence_length = {asked.sequence_length}",
        f"[defaults]\nsource = {json.dumps(str(asked.checkpoint.resolve()))}",
        f"device = {json.dumps(asked.device)}",
        *(f"[models.{name}]\nquantize = {setting}" for name, setting in settings.items()),
    ]
    (folder / "models.toml").write_text("\n".join(tables))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(each)}' for key, each in value.items())} }}"
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else json.dumps(value)


def _peer(method: str, checkpoint: Path, folder: Path, asked: argparse.Namespace) -> list[str]:
    device = "gpu" if asked.device == "gpu" else "cpu"
    peer = [sys.executable, "-c", PEER, method, str(folder / "tokens.safetensors"), device]
    peer += ["--model", str(checkpoint.resolve()), "--bits", str(asked.bits)]
    peer += ["--group-size", str(asked.group_size)]
    return [*peer, "--mlx-path", str(folder / "build" / f"peer-{method}")]


def _cost(command: Sequence[str], folder: Path, asked: argparse.Namespace) -> Cost:
    peak = folder / "arrays-peak"
    environ = {"ARRAYS_PEAK": str(peak)} if asked.device == "gpu" else {}
    usage = measure(command, **environ)
    arrays = int(peak.read_text()) / 1e6 if environ else 0.0
    return Cost(usage.seconds, usage.processor, usage.peak_rss / 1e6, arrays)


def _cost_of_peer(method: str, folder: Path, asked: argparse.Namespace) -> Cost:
    """Return what the peer takes: of the model, or as two of its first blocks' parts say."""
    if not asked.peer_blocks:
        return _cost(_peer(method, asked.checkpoint, folder, asked), folder, asked)
    few, more = asked.peer_blocks
    costs = []
    for count in (few, more):
        part = folder / f"first-{count}"
        if not part.exists():
            first_blocks(asked.checkpoint, part, count)
        costs.append(_cost(_peer(method, part, folder, asked), folder, asked))
    config = json.loads((asked.checkpoint / "config.json").read_text())
    return costs[1].beyond(costs[0], (config["num_hidden_layers"] - more) / (more - few))


def _forget(folder: Path) -> None:
    """Have the next run begin from nothing."""
    for each in (folder / ".mlx-make", folder / "build"):
        shutil.rmtree(each, ignore_errors=True)
    (folder / "models.lock").unlink(missing_ok=True)


def _compare(method: str, folder: Path, asked: argparse.Namespace, held_out: Any) -> None:
    """Run a method and its peer in turn, and print a table of medians."""
    doit = [sys.executable, "-c", OURS, f"models={folder / 'models.toml'}"]
    costs: dict[str, list[Cost]] = {f"by-{method}": [], f"{method}-again": [], f"peer-{method}": []}
    for _ in range(asked.rounds):
        _forget(folder)
        for name in (f"by-{method}", f"{method}-again"):
            costs[name].append(_cost([*doit, f"pack:{name}"], folder, asked))
        costs[f"peer-{method}"].append(_cost_of_peer(method, folder, asked))
    names = [*costs]
    if asked.perplexity:
        names[:0] = ["plain", f"nearest-{method}"]
        measure([*doit, f"pack:nearest-{method}", "pack:plain"])
    heads = HEADS if asked.device == "gpu" else HEADS[:-1]
    header = f"| | {' '.join(f'{head} | of the peer |' for head in heads)} perplexity |"
    print(f"\n{header}\n|{'---|' * (header.count('|') - 1)}")
    base = _medians(costs[f"peer-{method}"])[: len(heads)]
    for name in names:
        cells = [""] * len(base) * 2
        if name in costs:
            found = _medians(costs[name])[: len(heads)]
            cells = [
                cell
                for own, peers in zip(found, base, strict=True)
                for cell in (f"{own:.1f}", f"{own / peers:.2f}")
            ]
        known = asked.perplexity and not (asked.peer_blocks and name.startswith("peer"))
        said = f"{_perplexity(folder / 'build' / name, held_out):.3f}" if known else ""
        print(f"| {' | '.join([name, *cells, said])} |", flush=True)


def _medians(costs: Sequence[Cost]) -> Cost:
    return Cost(*map(median, zip(*costs, strict=True)))


def first_blocks(source: Path, folder: Path, count: int) -> None:
    """Write a model's first blocks as a checkpoint of their own."""
    import mlx.core as mx

    folder.mkdir()
    weights: dict[str, mx.array] = {}
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            weights |= cast("dict[str, mx.array]", mx.load(str(path)))
        elif path.is_file() and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": count}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    numbers = {name: re.search(r"\.layers\.(\d+)\.", name) for name in weights}
    kept = {n: weights[n] for n, found in numbers.items() if not found or int(found[1]) < count}
    mx.save_safetensors(str(folder / "model.safetensors"), kept, metadata={"format": "pt"})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--rounds", type=int, default=1, help="how often each runs, in turn")
    parser.add_argument("--blocks", type=int, help="of the model, the first so many alone")
    parser.add_argument(
        "--peer-blocks", nargs=2, type=int, metavar=("FEW", "MORE"), help="what the peer does"
    )
    parser.add_argument("--perplexity", action=argparse.BooleanOptionalAction, default=True)
    asked = parser.parse_args()
    if asked.peer_blocks and not 0 < asked.peer_blocks[0] < asked.peer_blocks[1]:
        parser.error("--peer-blocks takes two numbers, the larger one last")
    import mlx.core as mx

    mx.set_default_device(getattr(mx, asked.device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.blocks:
            first_blocks(asked.checkpoint, folder / "checkpoint", asked.blocks)
            asked.checkpoint = folder / "checkpoint"
        _project(folder, asked)
        calibration, held_out = tokens_of(asked.checkpoint, asked)
        mx.save_safetensors(str(folder / "tokens.safetensors"), {"tokens": calibration})
        for method in asked.methods:
            _compare(method, folder, asked, held_out)


if __name__ == "__main__":
    main()

"""giant: what a checkpoint of Llama 3.1 405B's shape takes where no weight is read.

    python benchmarks/giant.py                  # 1, 10 and 100 targets
    python benchmarks/giant.py --targets 1000   # half a million tasks, 4 GB of scratch

The checkpoint is sparse: safetensors headers with nothing behind them, 126 layers over some 190
files with an index, 812 GB that take a megabyte of disk. Measured, each by a process of its own,
with the time and the memory of all its descendants (measure.py):

- plan: `doit list` beside an empty cache: reads the headers, asks mlx-lm, makes the tasks.
- list: `doit list` again.
- nothing to do: `doit` where all is up to date, the first time, which looks at everything, and
  then; and what `list`, `plan`, `graph`, `cache stats` and others say then.
- one changed: `doit list` after one target's bits changed, which looks at that target anew.

More than 100 targets are ten times as many models of the same settings under other names: the
first hundred are built, the others are hard links of what that left, with their own lines in
doit's database and in models.lock. Of these there is no row for a cache that is empty.

The state "built" is simulated: doit runs the real graph, but each layer's digests are made up of
its inputs' digests and its settings, and weight files are sparse. What doit compares afterwards,
manifests, its database, the action cache and the files' stamps, is what a real build leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import ROOT, Usage, measure

LLAMA_405B = {
    "layers": 126,
    "hidden": 16384,
    "intermediate": 53248,
    "heads": 128,
    "kv_heads": 8,
    "vocab": 128256,
}
DTYPE = "bfloat16"
BUILT = 100  # targets that are built; more are copies of them
FILE_BYTES = 4_800_000_000  # gives about as many files as the real one has
MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def write_checkpoint(folder: Path) -> None:
    """Writes the sparse checkpoint, unless it is there."""
    if folder.exists():
        return
    import checkpoint

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shape = checkpoint.Shape(**LLAMA_405B)
    checkpoint.write_config(unfinished, shape, dtype=DTYPE)
    files: list[list[checkpoint.Tensor]] = [[]]
    for tensor in checkpoint.tensors(shape):
        held = sum(other.nbytes(DTYPE) for other in files[-1])
        if files[-1] and held + tensor.nbytes(DTYPE) > FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        with (unfinished / name).open("wb") as file:
            begin = file.write(checkpoint.header(tensors, dtype=DTYPE))
            file.truncate(begin + sum(tensor.nbytes(DTYPE) for tensor in tensors))
    size = sum(tensor.nbytes(DTYPE) for tensors in files for tensor in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (unfinished / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    unfinished.rename(folder)


def models_toml(source: Path, targets: int, *, bits: int = 4) -> str:
    """Models of at most ``BUILT`` variants each, one with ``bits``.

    Each variant of a model has one more module than the last at other bits.
    """
    modules = [f"*layers.{i}.{name}" for i in range(LLAMA_405B["layers"]) for name in MODULES]
    lines = []
    for first in range(0, targets, BUILT):
        model = copied("giant", first // BUILT)
        wide = 4 if first else bits
        lines += [f"[models.{model}]", f'source = "{source}"', f"quantize = {{ bits = {wide} }}"]
        for number, module in enumerate(modules[: min(BUILT, targets - first) - 1], start=1):
            lines += [
                f"[models.{model}.variants.v{number}]",
                f'quantize = {{ bits = 4, rules = [{{ match = "{module}", bits = 8 }}] }}',
            ]
    return "\n".join(lines) + "\n"


def copied(target: str, copy: int) -> str:
    """The name of a target's copy."""
    return target.replace("giant", f"giant{copy}", 1) if copy else target


def copy_targets(work: Path) -> None:
    """Lays out the targets of models.toml like the first ``BUILT`` ones, which are built."""
    sys.path.insert(0, str(ROOT))
    from cache.digest import digest_record
    from tasks.cli.doit_database import Database
    from tasks.cli.session import Session
    from tasks.config import reader
    from tasks.planning import bundle

    state = work / ".mlx-make"
    (state / "up-to-date.json").unlink(missing_ok=True)
    built = map(json.loads, (state / "doit.json").read_text().splitlines()[1:])
    tasks_of = {line["key"].split(":")[1]: json.dumps(line["value"]) for line in built}
    plans = Session.open(reader.load(work / "models.toml")).plans
    lock = json.loads((work / "models.lock").read_text())
    for copy in range(1, len(plans) // BUILT):
        database = Database(str(state / "doit.json"), None)
        for name, text in tasks_of.items():
            new = copied(name, copy)
            for folder in (work / "build", state / "manifests"):
                shutil.copytree(folder / name, folder / new, copy_function=os.link)
            for form in (":{}:", '"pack:{}"', "/manifests/{}/"):
                text = text.replace(form.format(name), form.format(new))
            tasks = json.loads(text)
            params = bundle.params(plans[new])  # its card may say its name
            tasks[f"pack:{new}"]["_values_:"] |= {"parts": params, "told": digest_record(params)}
            for task, known in tasks.items():
                for key, value in known.items():
                    database.set(task, key, value)
            lock["targets"][new] = lock["targets"][name]
        database.dump()
    (work / "models.lock").write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n")


def simulate(arguments: Sequence[str]) -> None:
    """Runs doit in this process, with stages that read and compute nothing."""
    sys.path.insert(0, str(ROOT))
    from cache.digest import digest_record
    from cache.files import space
    from cache.records.manifests import Tensor, TensorSpec
    from tasks.execution.builder import Builder
    from tasks.layouts import weight_file
    from tasks.stages.registry import PIPELINE
    from tasks.stages.stage import LeafStage, Origin, Result

    def made_up(spec: TensorSpec, *made_of: Any) -> Tensor:
        return Tensor(*spec, digest_record([*spec, *made_of]))

    def run(stage: Any) -> Any:
        def make(params: Any, inputs: Any, _context: Any) -> Result:
            outputs = stage.outputs(params, {key: t.spec for key, t in inputs.items()})
            record = params.record
            return Result({
                name: inputs[output.inputs[0]] if output.origin is Origin.PASSED_ON
                else made_up(output.spec, name, record, [inputs[k].digest for k in output.inputs])
                for name, output in outputs.items()
            })  # fmt: skip

        return make

    def scan(stage: Any) -> Any:
        def find(spec: Any, _context: Any, **_: Any) -> dict[str, Tensor]:
            outputs = stage.outputs(spec.params, {})
            return {key: made_up(output.spec, key) for key, output in outputs.items()}

        return find

    def write(
        path: Path, shard: Any, _format: Any, _blobs: Any, find: Any, *_: Any, **__: Any
    ) -> Tensor:
        size = sum(tensor.nbytes for _, tensor in shard)
        with path.open("wb") as file:
            file.truncate(size)
        return made_up(TensorSpec("uint8", (size,)), [find(name)[0] for name, _ in shard])

    replaced: list[tuple[Any, str, Any]] = [
        (weight_file, "write", write),
        (Builder, "locate", lambda *_: []),
        (space, "require_free", lambda *_: None),  # there is none for a model of this size
    ]
    for stage in PIPELINE:
        leaf = isinstance(stage, LeafStage)
        replaced.append((stage, "scan" if leaf else "run", scan(stage) if leaf else run(stage)))
    for where, name, function in replaced:
        setattr(where, name, function)
    sys.argv = ["doit", *arguments]
    runpy.run_module("doit", run_name="__main__")


def rows(scratch: Path, targets: int, repeats: int) -> Iterator[list[str]]:
    """Measures at a number of targets; the table's rows."""
    work = scratch / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    models = work / "models.toml"
    doit = [sys.executable, "-m", "doit"]
    listed = [*doit, "list", f"models={models}"]

    def row(what: str, usage: Usage, tasks: int = 0) -> list[str]:
        print(f"{targets} targets: {what}: {usage.seconds:.2f} s", file=sys.stderr)
        each = f"{usage.processor / tasks * 1e6:.0f}" if tasks else "–"
        memory = f"{usage.peak_rss / 1e6:,.0f}"
        clock, processor = f"{usage.seconds:,.2f}", f"{usage.processor:,.2f}"
        return [f"{targets:,}", what, clock, processor, each, memory]

    def median(command: list[str]) -> Usage:
        usages = [measure(command) for _ in range(repeats)]
        return replace(
            max(usages, key=lambda usage: usage.peak_rss),
            seconds=statistics.median(usage.seconds for usage in usages),
            processor=statistics.median(usage.processor for usage in usages),
        )

    models.write_text(models_toml(scratch / "checkpoint", min(targets, BUILT)))
    if targets <= BUILT:
        yield row("plan: the first `doit list`", measure(listed))
        yield row("`doit list`", median(listed))
    simulated = [sys.executable, str(Path(__file__)), "--simulate", f"models={models}"]
    built = measure(simulated)
    tasks = sum(1 for _ in (work / ".mlx-make" / "manifests").rglob("*.json"))
    yield row(f"a build of {tasks:,} tasks, simulated", built, tasks)
    if targets > BUILT:
        models.write_text(models_toml(scratch / "checkpoint", targets))
        copy_targets(work)
        tasks *= targets // BUILT
    yield row("the first `doit` with nothing to do", measure([*doit, f"models={models}"]), tasks)
    yield row("nothing to do: `doit`", median([*doit, f"models={models}"]), tasks)
    for command in ("list", "plan", "graph", "cache stats", "summary", "why pack:giant"):
        yield row(f"`doit {command}`", median([*doit, *command.split(), f"models={models}"]))
    models.write_text(models_toml(scratch / "checkpoint", targets, bits=8))
    yield row("one target's bits changed: `doit list`", median(listed))
    state = subprocess.run(
        ["du", "-sh", str(work / ".mlx-make")], check=True, capture_output=True, text=True
    ).stdout.split()[0]
    print(f"{targets} targets: {state} of state", file=sys.stderr)
    shutil.rmtree(work)


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--simulate"]:
        simulate(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir(), "mlx-make-giant"),
        help="folder for the checkpoint and the state (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if any(targets > BUILT and targets % BUILT for targets in arguments.targets):
        parser.error(f"--targets: above {BUILT}, multiples of that")
    scratch = arguments.scratch.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    write_checkpoint(scratch / "checkpoint")
    print("| targets | what | wall, s | CPU, s | CPU, µs a task | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for targets in arguments.targets:
        for cells in rows(scratch, targets, arguments.repeats):
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

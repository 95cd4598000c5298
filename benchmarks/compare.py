"""compare: measure mlx-make beside mlx_lm.convert, both in one run, and print Markdown tables.

    python benchmarks/compare.py                                # every scenario, 5 repeats
    python benchmarks/compare.py cold-safetensors --repeats 3
    python benchmarks/compare.py --layers 2 --repeats 1         # quick: is everything in order?

Of each scenario every side runs once as a warm-up, then the sides take turns. A figure is the
median of the repeats; (0.40×) behind it is its ratio to the scenario's first row. The first table
sets what is to be reached beside what was. What is taken:

- wall: seconds from start to exit of the command, the interpreter's start included.
- peak RSS, peak anonymous: resident memory summed over the process and its descendants, sampled
  every few milliseconds (a process's own high-water mark stands in where it is higher). Anonymous
  is what cannot be dropped; the rest are pages of mapped files, which the system takes back freely.
- written: bytes that the kernel saw dirtied on their way to a disk (write_bytes), by the command
  and every descendant that was waited for; ÷ output: as a multiple of what the command leaves.
- write calls, read calls: bytes through such system calls (wchar, rchar). Mapped files pass by.

Linux only, as the figures come from /proc. Checkpoints are made by checkpoint.py on the first run
and kept in the scratch folder, which needs some 25 GB for the default size. It must be on a disk:
what is written to memory (tmpfs) is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import platform
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import ROOT, BenchmarkError, Usage, measure, proc_fields

PACK_START_SECONDS = 0.4  # what a changed max_shard_size may take besides copying
MANY_TARGETS = (1, 5, 50)
# 80 layers, as many as any common model has; small, as only their number matters.
MANY_LAYERS = {
    "layers": 80,
    "hidden": 128,
    "intermediate": 256,
    "heads": 4,
    "kv-heads": 2,
    "vocab": 512,
}
# The same in width and four times as deep; not wide, so that it is quick.
DEPTHS = (22, 88)
NARROW = {"hidden": 512, "intermediate": 1408, "heads": 8, "kv-heads": 2, "vocab": 8192}


def nothing(_repeat: int) -> None:
    """The preparation of a side that needs none."""


@dataclass(frozen=True)
class Side:
    """One way to get the scenario's work done, to be set beside the others."""

    name: str
    commands: Sequence[Sequence[str]]  # measured, one after the other
    prepare: Callable[[int], None] = nothing  # told the repeat's number; not measured
    outputs: Sequence[Path] = ()  # what the commands leave


@dataclass(frozen=True)
class Goal:
    """What is to be reached.

    Attributes:
        what: in words.
        reached: the figure, from the scenario's results.
        most: what it may be, or None where it is only told.
        unit: of both.
    """

    what: str
    reached: Callable[[Sequence[Result]], float]
    most: float | None
    unit: str = "×"


def ratio(of: str, side: int = 1) -> Callable[[Sequence[Result]], float]:
    """A figure of a side of that number, as a multiple of the first side's."""
    return lambda results: getattr(results[side].median, of) / getattr(results[0].median, of)


@dataclass(frozen=True)
class Scenario:
    """Sides to measure beside each other; the first is what the others are compared with."""

    title: str
    sides: Sequence[Side]
    goals: Sequence[Goal] = ()
    set_up: Callable[[], object] = lambda: None  # once, not measured
    # Folders of models whose weights must be equal to the bit afterwards.
    equal: Sequence[tuple[Path, Path]] = ()


@dataclass(frozen=True)
class Workspace:
    """A folder with a models.toml, where mlx-make builds."""

    folder: Path
    python: str

    @property
    def models_toml(self) -> Path:
        """The file that says what to build."""
        return self.folder / "models.toml"

    @property
    def command(self) -> list[str]:
        """What builds it."""
        return [self.python, "-m", "doit", f"models={self.models_toml}"]

    def built(self, target: str) -> Path:
        """The folder of a finished model."""
        return self.folder / "build" / target

    def describe(
        self,
        source: Path,
        variants: dict[str, str] | None = None,
        *,
        keep: str | None = None,
        **keys: str,
    ) -> None:
        """Writes models.toml: one model named `model`, and variants of other quantizations.

        Args:
            source: the checkpoint's folder.
            variants: `quantize` of each variant's name, in TOML.
            keep: `[cache] keep`, in TOML.
            keys: the model's other keys, their values in TOML.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [] if keep is None else ["[cache]", f"keep = {keep}"]
        lines += ["[models.model]", f'source = "{os.path.relpath(source, self.folder)}"']
        lines += [f"{key} = {value}" for key, value in keys.items()]
        for name, quantize in (variants or {}).items():
            lines += [f"[models.model.variants.{name}]", f"quantize = {quantize}"]
        self.models_toml.write_text("\n".join(lines) + "\n")

    def wipe(self, _repeat: int = 0) -> None:
        """Removes everything built and remembered; models.toml stays."""
        for name in ("build", ".mlx-make"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


@dataclass(frozen=True)
class Bench:
    """Where and with what to measure; makes the scenarios."""

    scratch: Path
    python: str
    shape: Sequence[str]  # checkpoint.py's options for the model of the cold scenarios
    mlx_examples: Path | None

    def checkpoint(self, options: Sequence[str]) -> tuple[Path, Path]:
        """A checkpoint's Hugging Face folder and its Meta twin, made if they are not yet there."""
        name = "llama" + "".join(options).replace("--", "-").replace("=", "")
        folder = self.scratch / "checkpoints" / name
        if not folder.exists():
            unfinished = folder.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            print(f"writing the checkpoint {folder}", file=sys.stderr)
            script = Path(__file__).with_name("checkpoint.py")
            subprocess.run(
                [
                    *(self.python, str(script), str(unfinished / "transformers")),
                    *(f"--meta={unfinished / 'meta'}", *options),
                ],
                check=True,
            )
            unfinished.rename(folder)
        return folder / "transformers", folder / "meta"

    def model(self) -> tuple[Path, Path]:
        """The checkpoint of most scenarios, in both formats."""
        return self.checkpoint(self.shape)

    def workspace(self, name: str) -> Workspace:
        """A fresh folder for mlx-make to build in."""
        shutil.rmtree(self.scratch / "work" / name, ignore_errors=True)
        return Workspace(self.scratch / "work" / name, self.python)

    def convert(
        self, source: Path, *bits: int, mode: str = "affine", dtype: str | None = None
    ) -> Side:
        """mlx_lm.convert, once for each number of bits."""
        outputs = [self.scratch / "work" / f"convert-{mode}-{n}bit" for n in bits]
        commands = [
            [
                *(self.python, "-m", "mlx_lm", "convert"),
                *("--hf-path", str(source), "--mlx-path", str(output)),
                *("-q", "--q-bits", str(n), "--q-mode", mode),
                *(("--dtype", dtype) if dtype else ()),
            ]
            for n, output in zip(bits, outputs, strict=True)
        ]

        def prepare(_repeat: int) -> None:
            for output in outputs:  # which must not exist
                shutil.rmtree(output, ignore_errors=True)

        return Side("mlx_lm.convert", commands, prepare, outputs)

    def convert_examples(self, source: Path) -> Iterator[Side]:
        """mlx-examples' convert.py on a Meta checkpoint, if it is at hand."""
        if self.mlx_examples is None:
            return
        output = self.scratch / "work" / "convert-examples"
        script = str(self.mlx_examples / "convert.py")
        command = [
            self.python,
            script,
            "--torch-path",
            str(source),
            "--mlx-path",
            str(output),
            "-q",
        ]
        yield Side(
            "convert.py",
            [command],
            remover(output),
            [output],
        )

    # Each scenario is a method here and a line of SCENARIOS.

    def cold_safetensors(self) -> Scenario:
        """Nothing built, nothing cached: a Hugging Face folder to 4 bits."""
        source, _ = self.model()
        work = self.workspace("cold-safetensors")
        work.describe(source, quantize="{ bits = 4 }")
        convert = self.convert(source, 4)
        return Scenario(
            "cold, safetensors → 4 bit",
            [convert, Side("doit", [work.command], work.wipe, [work.built("model")])],
            [
                Goal("cold, safetensors: wall", ratio("seconds"), 0.45),
                Goal("cold, safetensors: peak RSS", ratio("peak_rss"), 0.33),
                Goal("cold, safetensors: written ÷ output", multiple_of_output, 2.1),
                self.most_memory("cold, safetensors: peak RSS", source),
            ],
            equal=[(convert.outputs[0], work.built("model"))],
        )

    def cold_mxfp4(self) -> Scenario:
        """The same to mxfp4, for which MLX's own takes twenty times as long on a CPU."""
        source, _ = self.model()
        work = self.workspace("cold-mxfp4")
        work.describe(source, quantize='{ mode = "mxfp4" }')
        convert = self.convert(source, 4, mode="mxfp4")
        return Scenario(
            "cold, safetensors → mxfp4",
            [convert, Side("doit", [work.command], work.wipe, [work.built("model")])],
            [
                Goal("cold, mxfp4: wall", ratio("seconds"), None),
                self.most_memory("cold, mxfp4: peak RSS", source),
            ],
            equal=[(convert.outputs[0], work.built("model"))],
        )

    def cold_meta(self) -> Scenario:
        """Nothing built, nothing cached: Meta's two shards to float16, to 4 bits, in either layout.

        mlx_lm.convert cannot read Meta's format; it is given the twin.
        """
        source, meta = self.model()
        convert = self.convert(source, 4, dtype="float16")
        sides, equal = [convert], []
        for name, layout, keep in (
            ("doit, layout mlx-lm", "mlx-lm", None),
            ("doit, layout mlx-examples", "mlx-examples", None),
            ("doit, keep = []", "mlx-lm", "[]"),
        ):
            work = self.workspace(f"cold-meta-{len(sides)}")
            work.describe(
                meta, keep=keep, layout=f'"{layout}"', dtype='"float16"', quantize="{ bits = 4 }"
            )
            sides.append(Side(name, [work.command], work.wipe, [work.built("model")]))
            if layout == "mlx-lm":
                equal.append((convert.outputs[0], work.built("model")))
        # float16 takes what bfloat16 took.
        cast_bytes = sum(path.stat().st_size for path in meta.glob("*.pth"))

        def written(results: Sequence[Result]) -> float:
            most = max(results[1:3], key=lambda result: result.median.written)
            return (most.median.written - cast_bytes) / most.output_bytes

        return Scenario(
            "cold, Meta, 2 shards → float16 → 4 bit",
            [*sides, *self.convert_examples(meta)],
            [
                Goal("cold, Meta, layout mlx-lm: wall", ratio("seconds", 1), 0.7),
                Goal("cold, Meta, layout mlx-examples: wall", ratio("seconds", 2), 0.7),
                Goal("cold, Meta, mlx-lm: peak anonymous", ratio("peak_anonymous", 1), 0.3),
                Goal("cold, Meta, mlx-examples: peak anonymous", ratio("peak_anonymous", 2), 0.3),
                Goal("cold, Meta: (written − cast blobs) ÷ output", written, 2.1),
                Goal(
                    "cold, Meta, keep = []: written ÷ output",
                    lambda results: multiple_of_output(results[2:]),
                    2.1,
                ),
                self.most_memory("cold, Meta: peak RSS", source),
            ],
            equal=equal,
        )

    def four_variants(self) -> Scenario:
        """Nothing built: 3, 4, 6 and 8 bits of one checkpoint."""
        source, _ = self.model()
        work = self.workspace("four-variants")
        variants = {f"{bits}bit": f"{{ bits = {bits} }}" for bits in (3, 6, 8)}
        work.describe(source, variants, quantize="{ bits = 4 }")
        targets = [work.built(name) for name in ("model-3bit", "model", "model-6bit", "model-8bit")]
        convert = self.convert(source, 3, 4, 6, 8)
        return Scenario(
            "cold, 3, 4, 6 and 8 bit",
            [convert, Side("doit", [work.command], work.wipe, targets)],
            [
                Goal("four variants: wall", ratio("seconds"), 0.45),
                self.most_memory("four variants: peak RSS", source),
            ],
            equal=list(zip(convert.outputs, targets, strict=True)),
        )

    def changed_bits(self) -> Scenario:
        """4 bits are built, 8 are asked for."""
        source, _ = self.model()
        work = self.workspace("changed-bits")

        def prepare(_repeat: int) -> None:
            work.wipe()
            work.describe(source, quantize="{ bits = 4 }")
            measure(work.command)
            work.describe(source, quantize="{ bits = 8 }")

        convert = self.convert(source, 8)
        return Scenario(
            "4 bit is built, 8 bit is asked for",
            [convert, Side("doit", [work.command], prepare, [work.built("model")])],
            [
                Goal("changed bits: wall", ratio("seconds"), 0.4),
                self.most_memory("changed bits: peak RSS", source),
            ],
            equal=[(convert.outputs[0], work.built("model"))],
        )

    def changed_shard_size(self) -> Scenario:
        """Another max_shard_size for what is built: hardly more than a copy."""
        source, _ = self.model()
        work = self.workspace("changed-shard-size")
        built, copy = work.built("model"), work.folder / "copy"
        before = work.folder / "before"

        def set_up() -> None:
            work.describe(source, quantize="{ bits = 4 }")
            measure(work.command)
            shutil.copytree(built, before)

        def prepare(repeat: int) -> None:
            # One file more each time: what was cut so before is linked, and nothing written.
            size_kb = folder_bytes(built) // (1000 * (repeat + 2))
            work.describe(source, quantize="{ bits = 4 }", max_shard_size=f'"{size_kb}kB"')
            # Each side gets the memory that the other's output leaves: what was freed long ago, a
            # virtual machine may have given back to its host, and then a copy takes three times as
            # long. So cp's goes now, as doit's does behind it.
            remover(copy)(repeat)

        def copies(results: Sequence[Result]) -> float:
            cp, doit = (result.median.seconds for result in results)
            return (doit - PACK_START_SECONDS) / cp

        return Scenario(
            "max_shard_size changed",
            [
                Side("cp -r", [["cp", "-r", str(built), str(copy)]], remover(copy)),
                Side("doit", [work.command], prepare, [built]),
            ],
            [
                Goal(f"changed max_shard_size: (wall − {PACK_START_SECONDS} s) ÷ cp", copies, 1.5),
                self.most_memory("changed max_shard_size: peak RSS", source),
            ],
            set_up=set_up,
            equal=[(before, built)],
        )

    def nothing_to_do(self) -> Scenario:
        """Targets of 80 layers are up to date: one, five, fifty."""
        source, _ = self.checkpoint([f"--{name}={value}" for name, value in MANY_LAYERS.items()])
        works = {count: self.workspace(f"nothing-to-do-{count}") for count in MANY_TARGETS}

        def set_up() -> None:
            for count, work in works.items():
                variants = {
                    f"v{i}": "{ bits = 4, rules = "
                    f'[{{ match = "*layers.{i}.mlp.down_proj", bits = 8 }}] }}'
                    for i in range(count - 1)
                }
                work.describe(source, variants, quantize="{ bits = 4 }")
                measure(work.command)

        def a_task(results: Sequence[Result]) -> float:
            manifests = works[MANY_TARGETS[-1]].folder / ".mlx-make" / "manifests"
            return results[-1].median.seconds * 1e6 / sum(1 for _ in manifests.rglob("*.json"))

        return Scenario(
            "nothing to do, targets of 80 layers",
            [
                Side(f"doit, {count} target{'s' * (count > 1)}", [work.command])
                for count, work in works.items()
            ],
            [
                Goal(
                    "nothing to do, five targets: wall",
                    lambda results: results[1].median.seconds,
                    0.6,
                    " s",
                ),
                Goal("nothing to do, fifty targets: a task", a_task, 100, " µs"),
            ],
            set_up=set_up,
        )

    def four_times_the_layers(self) -> Scenario:
        """A cold build of the same width, four times as deep."""
        sides = []
        for layers in DEPTHS:
            options = [f"--{name}={value}" for name, value in ({"layers": layers} | NARROW).items()]
            source, _ = self.checkpoint(options)
            work = self.workspace(f"layers-{layers}")
            work.describe(source, quantize="{ bits = 4 }")
            output = [work.built("model")]
            sides.append(Side(f"doit, {layers} layers", [work.command], work.wipe, output))
        return Scenario(
            "four times the layers, cold",
            sides,
            [
                Goal("four times the layers: peak RSS", ratio("peak_rss"), 1.1),
                # The largest tensor is the embedding, of either depth.
                self.most_memory("four times the layers: peak RSS", source),
            ],
        )

    def limit(self) -> Scenario:
        """A cold build beside what no build can do without."""
        source, _ = self.model()
        work = self.workspace("limit")
        work.describe(source, quantize="{ bits = 4 }")
        built, copy = work.built("model"), work.folder / "copy"
        weights = source / "model.safetensors"
        alone = [self.python, str(Path(__file__).with_name("quantize_alone.py")), str(weights)]

        def far(results: Sequence[Result]) -> float:
            *parts, doit = (result.median.seconds for result in results)
            return doit / sum(parts)

        return Scenario(
            "cold, beside its limit",
            [
                Side("read the checkpoint", [["dd", f"if={weights}", "of=/dev/null", "bs=4M"]]),
                Side("write the output", [["cp", "-r", str(built), str(copy)]], remover(copy)),
                Side("mx.quantize alone, on all cores", [alone]),
                Side("doit", [work.command], work.wipe, [built]),
            ],
            [
                Goal("cold, safetensors: wall ÷ the limit (all three)", far, None),
                self.most_memory("cold, beside its limit: peak RSS", source),
            ],
            set_up=lambda: measure(work.command),
        )

    def progress(self) -> Scenario:
        """A cold build that says how far it is, beside one that says nothing."""
        source, _ = self.model()
        work = self.workspace("progress")
        work.describe(source, quantize="{ bits = 4 }")
        silent = [*work.command, "-r", "zero"]
        script = str(Path(__file__).with_name("terminal.py"))
        terminal = [self.python, script]
        return Scenario(
            "progress: cold, safetensors → 4 bit",
            [
                Side("on a terminal, -r zero", [[*terminal, *silent]], work.wipe),
                Side("on a terminal", [[*terminal, *work.command]], work.wipe),
                Side("in a pipe, -r zero", [silent], work.wipe),
                Side("in a pipe", [work.command], work.wipe),
            ],
            [
                Goal("progress on a terminal: wall", ratio("seconds"), 1.01),
                self.most_memory("progress: peak RSS", source),
            ],
        )

    def most_memory(self, what: str, source: Path) -> Goal:
        """The goal that memory hangs on the largest tensor, not on the model."""
        largest = max(data.nbytes for _, _, data in safetensors_of(source).values())
        threads = len(os.sched_getaffinity(0))

        def peak(results: Sequence[Result]) -> float:
            builds = [result for result in results if "-m doit" in " ".join(result.commands)]
            return max(result.median.peak_rss for result in builds) / 1e6

        return Goal(what, peak, (threads * 4 * largest + 250e6) / 1e6, " MB")


SCENARIOS: dict[str, Callable[[Bench], Scenario]] = {
    "cold-safetensors": Bench.cold_safetensors,
    "cold-mxfp4": Bench.cold_mxfp4,
    "cold-meta": Bench.cold_meta,
    "four-variants": Bench.four_variants,
    "changed-bits": Bench.changed_bits,
    "changed-shard-size": Bench.changed_shard_size,
    "nothing-to-do": Bench.nothing_to_do,
    "four-times-the-layers": Bench.four_times_the_layers,
    "limit": Bench.limit,
    "progress": Bench.progress,
}


@dataclass(frozen=True)
class Result:
    """What the repeats of one side of one scenario took."""

    scenario: str
    side: str
    commands: Sequence[str]
    usages: Sequence[Usage]
    output_bytes: int

    @property
    def median(self) -> Usage:
        """The median of each figure by itself."""
        return Usage(
            *(
                statistics.median(getattr(usage, of.name) for usage in self.usages)
                for of in dataclasses.fields(Usage)
            )
        )


def multiple_of_output(results: Sequence[Result]) -> float:
    """What the second side wrote, as a multiple of what it leaves."""
    return results[1].median.written / results[1].output_bytes


def run(scenario: Scenario, *, repeats: int, only: Sequence[str]) -> list[Result]:
    """Measures a scenario's sides in turn.

    Raises:
        BenchmarkError: if a command fails or outputs that must be equal are not.
    """
    sides = [side for side in scenario.sides if not only or side.name.startswith(tuple(only))]
    if not sides:
        return []
    scenario.set_up()
    usages: dict[str, list[Usage]] = {side.name: [] for side in sides}
    for repeat in range(repeats + 1):
        for side in sides:
            side.prepare(repeat)
            usage = Usage(0)
            for command in side.commands:
                usage = usage.then(measure(command))
            kind = f"repeat {repeat}" if repeat else "warm-up"
            print(f"{scenario.title}: {side.name}: {kind}: {usage.seconds:.2f} s", file=sys.stderr)
            if repeat:  # 0 is the warm-up
                usages[side.name].append(usage)
    if len(sides) == len(scenario.sides):
        for one, other in scenario.equal:
            check_equal_weights(one, other)
    return [
        Result(
            scenario.title,
            side.name,
            [shlex.join(command) for command in side.commands],
            usages[side.name],
            sum(map(folder_bytes, side.outputs)),
        )
        for side in sides
    ]


def remover(folder: Path) -> Callable[[int], None]:
    """A preparation that removes a folder."""
    return lambda _repeat: shutil.rmtree(folder, ignore_errors=True)


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def safetensors_of(folder: Path) -> dict[str, tuple[str, list[int], memoryview]]:
    """Each tensor's dtype, shape and bytes, of all the folder's safetensors files."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        (header_bytes,) = struct.unpack("<Q", mapped[:8])
        data = mapped[8 + header_bytes :]
        header = json.loads(bytes(mapped[8 : 8 + header_bytes]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return tensors


def check_equal_weights(one: Path, other: Path) -> None:
    """Compares two models' weights to the bit: a fast build of something else proves nothing.

    Raises:
        BenchmarkError: naming the first tensors that differ.
    """
    ours, theirs = safetensors_of(one), safetensors_of(other)
    differing = [
        name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)
    ]
    if differing or not ours:
        names = ", ".join(differing[:3]) or "there are none"
        raise BenchmarkError(f"{one} and {other} differ in {len(differing)} tensors: {names}")


def reached(goals: Sequence[tuple[Goal, float]]) -> Iterator[str]:
    """The lines of the Markdown table of goals."""
    yield "| what | reached | goal | |"
    yield "|---|---|---|---|"
    for goal, figure in goals:
        most = "–" if goal.most is None else f"≤ {_rounded(goal.most)}{goal.unit}"
        verdict = "" if goal.most is None else "met" if figure <= goal.most else "**missed**"
        yield f"| {goal.what} | {_rounded(figure)}{goal.unit} | {most} | {verdict} |"


def _rounded(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def table(results: Sequence[Result]) -> Iterator[str]:
    """The lines of the Markdown table; a ratio is to the first row of the same scenario."""
    yield (
        "| scenario | command | wall, s | min–max | peak RSS, MB | peak anonymous, MB "
        "| written, MB | ÷ output | write calls, MB | read calls, MB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    base: Result | None = None
    for result in results:
        first = base is None or base.scenario != result.scenario
        if first:
            base = result
        assert base is not None
        median, reference = result.median, base.median

        def figure(
            of: str, median: Usage = median, reference: Usage = reference, first: bool = first
        ) -> str:
            value, against = getattr(median, of), getattr(reference, of)
            text = f"{value:.2f}" if of == "seconds" else f"{value / 1e6:.0f}"
            return text if first or not against else f"{text} ({value / against:.2f}×)"

        seconds = [usage.seconds for usage in result.usages]
        multiple = f"{median.written / result.output_bytes:.2f}" if result.output_bytes else "–"
        cells = [
            result.scenario if first else "",
            result.side,
            figure("seconds"),
            f"{min(seconds):.2f}–{max(seconds):.2f}",
            figure("peak_rss"),
            figure("peak_anonymous"),
            figure("written"),
            multiple,
            figure("write_calls"),
            figure("read_calls"),
        ]
        yield f"| {' | '.join(cells)} |"


def machine(scratch: Path) -> str:
    """Hardware and system in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory_bytes = proc_fields("/proc/meminfo")["MemTotal"]
    return (
        f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory_bytes / 2**30:.0f} GiB of memory, Linux {platform.release()}, "
        f"{file_system(scratch)}"
    )


def file_system(folder: Path) -> str:
    """What a folder lies on, such as ext4."""
    done = subprocess.run(
        ["df", "--output=fstype", str(folder)], check=True, capture_output=True, text=True
    )
    return done.stdout.split()[-1]


def versions(python: str) -> str:
    """The versions that were measured, in one line."""
    script = (
        "import platform, importlib.metadata as of\n"
        "names = ['mlx', 'mlx-lm', 'torch', 'transformers', 'doit', 'xxhash']\n"
        "print('Python', platform.python_version(), *(f', {n} {of.version(n)}' for n in names))"
    )
    printed = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        check=False,  # an unpacked archive has no commit
        capture_output=True,
        text=True,
    ).stdout.strip()
    return printed.stdout.strip().replace(" ,", ",") + f", mlx-make {commit or 'of no commit'}"


def report(
    results: Sequence[Result],
    goals: Sequence[tuple[Goal, float]],
    bench: Bench,
    repeats: int,
) -> Iterator[str]:
    """The lines of the whole record: what, on what, with which commands, and the figures."""
    yield f"Command: `{shlex.join(['python', 'benchmarks/compare.py', *sys.argv[1:]])}`"
    yield ""
    yield f"Machine: {machine(bench.scratch)}"
    yield ""
    yield f"Versions: {versions(bench.python)}"
    yield ""
    yield f"Medians of {repeats} after a warm-up, a scenario's sides in turn. MB are 10⁶ bytes."
    yield ""
    yield from reached(goals)
    yield ""
    yield from table(results)
    yield ""
    yield "What was run, in the repository root:"
    yield ""
    for result in results:
        for command in result.commands:
            shown = command.replace(str(bench.scratch), "$SCRATCH").replace(bench.python, "python")
            yield f"- {result.scenario}, {result.side}: `{shown}`"


def command_line() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        help=f"which to measure (default: all): {', '.join(SCENARIOS)}",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="SIDE",
        help="only the sides whose name begins so, such as doit or mlx_lm.convert",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir(), "mlx-make-benchmarks"),
        help="folder for checkpoints and outputs (default: %(default)s)",
    )
    parser.add_argument(
        "--mlx-examples",
        type=Path,
        metavar="FOLDER",
        help="mlx-examples' llms/llama: measures its convert.py as well",
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter to measure with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single figure there")
    for name in MANY_LAYERS:
        parser.add_argument(f"--{name}", type=int, help="of the checkpoint (see checkpoint.py)")
    return parser.parse_args()


def bench_of(arguments: argparse.Namespace) -> Bench:
    """Return where and on what the scenarios are measured, if they can be measured there."""
    if sys.platform != "linux":
        sys.exit("compare.py: measures by /proc, which only Linux has")
    if arguments.repeats < 1:
        sys.exit("compare.py: --repeats must be at least 1")
    if unknown := [name for name in arguments.scenarios if name not in SCENARIOS]:
        sys.exit(f"compare.py: no scenario {unknown[0]!r}; there are: {', '.join(SCENARIOS)}")

    sizes = {name: getattr(arguments, name.replace("-", "_")) for name in MANY_LAYERS}
    bench = Bench(
        scratch=arguments.scratch.resolve(),
        python=arguments.python,
        shape=[f"--{name}={value}" for name, value in sizes.items() if value is not None],
        mlx_examples=arguments.mlx_examples and arguments.mlx_examples.resolve(),
    )
    bench.scratch.mkdir(parents=True, exist_ok=True)
    if file_system(bench.scratch) == "tmpfs":
        sys.exit(
            f"compare.py: {bench.scratch} is in memory (tmpfs), where the kernel counts no byte as "
            "written. Name a folder on a disk: --scratch FOLDER"
        )
    return bench


def main() -> None:
    """Measure the scenarios, and print what was found."""
    arguments = command_line()
    bench = bench_of(arguments)
    results: list[Result] = []
    goals: list[tuple[Goal, float]] = []
    failures = []
    for name in arguments.scenarios or SCENARIOS:
        try:
            scenario = SCENARIOS[name](bench)
            results_here = run(scenario, repeats=arguments.repeats, only=arguments.only)
            if len(results_here) == len(scenario.sides):
                goals += [(goal, goal.reached(results_here)) for goal in scenario.goals]
            results += results_here
        # The other scenarios' minutes are not lost. CalledProcessError: of checkpoint.py.
        except (BenchmarkError, OSError, subprocess.CalledProcessError) as error:
            failures.append(f"compare.py: {name}: {error}")
        shutil.rmtree(bench.scratch / "work", ignore_errors=True)
    for line in report(results, goals, bench, arguments.repeats):
        print(line)
    if arguments.json:
        records = [dataclasses.asdict(result) for result in results]
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()

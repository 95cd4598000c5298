"""hub: builds of a checkpoint that is only on a hub, and on no disk.

    python benchmarks/hub.py                                      # TinyLlama's shape, 2.2 GB
    python benchmarks/hub.py --shape 8b --disk 7GB --scratch /mnt/7g --cases build variants
    python benchmarks/hub.py --shape 3b --cases kills --kills 30
    python benchmarks/hub.py --shape 3b --cases kills --targets four mx
    python benchmarks/hub.py --cases beside --rate 200 --repeats 3
    python benchmarks/hub.py --shape 70b --files 30 --scratch /mnt/44g --cases limits --repeats 1
    python benchmarks/hub.py --shape 70b --layers 8 --rate 200 --cases limits
    python benchmarks/hub.py --shape 8b --cases limits --device gpu --scratch /dev/shm/hub

The tests' hub on loopback serves the checkpoint through huggingface_hub's own client; its bytes are
64 MiB in memory that the system sends again and again, and lie on no disk. Each case begins with
an empty folder in ``--scratch``. To have a disk that is no larger than that, give it a file system
of its own, or one in memory, where a slow disk is not to be measured:

    mount -t tmpfs -o size=44g none /mnt/44g
    truncate -s 7G disk && mkfs.ext4 -q -m 0 disk && mount -o loop disk /mnt/7g

- build: to 4 bits. Bytes that the storage sent beside the checkpoint's, the most memory of all
  processes, the most bytes of the disk at once.
- variants: 4 and 8 bits, mxfp4, and 4 bits of float16, in one run.
- kills: a build of ``--targets`` that is killed (SIGKILL) at random moments and begun again
  each time; moments are told by the bytes that the storage has sent, whatever the speed.
- beside: the first case, and ``hf download`` with ``mlx_lm.convert`` behind it, in turn, from a
  storage that sends no faster than ``--rate``; medians, and their ratio.
- limits: the first case, the same bytes through huggingface_hub's client to /dev/null
  (``download_alone.py``), and ``mx.quantize`` of as many weights (``quantize_alone.py``), in turn;
  medians, and the ratio to the slower of the two. Of each also the seconds of processors that it
  took and that the hub took meanwhile, which is a part of the same machine. ``--device gpu``
  has the build and ``mx.quantize`` compute on a GPU. 70 B parameters are 141 GB, which pass through
  ``--scratch`` on their way to 40: one repeat takes some minutes on 16 cores.

The weight files of "kills" must be those of a build that nothing happens to.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint
import torch
from measure import ROOT, BenchmarkError, Usage, measure

sys.path.insert(0, str(ROOT / "tests"))
from support import hub_server
from support.hub_repositories import Content, Generated, Span

SHAPES = {
    "tiny": checkpoint.Shape(layers=4, hidden=256, intermediate=512, heads=4, vocab=2048),
    "1b": checkpoint.Shape(),
    "3b": checkpoint.Shape(
        layers=28, hidden=3072, intermediate=8192, heads=24, kv_heads=8, vocab=128256
    ),
    "8b": checkpoint.Shape(
        layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256
    ),
    "70b": checkpoint.Shape(
        layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocab=128256
    ),
}
DTYPE = "bfloat16"
PIECE = 1 << 20
POOL_BYTES = (64 << 20) - 4094  # no tensor's size is a multiple of it: no two are alike
SAMPLE_SECONDS = POLL_SECONDS = 0.1
MOST_DELAY_SECONDS = 0.5
VARIANTS = {
    "four": "quantize = { bits = 4 }",
    "eight": "quantize = { bits = 8 }",
    "mx": 'quantize = { mode = "mxfp4" }',
    "half": 'dtype = "float16"\nquantize = { bits = 4 }',
}


def weight_files(shape: checkpoint.Shape, count: int) -> dict[str, Content]:
    """The weight files, of about one size, whose bytes nothing stores."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(POOL_BYTES // 2, generator=generator).mul_(checkpoint.DEVIATION)
    memory = os.memfd_create("weights")  # which the system sends from without a copy
    os.write(memory, checkpoint.raw(values.to(torch.bfloat16)))
    tensors = list(checkpoint.tensors(shape))
    share = sum(tensor.nbytes(DTYPE) for tensor in tensors) // count
    files: list[list[checkpoint.Tensor]] = [[]]
    for tensor in tensors:
        if len(files) < count and sum(each.nbytes(DTYPE) for each in files[-1]) >= share:
            files.append([])
        files[-1].append(tensor)
    contents = {
        f"model-{number:05}-of-{len(files):05}.safetensors": _generated(held, number, memory)
        for number, held in enumerate(files, start=1)
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # what a hub has of each file
        list(pool.map(lambda content: content.sha256, contents.values()))
    return {**contents}


def _generated(held: list[checkpoint.Tensor], number: int, memory: int) -> Generated:
    head = checkpoint.header(held, dtype=DTYPE)
    size = len(head) + sum(tensor.nbytes(DTYPE) for tensor in held)
    place = os.lseek(memory, 0, os.SEEK_END)
    os.write(memory, head)

    def spans(start: int, nbytes: int) -> Iterator[Span]:
        at, stop = start, min(size, start + nbytes)
        while at < stop:
            if at < len(head):
                span = Span(memory, place + at, min(len(head), stop) - at)
            else:
                begin = (at - len(head) + number * 2 * 1_000_003) % POOL_BYTES
                span = Span(memory, begin, min(PIECE, POOL_BYTES - begin, stop - at))
            yield span
            at += span.nbytes

    return Generated(size, spans)


class MostUsed(threading.Thread):
    """Samples the bytes of the disk that a folder takes; of a mount point, that the disk has."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._folder = folder
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample; the thread's body."""
        while not self._ended.wait(SAMPLE_SECONDS):
            self.most = max(self.most, self._used())

    def stop(self) -> None:
        """End, and return once the thread is done."""
        self._ended.set()
        self.join()

    def _used(self) -> int:
        if self._folder.is_mount():
            return shutil.disk_usage(self._folder).used
        files = {}
        for root, _, names in os.walk(self._folder):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    info = os.lstat(os.path.join(root, name))
                    files[info.st_ino] = 512 * info.st_blocks
        return sum(files.values())


def write_models(folder: Path, targets: dict[str, str], disk: str | None) -> list[str]:
    """Write models.toml into an empty folder; the command that builds it."""
    for path in folder.iterdir():
        if path.name != "lost+found":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = [f'[build]\ndisk = "{disk}"'] if disk else []
    lines += [f'[models.{name}]\nsource = "hf:bench/model"\n{of}' for name, of in targets.items()]
    models = folder / "models.toml"
    models.write_text("\n".join(lines) + "\n")
    return [sys.executable, "-m", "doit", f"models={models}"]


def digest(folder: Path) -> str:
    """The SHA-256 of a model's weight files, one after the other."""
    state = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while data := file.read(PIECE):
                state.update(data)
    return state.hexdigest()


class Benchmark:
    """The cases, one after another, with one hub."""

    def __init__(self, hub: Any, home: Path, size: int, arguments: argparse.Namespace) -> None:
        self.hub = hub
        self.size = size
        self.weights = size // 2  # all of two bytes; norms are too few to count
        self.scratch: Path = arguments.scratch
        self.disk: str | None = arguments.disk
        self.times: int = arguments.kills
        self.repeats: int = arguments.repeats
        self.environ = hub.environ(home)
        device = f'device = "{arguments.device}"\n'
        self.device: str = arguments.device
        self.lines = {name: device + lines for name, lines in VARIANTS.items()}
        self.four = {"four": self.lines["four"]}
        self.targets = {name: self.lines[name] for name in arguments.targets}

    def sent(self) -> int:
        """The bytes that the storage has sent since it was asked last."""
        with self.hub.lock:
            total = self._sent()
            del self.hub.requests[:]
        return total

    def _sent(self) -> int:
        return sum(request.sent for request in self.hub.asked(storage=True))

    def build(self) -> list[str]:
        """One target."""
        command = write_models(self.scratch, self.four, self.disk)
        return self._measured("build, 4 bit", command)

    def variants(self) -> list[str]:
        """Four targets."""
        command = write_models(self.scratch, self.lines, self.disk)
        return self._measured("four variants", command)

    def _measured(self, what: str, command: list[str]) -> list[str]:
        self.sent()
        used = MostUsed(self.scratch)
        used.start()
        usage = measure(command, HF_HUB_OFFLINE="0", **self.environ)
        used.stop()
        return self._row(what, usage.seconds, usage.peak_rss, used.most)

    def _row(self, what: str, seconds: float, memory: int, disk: int) -> list[str]:
        ratio = f"{self.sent() / self.size:.4f}"
        return [what, f"{seconds:.1f}", ratio, f"{memory / 2**20:,.0f}", f"{disk / 1e9:.2f}"]

    def beside(self) -> list[str]:
        """One target, and what else makes the same, in turn."""
        ours: list[float] = []
        theirs: list[float] = []
        online = {"HF_HUB_OFFLINE": "0", **self.environ}
        home = Path(self.environ["HF_HOME"])
        download, made = self.scratch / "download", self.scratch / "made"
        hf = [str(Path(sys.executable).with_name("hf")), "download", "bench/model"]
        convert = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(download), "-q"]
        for _ in range(self.repeats):
            shutil.rmtree(home, ignore_errors=True)
            command = write_models(self.scratch, self.four, self.disk)
            ours.append(measure(command, **online).seconds)
            shutil.rmtree(home, ignore_errors=True)
            write_models(self.scratch, {}, None)
            begin = time.perf_counter()
            measure([*hf, "--local-dir", str(download)], **online)
            measure([*convert, "--mlx-path", str(made)], **online)
            theirs.append(time.perf_counter() - begin)
        mine, other = statistics.median(ours), statistics.median(theirs)
        what = f"beside: {mine / other:.2f} of {other:.1f} s to download and convert"
        return [what, f"{mine:.1f}", "", "", ""]

    def limits(self) -> list[str]:
        """One target, and what no build of it can be quicker than, in turn."""
        online = {"HF_HUB_OFFLINE": "0", **self.environ}
        download, quantize = (ROOT / f"benchmarks/{n}_alone.py" for n in ("download", "quantize"))
        of = [str(self.weights), "--device", self.device]
        commands = {
            "download alone": [sys.executable, str(download), "bench/model"],
            "quantize alone": [sys.executable, str(quantize), *of],
            "build": write_models(self.scratch, self.four, self.disk),
        }
        usages: dict[str, list[Usage]] = {name: [] for name in commands}
        of_hub: dict[str, list[float]] = {name: [] for name in commands}
        used, fetched = MostUsed(self.scratch), 0
        used.start()
        for _ in range(self.repeats):
            write_models(self.scratch, self.four, self.disk)
            for name, command in commands.items():
                self.sent()
                begin = time.process_time()
                usages[name].append(measure(command, **online))
                of_hub[name].append(time.process_time() - begin)
            fetched += self.sent()
        used.stop()
        wall = {name: statistics.median(each.seconds for each in usages[name]) for name in usages}
        for name, each in usages.items():
            spent = statistics.median(usage.processor for usage in each)
            hub = statistics.median(of_hub[name])
            print(f"| {name}: processors {spent:.1f} s, of the hub {hub:.1f} s "
                  f"| {wall[name]:.1f} | | | |", flush=True)  # fmt: skip
        built = wall.pop("build")
        slower = max(wall.values())
        memory = max(usage.peak_rss for usage in usages["build"])
        return [
            f"limits: {built / slower:.2f} of {slower:.1f} s",
            f"{built:.1f}",
            f"{fetched / (self.repeats * self.size):.4f}",
            f"{memory / 2**20:,.0f}",
            f"{used.most / 1e9:.2f}",
        ]

    def kills(self) -> list[str]:
        """Targets, killed again and again."""
        command = write_models(self.scratch, self.targets, self.disk)
        self._measured("", command)
        expected = self._digests()
        command = write_models(self.scratch, self.targets, self.disk)
        environ = os.environ | self.environ
        self.sent()
        dice = random.Random(0)
        begin = time.perf_counter()
        used = MostUsed(self.scratch)
        used.start()
        for moment in sorted(dice.uniform(0, self.size) for _ in range(self.times)):
            process = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, start_new_session=True
            )
            while self._sent() < moment:
                if process.poll() is not None:
                    raise BenchmarkError(f"exit status {process.returncode}")
                time.sleep(POLL_SECONDS)
            time.sleep(dice.uniform(0, MOST_DELAY_SECONDS))  # lest it be always within a range
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(command, cwd=ROOT, env=environ, check=True, stdout=subprocess.DEVNULL)
        used.stop()
        if self._digests() != expected:
            raise BenchmarkError("a build that was killed has other bytes")
        what = f"{' and '.join(self.targets)}, killed {self.times} times"
        return self._row(what, time.perf_counter() - begin, 0, used.most)

    def _digests(self) -> list[str]:
        return [digest(self.scratch / "build" / name) for name in self.targets]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="of that shape (default: all)")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--disk", help="[build] disk (default: what is free)")
    parser.add_argument("--scratch", type=Path, help="an empty folder (default: a temporary one)")
    parser.add_argument("--cases", nargs="+", default=["build", "variants", "kills"])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--targets", nargs="+", choices=VARIANTS, default=["four"])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", type=float, help="MB a second that the storage sends at most")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments.scratch = (arguments.scratch or Path(folder, "scratch")).resolve()
        arguments.scratch.mkdir(exist_ok=True)
        shape = SHAPES[arguments.shape]
        shape = replace(shape, layers=arguments.layers or shape.layers)
        small = Path(folder, "small")
        checkpoint.write_config(small, shape, dtype=DTYPE)
        with hub_server.serve(Path(folder, "uploaded")) as hub:
            hub.rate = arguments.rate and arguments.rate * 1e6
            files = weight_files(shape, arguments.files)
            repository = hub.repository("bench/model")
            repository.add_folder(small)
            repository.add(files)
            size = sum(content.size for content in files.values())
            print(f"{size / 1e9:.2f} GB in {len(files)} files, disk {arguments.disk or 'as it is'}")
            print("| case | wall, s | fetched ÷ checkpoint | memory, MiB | disk, GB |")
            print("|---|---|---|---|---|", flush=True)
            benchmark = Benchmark(hub, Path(folder, "home"), size, arguments)
            for case in arguments.cases:
                print(f"| {' | '.join(getattr(benchmark, case)())} |", flush=True)


if __name__ == "__main__":
    main()

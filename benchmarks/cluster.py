"""cluster: builds on a Dask cluster: beside one process, at a simulated scale, and under kills.

    python benchmarks/cluster.py beside CHECKPOINT      # two workers of a core, a process of two
    python benchmarks/cluster.py scale                  # 64 workers that sleep, 6 of 671 B
    python benchmarks/cluster.py kills CHECKPOINT       # 100 kills over ten builds

``beside`` takes turns, ``--repeats`` times, each from nothing: wall, and processor time of all that
takes part; a worker is pinned to a core of its own, and the coordinator to both. The bytes are
compared. ``scale`` has mlx-make itself quantize DeepSeek-V3 in six ways, of a hub that has its
headers, on workers that sleep for as long as such layers take at ``--rate``, and then hand back
digests; no weights are moved, and nothing is packed. Linear is what all units take, divided by the
workers; no schedule is faster than the best one, which is near that of the longest first.
``kills`` ends workers and coordinators by SIGKILL at random moments; a killed worker
comes back, and a killed build is run again. What the workers say they computed is counted.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import os
import pickle
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import cluster, hub_server  # noqa: E402 - of the tests, which are no package
from support.hub_repositories import OnDisk  # noqa: E402

WORKERS = 64  # in one process: they sleep
BITS, GROUP_SIZES = (2, 4, 8), (32, 64)
CANNED = "canned.pickle"


# Beside one process


def models_toml(checkpoint: Path) -> str:
    """Four bits of a checkpoint."""
    return f'[models.m]\nsource = "{checkpoint.absolute()}"\nquantize = {{ bits = 4 }}\n'


def doit(folder: Path, said: dict[str, str], pinned: str = "0,1") -> subprocess.Popen[str]:
    """Start a build on some cores."""
    call = [sys.executable, "-m", "doit", f"models={folder / 'models.toml'}"]
    return subprocess.Popen(
        ["taskset", "-c", pinned, *call],
        cwd=ROOT, env={**os.environ, **said}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def fresh(folder: Path, checkpoint: Path) -> Path:
    """A project that has built nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "models.toml").write_text(models_toml(checkpoint))
    return folder


def weights(folder: Path) -> str:
    """A digest of what was built."""
    files = sorted((folder / "build" / "m").iterdir())
    digests = [hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def seconds_of(pids: Sequence[int]) -> float:
    """Processor time of processes so far."""
    ticks = 0
    for pid in pids:
        ticks += sum(
            map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])
        )
    return ticks / os.sysconf("SC_CLK_TCK")


def built(folder: Path, said: dict[str, str], workers: Sequence[int]) -> tuple[float, float]:
    """Build; return wall time and that of all processors, and the workers' own beside it."""
    before, spent = seconds_of(workers), resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    process = doit(folder, said)
    output, _ = process.communicate()
    wall = time.perf_counter() - begin
    assert process.returncode == 0, output
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
    return wall, own + seconds_of(workers) - before


def beside(work: Path, checkpoint: Path, repeats: int) -> None:
    """Two workers of a core each beside one process of two cores."""
    walls: dict[str, list[float]] = {"one process": [], "two workers": []}
    spent: dict[str, list[float]] = {"one process": [], "two workers": []}
    for _ in range(repeats):
        alone = fresh(work / "alone", checkpoint)
        wall, cpu = built(alone, {}, [])
        walls["one process"].append(wall)
        spent["one process"].append(cpu)
        together = fresh(work / "together", checkpoint)
        folder = work / "cluster"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with cluster.running(folder, [], ["good"], ["good"]) as (scheduler, processes):
            pids = [each.process.pid for each in processes[1:]]
            for core, pid in enumerate(pids):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    os.sched_setaffinity(int(thread.name), {core})
            said = {"MLX_MAKE_BUILD_CLUSTER": str(scheduler)}
            wall, cpu = built(together, said, [each.process.pid for each in processes])
        walls["two workers"].append(wall)
        spent["two workers"].append(cpu)
        assert weights(alone) == weights(together)
    print("| | wall, s | processor, s |\n|---|---|---|")
    for name in walls:
        print(f"| {name} | {statistics.median(walls[name]):.1f} | "
              f"{statistics.median(spent[name]):.1f} |")  # fmt: skip
    for name, measured in (("wall", walls), ("processor", spent)):
        pairs = zip(measured["one process"], measured["two workers"], strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        print(f"{name}: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})")


# At scale


class _Sparse(OnDisk):  # type: ignore[misc]
    """A file of which only the header is read: to digest its holes would take hours."""

    @property
    def sha256(self) -> str:
        """Some digest."""
        return hashlib.sha256(self.path.name.encode()).hexdigest()


@contextmanager
def hub(work: Path) -> Iterator[None]:
    """A hub that has DeepSeek-V3's headers, for this process and those that it starts."""
    import packed

    source = work / "source"
    table = packed.headers(packed.deepseek(packed.DEEPSEEK), fp8=True)
    packed.write(source, packed.DEEPSEEK, table, files=163, filled=False)
    with hub_server.serve(work / "uploaded") as server, server.inside(work / "home"):
        files = ((p, _Sparse if p.suffix == ".safetensors" else OnDisk) for p in source.iterdir())
        server.repository("org/model").add({path.name: kind(path) for path, kind in files})
        (work / "models.toml").write_text(
            "".join(
                f'[models.m{bits}-{size}]\nsource = "hf:org/model"\n'
                f"quantize = {{ bits = {bits}, group_size = {size} }}\n"
                for bits in BITS
                for size in GROUP_SIZES
            )
        )
        yield


def planned(work: Path) -> list[Any]:
    """The plans of the targets, by headers alone."""
    from tasks.cli.session import Session
    from tasks.config import reader

    return [*Session.open(reader.load(work / "models.toml")).plans.values()]


def can(work: Path, rate: float) -> None:
    """Write what the simulated workers hand back, and how long each takes."""
    from cache.digest import digest
    from tasks.execution.cluster.unit import Made, Result, signature, units
    from tasks.execution.log import Trace

    trace = Trace("simulated", "thread", 0.0, 1.0, 0, 0)
    canned = {}
    for plan in planned(work):
        for unit in dict.fromkeys(units(plan).values()):
            known: dict[Any, Any] = {}
            outputs = [[*node.outputs(known)] for node in unit.nodes]
            results = [
                Result("".join(digest(name.encode()) for name in names), (), "computed", trace)
                for names in outputs
            ]
            made = Made("", "simulated", results, True, signature(unit.key, results, None))
            canned[unit.key] = unit.nbytes / rate, pickle.dumps(made)
    (work / CANNED).write_bytes(pickle.dumps(canned))


def sleeps(bench: Any) -> None:
    """Have a worker sleep, and hand back what was prepared."""
    canned = _canned(Path(os.environ["CANNED"]))

    def make(request: bytes, key: str, layers: Any) -> Any:
        seconds, made = canned[key]
        time.sleep(seconds)
        return pickle.loads(made)._replace(worker=bench.address)

    bench.make = make


def _canned(path: Path, known: dict[Path, Any] = {}) -> Any:  # noqa: B006 - one for all workers
    if path not in known:
        known[path] = pickle.loads(path.read_bytes())
    return known[path]


def coordinate(work: Path) -> None:
    """Build, as mlx-make does but for the bytes, and say what that took of this process."""
    from support import inside
    from tasks.execution.builder import Builder
    from tasks.execution.cluster.coordinator import Cluster
    from tasks.execution.disk import DiskNeed

    begun: list[tuple[float, float]] = []
    spent: list[float] = []
    make = Cluster.make

    def noting(*args: Any) -> Any:
        begun.append((time.perf_counter(), time.process_time()))
        return make(*args)

    setattr(Cluster, "make", noting)  # noqa: B010 - a method, to mypy
    setattr(Builder, "shared", lambda *_: None)  # noqa: B010 - no bytes are wanted
    taken = Cluster._taken

    def metered(*args: Any) -> Any:
        start = time.thread_time()
        try:
            return taken(*args)
        finally:
            spent.append(time.thread_time() - start)

    setattr(Cluster, "_taken", metered)  # noqa: B010
    setattr(DiskNeed, "check", lambda _: None)  # noqa: B010 - nor room for them
    status, _, said = inside.run(work, "quantize")
    assert not status, said
    wall, cpu = time.perf_counter() - begun[0][0], time.process_time() - begun[0][1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    each = [seconds for seconds, _ in _canned(work / CANNED).values()]
    linear, bound = sum(each) / WORKERS, scheduled(each)
    print(
        f"{len(spent)} units of {statistics.median(each):.1f} s: {wall:.1f} s; linear "
        f"{linear:.1f} s ({linear / wall:.2f}), scheduled by hand {bound:.1f} s "
        f"({bound / wall:.2f})\ncoordinator: {cpu / wall:.2f} cores, {peak:.2f} GiB; "
        f"{1000 * sum(spent) / len(spent):.1f} ms a unit to take its result over, "
        f"{1000 * cpu / len(spent):.1f} ms with all that doit does"
    )


def scheduled(each: Sequence[float]) -> float:
    """When the last of these is done, the longest begun first, if nothing else takes time."""
    ends = [0.0] * WORKERS
    for seconds in sorted(each, reverse=True):
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def scale(work: Path, rate: float) -> None:
    """64 workers that sleep."""
    with hub(work):
        subprocess.run([sys.executable, __file__, "can", str(work), str(rate)], check=True)
        os.environ |= {"CANNED": str(work / CANNED), "CLUSTER_SECONDS": "3600"}
        with cluster.running(work, [], ["sleeps"] * WORKERS) as (scheduler, _):
            os.environ["MLX_MAKE_BUILD_CLUSTER"] = str(scheduler)
            subprocess.run([sys.executable, __file__, "coordinate", str(work)], check=True)


# Under kills


def kills(work: Path, checkpoint: Path, count: int, builds: int, seed: int) -> None:
    """Kill workers and coordinators at random."""
    draw = random.Random(seed)
    reference = fresh(work / "reference", checkpoint)
    built(reference, {}, [])
    expected = weights(reference)
    os.environ["CLUSTER_SECONDS"] = "3600"
    folder = work / "cluster"
    folder.mkdir()
    killed = {"worker": 0, "coordinator": 0}
    made = 0
    for number in range(builds):
        project = fresh(work / f"build{number}", checkpoint)
        with _cluster_of(folder / str(number), 3) as (scheduler, workers):
            said = {"MLX_MAKE_BUILD_CLUSTER": str(scheduler)}
            process = doit(project, said)
            time.sleep(3)  # to begin: before that a kill ends nothing
            for _ in range(count // builds):
                time.sleep(draw.uniform(0.5, 6))
                if process.poll() is not None:
                    break
                if draw.random() < 0.25:
                    process.kill()
                    process.communicate()
                    process = doit(project, said)
                    killed["coordinator"] += 1
                else:
                    workers[draw.randrange(len(workers))].again()
                    killed["worker"] += 1
            output, _ = process.communicate()
            assert process.returncode == 0, output
            assert weights(project) == expected, f"build {number} has other bytes"
            lines = [line for worker in workers for line in worker.lines()]
        made += len(lines)
        print(
            f"build {number}: {len({*lines})} units, made {len(lines)} times, {killed}", flush=True
        )
        shutil.rmtree(project)
    print(f"{builds} builds, the same bytes; killed {killed}; units made {made} times")


class _Again:
    """A worker's process that comes back when it is killed."""

    def __init__(self, file: Path, folder: Path, number: int) -> None:
        self._file, self._folder, self._number, self._times = file, folder, number, 0
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._times += 1
        log = self._folder / f"worker-{self._number}-{self._times}.log"
        started: subprocess.Popen[bytes] = cluster.start(self._file, log, ["says"])
        return started

    def again(self) -> None:
        """Kill it, and start it anew."""
        self.kill()
        self._process = self._start()

    def kill(self) -> None:
        """Kill it."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def lines(self) -> list[str]:
        """What it computed, all its lives together."""
        logs = self._folder.glob(f"worker-{self._number}-*.log")
        return [
            line for log in logs for line in log.read_text().splitlines()
            if line.startswith("made")
        ]  # fmt: skip


@contextmanager
def _cluster_of(folder: Path, count: int) -> Iterator[tuple[Path, list[_Again]]]:
    folder.mkdir(parents=True)
    with cluster.running(folder, []) as (file, _), ExitStack() as stack:
        workers = [_Again(file, folder, number) for number in range(count)]
        for worker in workers:
            stack.callback(worker.kill)
        yield file, workers


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["beside", "scale", "kills", "can", "coordinate"])
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.8e9, help="bytes a second of a worker")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--builds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=None)
    asked = parser.parse_args()
    if asked.what == "can":
        can(Path(asked.arguments[0]), float(asked.arguments[1]))
        return
    if asked.what == "coordinate":
        coordinate(Path(asked.arguments[0]))
        return
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        if asked.what == "beside":
            beside(Path(scratch), Path(asked.arguments[0]), asked.repeats)
        elif asked.what == "scale":
            scale(Path(scratch), asked.rate)
        else:
            kills(Path(scratch), Path(asked.arguments[0]), asked.count, asked.builds, asked.seed)


if __name__ == "__main__":
    main()

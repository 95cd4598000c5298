"""cluster: builds on a Dask cluster: beside one process, at a simulated scale, and under kills.

    python benchmarks/cluster.py beside CHECKPOINT      # two workers of a core, a process of two
    python benchmarks/cluster.py scale                  # 64 workers that sleep, four 671 B targets
    python benchmarks/cluster.py kills CHECKPOINT       # 100 kills over ten builds

``beside`` takes turns, ``--repeats`` times, each from nothing: wall, and processor time of all that
takes part; a worker is pinned to a core of its own, and the coordinator to both. The bytes are
compared. ``scale`` plans DeepSeek-V3 from headers, for each of four widths, and hands its units
to workers that sleep for as long as such layers take at ``--rate``, and then hand back results of
the right names, dtypes and shapes; no weights are moved. Linear is what all units take, divided by
the workers. ``kills`` ends workers and coordinators by SIGKILL at random moments; a killed worker
comes back, and a killed build is run again. What the workers say they computed is counted.
"""

from __future__ import annotations

import argparse
import hashlib
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import cluster  # noqa: E402 - of the tests, which are no package

WORKERS = 64
PROCESSES = 4  # that the simulated workers share
WIDTHS = (3, 4, 6, 8)
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


def planned(work: Path) -> Any:
    """A session of four targets of DeepSeek-V3, by headers alone."""
    import packed

    from tasks.cli.session import Session
    from tasks.config import reader

    source = work / "source"
    if not source.exists():
        table = packed.headers(packed.deepseek(packed.DEEPSEEK), fp8=True)
        packed.write(source, packed.DEEPSEEK, table, files=163, filled=False)
    bits = ", ".join(map(str, WIDTHS))
    text = f'[models.m]\nsource = "{source}"\nquantize = {{}}\nmatrix = {{ bits = [{bits}] }}\n'
    (work / "models.toml").write_text(text)
    session = Session.open(reader.load(work / "models.toml"))
    return session, [plan for name, plan in session.plans.items() if name != "m"]


def can(work: Path, rate: float) -> None:
    """Write what the simulated workers hand back, and how long each takes."""
    from cache.digest import digest
    from cache.records.manifests import Manifest, Tensor
    from tasks.execution.cluster.unit import Made, Result, signature, units
    from tasks.execution.log import Trace

    _, plans = planned(work)
    canned = {}
    for plan in plans:
        for unit in dict.fromkeys(units(plan).values()):
            manifests: dict[Any, Manifest] = {}
            results = []
            for node in unit.nodes:
                tensors = {
                    name: Tensor(*spec, digest(f"{node.name} {name}".encode()))
                    for name, spec in node.output_specs().items()
                }
                inputs = (
                    node.as_inputs(tensors) if node.is_leaf
                    else node.inputs({need: manifests[need] for need in node.needs})
                )  # fmt: skip
                manifests[node] = Manifest(node.action(inputs), tensors)
                trace = Trace("simulated", "thread", 0.0, 1.0, 0, 0)
                results.append(Result(manifests[node].to_bytes(), "computed", trace))
            leaf = next(node for node in unit.nodes if node.is_leaf)
            nbytes = sum(spec.nbytes for spec in leaf.output_specs().values())
            made = Made("", "simulated", results, True, signature(unit.key, results, None))
            canned[unit.key] = nbytes / rate, pickle.dumps(made)
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


def coordinate(work: Path, scheduler: str) -> None:
    """Hand all units out, as doit's threads would, and say what that took of this process."""
    from functools import partial

    from tasks.execution.cluster.coordinator import Cluster
    from tasks.execution.cluster.unit import Request, Settings, units
    from tasks.execution.resources import CLUSTER_THREADS

    session, plans = planned(work)
    settings = Settings(session.config.quality, None, None)
    crew = Cluster(scheduler, partial(Request.of, lock=session.lock, settings=settings), stops=True)
    recorder: Any = _Recorder(session.builder)
    nodes = [
        (plan, unit.nodes[0]) for plan in plans for unit in dict.fromkeys(units(plan).values())
    ]
    canned = _canned(work / CANNED)
    each = [canned[unit.key][0] for plan in plans for unit in dict.fromkeys(units(plan).values())]
    linear = sum(each) / WORKERS
    begin, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(CLUSTER_THREADS) as pool:
        made = list(pool.map(lambda node: crew.make(recorder, *node), nodes))
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    crew.close()
    assert all(made)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(
        f"{len(nodes)} units of {statistics.median(each):.1f} s: {wall:.1f} s, "
        f"linear {linear:.1f} s ({linear / wall:.2f}); {cpu / wall:.2f} cores, "
        f"{1000 * cpu / len(nodes):.1f} ms a layer, "
        f"{peak:.2f} GiB with the plans"
    )


class _Recorder:
    """A builder that wants no bytes."""

    def __init__(self, builder: Any) -> None:
        self.store, self.take = builder.store, builder.take

    def shared(self, *_: Any) -> None:
        """Return None: no bytes are wanted."""


def scale(work: Path, rate: float) -> None:
    """64 workers that sleep."""
    subprocess.run([sys.executable, __file__, "can", str(work), str(rate)], check=True)
    os.environ |= {"CANNED": str(work / CANNED), "CLUSTER_SECONDS": "3600"}
    kinds = ["sleeps"] * (WORKERS // PROCESSES)
    with cluster.running(work, [], *[kinds] * PROCESSES) as (scheduler, _):
        call = [sys.executable, __file__, "coordinate", str(work), str(scheduler)]
        subprocess.run(call, check=True)


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
        coordinate(Path(asked.arguments[0]), asked.arguments[1])
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

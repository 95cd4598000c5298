"""cluster: a Dask scheduler and workers on loopback, good ones and bad ones, in processes.

`python -m support.cluster FILE KIND …` is one, `… FILE scheduler KIND …` that which writes the
scheduler's file; the others wait for it. All workers of a process share its event loop; a process
of its own is to be killed.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from support.front_door import REPOSITORY

PATIENCE = 60  # seconds
SCHEDULER = "scheduler"
LONGEST = int(os.environ.get("CLUSTER_SECONDS", "300"))


@dataclass
class Process:
    """One of the cluster's processes.

    Attributes:
        process: of the system.
        log: what it printed.
    """

    process: subprocess.Popen
    log: Path

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()


@contextmanager
def running(folder: Path, *processes: list[str]) -> Iterator[tuple[Path, list[Process]]]:
    """Run processes with workers of these kinds; the first has the scheduler, too.

    Args:
        folder: for the scheduler's file, logs and the workers' own folders.
        processes: the kinds of the workers of each, see `KINDS`.
    """
    file = folder / "scheduler.json"
    with ExitStack() as stack:
        started = []
        for number, kinds in enumerate(processes):
            log = folder / f"process-{number}.log"
            first = [] if number else [SCHEDULER]
            started.append(Process(start(file, log, [*first, *kinds]), log))
            stack.callback(started[-1].end)
        wanted = sum(map(len, processes))
        await_true(lambda: file.exists() and _ready(folder) == wanted)
        yield file, started


def start(file: Path, log: Path, kinds: list[str]) -> subprocess.Popen:
    """Start one of the processes, which is the caller's to end."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    with log.open("w") as output:
        process: subprocess.Popen = subprocess.Popen(
            [sys.executable, "-m", "support.cluster", str(file), *kinds],
            cwd=log.parent,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )
    return process


def _ready(folder: Path) -> int:
    return sum(log.read_text().count("ready\n") for log in folder.glob("process-*.log"))


def await_true(condition: Any) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def _flips_a_byte(bench: Any) -> None:
    read = bench.read

    def lying(**asked: Any) -> Any:
        print("lied", flush=True)
        data = read(**asked)
        if data:
            data[0] ^= 1
        return data

    bench.read = lying


def _other_shape(bench: Any) -> None:
    """Results well sealed, with one tensor left out."""
    from tasks.execution.cluster.unit import DIGITS, signature

    make = bench.make

    def lying(request: bytes, key: str, layers: Any) -> Any:
        made = make(request, key, layers)
        print("lied", flush=True)
        *others, last = made.results
        results = [*others, last._replace(digests=last.digests[DIGITS:])]
        return made._replace(results=results, signature=signature(key, results, None))

    bench.make = lying


def _full_disk(bench: Any) -> None:
    import errno

    def full(*_: Any) -> Any:
        print("full", flush=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    bench._make = full


def _raises(bench: Any) -> None:
    def fail(*_: Any) -> Any:
        print("raised", flush=True)
        raise RuntimeError("[metal] out of memory")

    bench._make = fail


def _reads_another(bench: Any) -> None:
    """Of the checkpoint's files, which have other bytes where this worker is."""
    import pickle

    from msgspec import structs

    make = bench.make

    def lying(request: bytes, key: str, layers: Any) -> Any:
        print("lied", flush=True)
        asked = pickle.loads(request)
        source = asked.target.source
        other = structs.replace(source, location=f"{source.location}-other")
        target = structs.replace(asked.target, source=other)
        return make(pickle.dumps(asked._replace(target=target), 5), key, layers)

    bench.make = lying


def _other_store(bench: Any) -> None:
    """What has the remote store's name where this worker is, is another."""
    shares = bench._shares

    def other(remote: Any) -> Any:
        return shares(remote and remote._replace(url=f"{remote.url}-of-another"))

    bench._shares = other


def _says_what_it_makes(bench: Any) -> None:
    make = bench.make

    def saying(request: bytes, key: str, layers: Any) -> Any:
        made = make(request, key, layers)
        if any(result.outcome == "computed" for result in made.results):
            print("made", key, flush=True)
        return made

    bench.make = saying


def _sleeps(bench: Any) -> None:
    """As `benchmarks/cluster.py` simulates it."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    import cluster

    cluster.sleeps(bench)


def _hangs(bench: Any) -> None:
    def hang(*_: Any) -> Any:
        print("hangs", flush=True)
        time.sleep(PATIENCE)

    bench.make = hang


# What is done to a worker; None: it has no mlx-make at all.
KINDS: dict[str, Any] = {
    "good": lambda bench: None,
    "flips a byte": _flips_a_byte,
    "other shape": _other_shape,
    "full disk": _full_disk,
    "raises": _raises,
    "other store": _other_store,
    "reads another": _reads_another,
    "hangs": _hangs,
    "says": _says_what_it_makes,
    "sleeps": _sleeps,
    "other key": lambda bench: None,
    "other mlx-lm": lambda bench: None,
    "plain": None,
}


@contextmanager
def _versions(others: dict[str, str]) -> Iterator[None]:
    """Have packages other versions than they have."""
    from importlib import metadata

    found = metadata.version

    def version(name: str) -> str:
        return others.get(name) or found(name)

    with mock.patch.object(metadata, "version", version):
        yield


async def _serve(file: Path, kinds: list[str]) -> None:
    from distributed import Scheduler, Worker

    async with asyncio.timeout(LONGEST):  # whatever becomes of who started it
        if kinds[:1] == [SCHEDULER]:
            kinds = kinds[1:]
            scheduler = await Scheduler(host="127.0.0.1", port=0, dashboard=False)
            scheduler.scheduler_file = str(file)
            file.with_suffix(".part").write_text(f'{{"address": "{scheduler.address}"}}')
            file.with_suffix(".part").rename(file)
        while not file.exists():
            await asyncio.sleep(0.02)
        for number, kind in enumerate(kinds):
            os.environ["MLX_MAKE_SIGNING_KEY"] = "another" if kind == "other key" else ""
            with _versions({"mlx-lm": "0.0.1"} if kind == "other mlx-lm" else {}):
                worker = await Worker(
                    scheduler_file=str(file),
                    nthreads=1,
                    host="127.0.0.1",
                    preload=["mlx_make.worker"] if KINDS[kind] else [],
                    local_directory=str(file.parent / f"{os.getpid()}-{number}"),
                    dashboard=False,
                )
            if KINDS[kind]:
                KINDS[kind](worker.mlx_make)
            print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2:]))

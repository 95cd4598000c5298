"""shared_build: what an empty remote store costs a cold build, and a full one a second machine.

Prints Markdown tables.

    python benchmarks/shared_build.py CHECKPOINT                 # a folder, 3 repeats
    python benchmarks/shared_build.py CHECKPOINT --repeats 5

The same build from nothing, to 4 bits, takes turns: without a remote, with an empty one that is
only read, and with an empty one that is written to. The server is `rclone serve s3` on loopback, on
the same cores; its folder is emptied before each build. The time is that of the whole command, all
uploads included, CPU that of doit without the server, whose own stands beside it; "uploads alone"
is what doit says it waited for them at the end. Then a machine that has models.toml, models.lock
and nothing else builds from what one of them uploaded, to a server that counts requests.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support import servers  # noqa: E402 - of the tests, which are no package

MODES = {"without a remote": "off", "empty, read-only": "read-only", "empty": "read-write"}
KEEPS = {"by default": {}, "cast": {"MLX_MAKE_CACHE_KEEP": "cast"}}


@dataclass
class Row:
    """What one side took, by repeat: seconds, and bytes uploaded in MB."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    servers: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    uploaded: float = 0.0


def build(
    folder: Path, checkpoint: Path, environ: dict[str, str], lock: Path | None = None
) -> tuple[float, float, str]:
    """Build from nothing; return its seconds, those of its CPUs, and what doit said."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if lock:
        shutil.copy(lock, folder)
    text = f'[models.model]\nsource = "{checkpoint}"\nquantize = {{ bits = 4 }}\n'
    (folder / "models.toml").write_text(text)
    os.sync()
    command = [sys.executable, "-m", "doit", f"models={folder / 'models.toml'}"]
    start, spent = time.perf_counter(), _cpu()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environ, check=True, capture_output=True, text=True
    )
    return time.perf_counter() - start, _cpu() - spent, done.stdout


def _cpu() -> float:
    """Return the CPU seconds of all commands that have ended; the server is none of them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def second_machine(scratch: Path, checkpoint: Path) -> None:
    """Print what a machine that has no checkpoint asks of a full remote store."""
    here = scratch / "checkpoint"
    here.symlink_to(checkpoint.resolve())
    with servers.faulty() as server:
        environ = {"MLX_MAKE_CACHE_REMOTE": f"http://127.0.0.1:{server.port}/store"}
        one, two = scratch / "one", scratch / "two"
        build(one, here, environ)
        here.unlink()
        server.requests.clear()
        seconds, cpu, _ = build(two, here, environ, one / "models.lock")
        requests = server.requests
    built = [(f / "build/model/model.safetensors").read_bytes() for f in (one, two)]
    assert built[0] == built[1], "the second machine has built something else"
    size = sum(path.stat().st_size for path in (two / "build/model").iterdir())
    fetched = sum(request.sent or 0 for request in requests)
    print("\n| output, MB | requests | bytes / output | wall, s | CPU, s |\n|---|---|---|---|---|")
    counts = f"{size / 1e6:,.0f} | {len(requests)} | {fetched / size:.4f}"
    print(f"| {counts} | {seconds:.2f} | {cpu:.1f} |")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="default: a temporary folder")
    arguments = parser.parse_args()
    rows = {(keep, name): Row() for keep in KEEPS for name in MODES}
    with (
        tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch,
        servers.s3(Path(scratch) / "s3") as server,
    ):
        build(
            Path(scratch) / "build", arguments.checkpoint, {"MLX_MAKE_CACHE_MODE": "off"}
        )  # warm-up
        for _ in range(arguments.repeats):
            for (keep, name), row in rows.items():
                shutil.rmtree(server.folder, ignore_errors=True)
                environ = server.environ | {
                    "MLX_MAKE_CACHE_REMOTE": server.url,
                    "MLX_MAKE_CACHE_MODE": MODES[name],
                    **KEEPS[keep],
                }
                assert server.process
                before = _cpu_of(server.process.pid)
                seconds, cpu, said = build(Path(scratch) / "build", arguments.checkpoint, environ)
                row.seconds.append(seconds)
                row.cpu.append(cpu)
                row.servers.append(_cpu_of(server.process.pid) - before)
                if uploaded := re.search(r"uploaded, ([\d.,]+) MB; the last ([\d.]+) s", said):
                    row.uploaded = float(uploaded[1].replace(",", ""))
                    row.alone.append(float(uploaded[2]))
        second_machine(Path(scratch), arguments.checkpoint)
    print("\n| keep | remote | wall, s | min–max | CPU, s | server's CPU, s | uploads alone, s | "
          "uploaded, MB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for (keep, name), row in rows.items():
        beside = rows[keep, "without a remote"]
        span = f"{min(row.seconds):.2f}–{max(row.seconds):.2f}"
        alone = f"{statistics.median(row.alone):.1f}" if row.alone else "–"
        print(f"| {keep} | {name} | {_beside(row.seconds, beside.seconds)} | {span} | "
              f"{_beside(row.cpu, beside.cpu)} | {statistics.median(row.servers):.1f} | {alone} | "
              f"{row.uploaded:,.0f} |")  # fmt: skip


def _beside(ours: list[float], without: list[float]) -> str:
    """Return a median, and how many times that of another side it is."""
    median = statistics.median(ours)
    return f"{median:.2f} ({median / statistics.median(without):.2f}×)"


if __name__ == "__main__":
    main()

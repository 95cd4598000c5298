"""measure: run a command and tell its time, memory and input and output, all descendants included.

Linux only: the figures come from /proc. compare.py says what each of them means.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.005
ORPHAN_SECONDS = 60
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class BenchmarkError(Exception):
    """A measured command failed, or two outputs that must be equal differ."""


@dataclass(frozen=True)
class Usage:
    """What one command, or several in a row, took. All but seconds and processor is in bytes.

    Attributes:
        processor: seconds of processors, of the command and all that it waited for.
    """

    seconds: float
    peak_rss: int = 0
    peak_anonymous: int = 0
    written: int = 0
    write_calls: int = 0
    read_calls: int = 0
    processor: float = 0.0

    def then(self, later: Usage) -> Usage:
        """This and a later one as one: what passes adds up, of peaks the higher one stays."""
        return Usage(
            self.seconds + later.seconds,
            max(self.peak_rss, later.peak_rss),
            max(self.peak_anonymous, later.peak_anonymous),
            self.written + later.written,
            self.write_calls + later.write_calls,
            self.read_calls + later.read_calls,
            self.processor + later.processor,
        )


def proc_fields(path: str) -> dict[str, int]:
    """The numbers of a /proc file of `name: number [kB]` lines, in bytes; {} once it is gone."""
    try:
        lines = Path(path).read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # the process ended meanwhile
        return {}
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        number, *unit = value.split() or [""]
        if number.isdigit():
            fields[name] = int(number) * (1024 if unit == ["kB"] else 1)
    return fields


def process_tree(pid: int) -> Iterator[int]:
    """The process and all its living descendants."""
    pending = [pid]
    while pending:
        pid = pending.pop()
        yield pid
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                children = Path(f"/proc/{pid}/task/{thread}/children").read_text()
                pending.extend(map(int, children.split()))
        except (FileNotFoundError, ProcessLookupError):
            continue


class PeakMemory(threading.Thread):
    """Samples the memory of a process tree until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.rss = 0
        self.anonymous = 0
        self._pid = pid
        self._ended = threading.Event()

    def run(self) -> None:
        """Samples; the thread's body."""
        while not self._ended.wait(SAMPLE_SECONDS):
            fields = [proc_fields(f"/proc/{pid}/status") for pid in process_tree(self._pid)]
            self.rss = max(
                self.rss,
                sum(of.get("VmRSS", 0) for of in fields),
                *(of.get("VmHWM", 0) for of in fields),
            )
            self.anonymous = max(self.anonymous, sum(of.get("RssAnon", 0) for of in fields))

    def stop(self) -> None:
        """Ends the sampling, and returns once the thread is done."""
        self._ended.set()
        self.join()


def _wait_for_orphans() -> None:
    """Waits for what a command left behind it (doit: removing what it replaced).

    It is not counted, as nobody waits for it; but the next command must not run beside it.

    Raises:
        BenchmarkError: if it does not end.
    """
    end = time.monotonic() + ORPHAN_SECONDS
    with suppress(ChildProcessError):
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(SAMPLE_SECONDS)
        raise BenchmarkError(f"what a command left behind it still runs after {ORPHAN_SECONDS} s")


def _processor_seconds() -> float:
    """What all commands that have ended took of the processors."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(command: Sequence[str], **environ: str) -> Usage:
    """Runs the command in the repository root and tells what it took.

    Args:
        command: the command.
        environ: variables that it is to have.

    Raises:
        BenchmarkError: if it fails; the message ends with what it printed last.
    """
    # Orphans become this process's children.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    os.sync()  # lest writes of an earlier command are still under way
    # Everything is local here: without this, a hub that does not answer would be measured too.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environ
    # What pip installs is compiled: the checkout's modules are to be so after the warm-up.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile() as printed:
        start, spent = time.perf_counter(), _processor_seconds()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        peak = PeakMemory(process.pid)
        peak.start()
        # Left as a zombie, so that /proc still has its counters. They hold those of each child that
        # it waited for.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - start
        counts = proc_fields(f"/proc/{process.pid}/io")
        peak.stop()
        status = process.wait()
        processor = _processor_seconds() - spent
        _wait_for_orphans()
        if status:
            printed.seek(0)
            tail = printed.read().decode(errors="replace")[-3000:]
            raise BenchmarkError(f"exit status {status} of: {shlex.join(command)}\n{tail}")
    return Usage(
        seconds,
        peak.rss,
        peak.anonymous,
        counts["write_bytes"],
        counts["wchar"],
        counts["rchar"],
        processor,
    )

"""timeline: a target's last build by the build log: threads, cache hits, the critical path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.task_names import PACK, task_name
from tasks.execution.log import MAX_BYTES, Entry, parse
from tasks.planning.plan import Plan
from tasks.stages import registry


@dataclass(frozen=True)
class Timeline:
    """The run of doit in which a target was last packed, up to then.

    Attributes:
        target: the target's name.
        entries: the log's lines of what was done in that run from when it began with the target,
            whatever they are of.
        critical: the target's lines that had to follow one another, and took longest together.
        cut: whether the log may have lost the run's beginning.
    """

    target: str
    entries: list[Entry]
    critical: list[Entry]
    cut: bool

    @property
    def mine(self) -> list[Entry]:
        """The lines of the target's own tasks that build it."""
        return [entry for entry in self.entries if self.builds(entry)]

    def builds(self, entry: Entry) -> bool:
        """Tell whether a line is of a task that builds the target."""
        return entry.target == self.target and entry.group in registry.building()

    @property
    def machines(self) -> list[str]:
        """Names of the cluster's machines that took part."""
        return sorted({entry.machine for entry in self.entries if entry.machine})

    @property
    def start(self) -> float:
        """When the first of the target's tasks began, Unix time, seconds."""
        return min(entry.start for entry in self.mine)

    @property
    def seconds(self) -> float:
        """Seconds from then to the end of the last."""
        return max(end(entry) for entry in self.mine) - self.start

    @property
    def threads(self) -> list[str]:
        """Names of the threads, with their machines', in the order in which they began."""
        ordered = sorted(self.entries, key=lambda entry: entry.start)
        return list(dict.fromkeys(entry.lane for entry in ordered))


def end(entry: Entry) -> float:
    """Return when a task ended, Unix time, seconds."""
    return entry.start + entry.seconds


def last_run(log: Path, target: str) -> str | None:
    """Return the id of the run in which a target was last packed, if the log has it."""
    last = _last_pack(_read(log), target)
    return last[1].run if last else None


def read(log: Path, plan: Plan) -> Timeline | None:
    """Return a target's last build, or None if the log does not have it (any more)."""
    data = _read(log)
    target = plan.target.name
    last = _last_pack(data, target)
    if last is None:
        return None
    stop, packed = last
    entries = _meanwhile(data[:stop].splitlines(), packed)
    first = parse(data.partition(b"\n")[0])
    # A trimmed log begins in the middle of a run, and is still long.
    cut = first is not None and first.run == packed.run and len(data) > MAX_BYTES // 4
    needs = {task_name(PACK, target): [node.name for node in plan.last]}
    for stage in plan.stages.values():
        needs |= {node.name: [need.name for need in node.needs] for node in stage}
    mine = {entry.task: entry for entry in entries if entry.target == target}
    return Timeline(target, entries, critical_path(mine, needs, packed.task), cut)


def _meanwhile(lines: Sequence[bytes], packed: Entry) -> list[Entry]:
    """Return what was done in a run from when it began with a target to when that was packed.

    Of a run of a thousand targets each one's is a small part, and no more of it is read.

    Args:
        lines: the log's, in the order in which what they are of ended; the last is ``packed``.
        packed: how the target was packed.
    """
    of_run = [line for line in lines if packed.run.encode() in line]
    own = json.dumps(f":{packed.target}", ensure_ascii=False)[1:-1].encode()
    first = next(number for number, line in enumerate(of_run) if own in line)
    entries = [e for line in of_run[first:] if (e := parse(line)) and e.run == packed.run]
    start = min(entry.start for entry in entries if entry.target == packed.target)
    for line in reversed(of_run[:first]):
        if (entry := parse(line)) and entry.run == packed.run:
            if end(entry) < start:
                break
            entries.insert(0, entry)
    return entries


def critical_path(
    entries: Mapping[str, Entry], needs: Mapping[str, Sequence[str]], last: str
) -> list[Entry]:
    """Return the chain of dependencies that took longest: no number of threads saves that time.

    Args:
        entries: what was done, by task.
        needs: the tasks that each task needs. What was not done took no time.
        last: the task that the chain ends with.
    """
    best: dict[str, tuple[float, str | None]] = {}
    for task in _ordered(needs, last):
        before = max(needs.get(task, ()), key=lambda need: best[need][0], default=None)
        own = entries[task].seconds if task in entries else 0.0
        best[task] = (own + (best[before][0] if before else 0.0), before)
    chain = []
    at: str | None = last
    while at:
        if at in entries:
            chain.append(entries[at])
        at = best[at][1]
    return chain[::-1]


def trace(timeline: Timeline) -> dict[str, Any]:
    """Return a build as Chrome and Perfetto read it.

    The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    threads = {name: number for number, name in enumerate(timeline.threads, 1)}
    zero = min(entry.start for entry in timeline.entries)
    critical = {id(entry) for entry in timeline.critical}
    named: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": f"doit {timeline.target}"}}
    ]
    for name, number in threads.items():
        label = {"name": f"{number} {name}"}
        named.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": label})
    events = [
        {
            "ph": "X",
            "pid": 1,
            "tid": threads[entry.lane],
            "name": entry.task,
            "cat": f"{entry.group},{entry.outcome}",
            "ts": round(1e6 * (entry.start - zero)),  # microseconds
            "dur": round(1e6 * entry.seconds),
            "args": {
                "outcome": entry.outcome,
                "why": entry.why,
                "bytes_read": entry.bytes_read,
                "bytes_written": entry.bytes_written,
                "critical": id(entry) in critical,
            },
        }
        for entry in timeline.entries
    ]
    return {"traceEvents": named + events, "displayTimeUnit": "ms"}


def _ordered(needs: Mapping[str, Sequence[str]], last: str) -> list[str]:
    """Return ``last`` and all that it needs, needs first. No recursion: it may be deep."""
    done: dict[str, None] = {}
    stack = [last]
    while stack:
        task = stack[-1]
        if missing := [need for need in needs.get(task, ()) if need not in done]:
            stack += missing
        else:
            done[stack.pop()] = None
    return list(done)


def _read(log: Path) -> bytes:
    try:
        return log.read_bytes()
    except FileNotFoundError:
        return b""


def _last_pack(data: bytes, target: str) -> tuple[int, Entry] | None:
    """Return the last line in which a target was packed, and where it ends."""
    quoted = json.dumps(task_name(PACK, target), ensure_ascii=False).encode()
    at = data.rfind(quoted)
    while at >= 0:
        start = data.rfind(b"\n", 0, at) + 1
        stop = data.find(b"\n", at)
        stop = len(data) if stop < 0 else stop
        entry = parse(data[start:stop])
        if entry and entry.task == task_name(PACK, target) and entry.outcome != "failed":
            return stop, entry
        at = data.rfind(quoted, 0, start)
    return None

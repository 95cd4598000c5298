"""reporter: says what doit does: live lines on a terminal, plain ones elsewhere, then a summary."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from doit.exceptions import UnmetDependency
from doit.reporter import ConsoleReporter

from cache.errors import one_line, printable
from tasks.cli import table
from tasks.cli.refused_tasks import refused_of
from tasks.cli.session import Session
from tasks.cli.terminal import progress
from tasks.cli.terminal.live import Line, Live
from tasks.cli.terminal.progress import OUTCOMES, Overall, Work
from tasks.core.task_names import group_of, is_packing, target_of
from tasks.core.text import clock, duration, plural, size, some
from tasks.core.workspace import BUILD
from tasks.execution.log import Entry
from tasks.planning.refused import Refused, messages

LINE_SECONDS = 10.0  # between two plain lines on how far it is
MOST_MACHINES = 8  # whose names are shown
SPINNER = "|/-\\"
STYLES = {"waiting": "dim", "done": "green", "failed": "bold red"}


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """Says what is built, and nothing of what is up to date but how many targets are.

    doit calls it from all of its threads.
    """

    desc = "mlx-make: a live line a target on a terminal, plain lines elsewhere"

    def __init__(self, outstream: Any, options: dict[str, Any]) -> None:
        super().__init__(outstream, options)
        self._live = Live(outstream, self._lines) if _is_terminal(outstream) else None
        self._lock = threading.Lock()
        self._start = self._said_at = time.monotonic()
        self._said: set[str] = set()
        self._fresh = 0
        self._session: Session | None = None
        self._plan: tuple[Mapping[str, Any], Iterable[str]] = ({}, ())
        self._begun = False
        self._works: dict[str, Work] = {}
        self._overall = Overall()
        self._outcomes: dict[str, str] = {}  # of all tasks that were looked into
        self._finished: list[str] = []  # before the first task began
        self._machines: set[str] = set()  # of a cluster, that made anything

    def initialize(self, tasks: Mapping[str, Any], selected_tasks: Iterable[str]) -> None:
        """Take note of what a run may do; it is looked at once something is to be done."""
        self._plan = tasks, selected_tasks
        self._session = next(
            (t.meta["session"] for t in tasks.values() if t.meta and "session" in t.meta), None
        )
        if self._session:
            self._fresh = len(self._session.untouched.targets) if self._session.untouched else 0
            self._session.log.listeners.append(self._log)
        if self._live:
            self._live.start()

    def write(self, text: str) -> None:
        """Write whole lines, at once."""
        text = "\n".join(map(one_line, text.split("\n")))  # a traceback, too, may hold anything
        if self._live:
            self._live.write(text)
            return
        with self._lock:
            self.outstream.write(text)
            self.outstream.flush()

    def execute_task(self, task: Any) -> None:
        """Say, or show, what begins."""
        if not task.actions or refused_of(task):
            return
        stage, target = group_of(task.name), target_of(task.name)
        if self._session and target in self._session.plans:
            counted = self._begin(task.name)
            if counted and self._live:
                return
        self._say_once(f"{target}: {stage}" if target else stage)

    def _begin(self, name: str) -> bool:
        """Take note of a task that begins; tell whether it is one that is counted."""
        stage, target = group_of(name), target_of(name)
        with self._lock:
            if not self._begun:
                self._begun = True
                plans = self._session.plans if self._session else {}
                self._works = progress.works(plans, *self._plan)
                for finished in self._finished:
                    self._count(finished)
                if self._live:
                    self._live.show()
            work = self._works.get(target)
            counted = work is not None and name in work.weights
            if work and counted:
                work.begin(stage, time.monotonic())
            return counted

    def _say_once(self, line: str) -> None:
        with self._lock:
            new = line not in self._said
            self._said.add(line)
        if new:
            self.write(f"{line}\n")

    def add_success(self, task: Any) -> None:
        """Count a task; say what a target has become."""
        self._finish(task.name)
        stage, target = group_of(task.name), target_of(task.name)
        notes = task.values.get("notes", ())
        lines = [f"note: {target}: {printable(note)}" for note in notes]
        if summary := task.values.get("summary"):
            lines.insert(0, summary)
        work = self._works.get(target)
        if work and is_packing(task.name):
            work.state, work.ended = "done", time.monotonic()
            work.size, work.bits_per_weight = task.values["size"], task.values["bits_per_weight"]
            if not self._live:
                lines.append(_built(work))
        if lines:  # in one piece: other threads write between the lines of two
            self.write("".join(f"{line}\n" for line in lines))
        if work and stage == work.last and not self._live:
            self._say_how_far(work)

    def skip_uptodate(self, task: Any) -> None:
        """Count a task, and targets that are up to date."""
        self._fresh += is_packing(task.name)
        self._finish(task.name)

    def add_failure(self, task: Any, fail: Any) -> None:
        """Keep the failure for the end; what merely needs what failed is none."""
        if isinstance(fail, UnmetDependency) or not fail.report:
            return
        self.failures.append({"task": task, "exception": fail})
        stage, target = group_of(task.name), target_of(task.name)
        if work := self._works.get(target):
            work.state = "failed"
            if not self._live:
                self._say_once(f"{target}: {stage} failed")

    def complete_run(self) -> None:
        """Sum up, and say what failed, whole and last."""
        if self._live:
            self._live.stop()
        if sys.exc_info()[0] is None:
            self._sum_up()
        elif shown := self._shown:
            done, every = _layers(shown)
            where = plural(len(shown), "target")
            self.write(f"{done} of {plural(every, 'layer')} of {where} done\n")
        for failure in self.failures:
            if refused_of(failure["task"]):
                continue
            message = failure["exception"].get_msg().rstrip("\n")
            self.write(f"ERROR: {failure['task'].name}: {message}\n")
        for message in (*messages(self._refused), *self.runtime_errors):
            self.write(f"ERROR: {message}\n")

    @property
    def _shown(self) -> list[Work]:
        """The targets of which something is to be done."""
        return [work for work in self._works.values() if work.state != "up to date"]

    @property
    def _refused(self) -> list[Refused]:
        """The targets that failed since they cannot be planned, in their order."""
        failed = [refused_of(failure["task"]) for failure in self.failures]
        every = self._session.refused.values() if self._session else ()
        return [each for each in every if each in failed]

    def _finish(self, name: str) -> None:
        with self._lock:
            if self._begun:
                self._count(name)
            else:
                self._finished.append(name)

    def _count(self, name: str) -> None:
        work = self._works.get(target_of(name))
        if work and name in work.weights:
            work.finish(name)
            if is_packing(name) and work.began is None:
                work.state = "up to date"

    def _log(self, entry: Entry) -> None:
        self._outcomes[entry.task] = entry.outcome
        if entry.machine:
            self._machines.add(entry.machine)
        if work := self._works.get(entry.target):
            work.log(entry)

    def _say_how_far(self, work: Work) -> None:
        now = time.monotonic()
        if now - self._said_at < LINE_SECONDS or work.layers == work.all_layers:
            return
        self._said_at = now
        parts = [f"{work.layers} of {work.all_layers} layers", _rate(work, now)]
        if left := _left(work, now):
            parts.append(f"{left} left")
        self.write(f"{work.target}: {', '.join(filter(None, parts))}\n")

    def _sum_up(self) -> None:
        begun = [work for work in self._works.values() if work.began is not None]
        built = [work for work in begun if work.state == "done"]
        if self._live:
            rows = _with_something(_summary(built))
            lines = table.aligned(rows)
            if len(built) < 2 or table.width(rows) > shutil.get_terminal_size().columns:
                lines = [_built(work) for work in built]
            self.write("".join(f"{line}\n" for line in lines))
        if begun:
            self.write(self._total(begun, built))
        if self._fresh and not self.failures:
            prefix = "" if self._said or begun else "nothing to do: "
            are = "are" if self._fresh > 1 else "is"
            self.write(f"{prefix}{plural(self._fresh, 'target')} {are} up to date\n")

    def _total(self, begun: Sequence[Work], built: Sequence[Work]) -> str:
        failed = sum(work.state == "failed" for work in begun) + len(self._refused)
        outcomes = Counter(self._outcomes.values())
        what = [
            f"{plural(len(built), 'target')} built" if built else _counts(outcomes),
            f"{plural(failed, 'target')} failed" if failed else "",
        ]
        took = duration(time.monotonic() - self._start)
        made = f", layers on {self._on}" if self._machines else ""
        folder = self._session.workspace.folder if self._session else Path.cwd()
        where = "" if folder == Path.cwd() else f", in {folder}"
        peak = size(_peak_memory_bytes())
        return f"{', '.join(filter(None, what))} in {took}{made}, peak memory {peak}{where}\n"

    @property
    def _on(self) -> str:
        """The names of a cluster's machines that made anything."""
        return some(sorted([*self._machines]), MOST_MACHINES)

    def _lines(self, columns: int, height: int) -> list[Line]:
        """Return what is shown now: a heading, each target that fits, and all of them together."""
        now = time.monotonic()
        overall = self._overall.see(self._works.values(), now)
        shown = self._shown
        room = max(height - 4 - bool(self._machines), 1)
        more = len(shown) - room
        together = [_together(shown, *overall)] if len(shown) > 1 else []
        if more > 0:  # those at work first
            shown.sort(key=lambda work: work.state in ("done", "waiting"))
        rows = [["  target", f"{'stage':8}", "layers", "rate", "left", *OUTCOMES]]
        rows += [*(_row(work, now) for work in shown[:room]), *together]
        lines = table.aligned(_narrowed(_with_something(rows), columns - 1), columns - 1)
        styles = ["dim", *(STYLES.get(work.state, "") for work in shown[:room]), "bold"]
        shown_lines = list(zip(lines, styles, strict=False))
        if more > 0:
            shown_lines.insert(room + 1, (f"  and {more} more"[: columns - 1], "dim"))
        if self._machines:
            shown_lines.append((f"  layers on {self._on}"[: columns - 1], "dim"))
        return shown_lines


def _built(work: Work) -> str:
    return (
        f"{BUILD}/{work.target}: {size(work.size)}, {work.bits_per_weight:.3g} bits per weight, "
        f"{_counts(work.counts())} in {duration(work.seconds)}"
    )


def _summary(built: Iterable[Work]) -> list[list[str]]:
    rows = [["", "size", "bits/weight", *OUTCOMES, "time"]]
    for work in built:
        counts = work.counts()
        rows.append(
            [
                f"{BUILD}/{work.target}",
                size(work.size),
                f"{work.bits_per_weight:.3g}",
                *(str(counts[outcome]) for outcome in OUTCOMES),
                duration(work.seconds),
            ]
        )
    return rows


def _is_terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _row(work: Work, now: float) -> list[str]:
    counts = work.counts()
    at_work = work.state not in STYLES
    mark = SPINNER[int(now / 0.2) % len(SPINNER)] if at_work else " "
    return [
        f"{mark} {work.target}",
        f"{work.state:8}",  # as wide as the widest, lest columns move
        f"{work.layers}/{work.all_layers}" if work.all_layers else "",
        f"{_rate(work, now):>9}",
        _left(work, now),
        *(str(counts[outcome]) for outcome in OUTCOMES),
    ]


def _together(works: Sequence[Work], rate: float | None, left: float | None) -> list[str]:
    counts = Counter(outcome for work in works for outcome in work.outcomes.values())
    return [
        "  all",
        "",
        "/".join(map(str, _layers(works))),
        f"{_per_second(rate):>9}",
        _clock(left),
        *(str(counts[outcome]) for outcome in OUTCOMES),
    ]


def _layers(works: Iterable[Work]) -> tuple[int, int]:
    """Return how many layers have gone through the last stage, and how many there are."""
    return sum(work.layers for work in works), sum(work.all_layers for work in works)


def _with_something(rows: list[list[str]]) -> list[list[str]]:
    """Leave out the columns of outcomes that no task had."""
    kept = [
        index
        for index, name in enumerate(rows[0])
        if name not in OUTCOMES or any(row[index] != "0" for row in rows[1:])
    ]
    return [[row[index] for index in kept] for row in rows]


def _narrowed(rows: list[list[str]], columns: int) -> list[list[str]]:
    """Leave out what matters least until a table fits."""
    for name in ("fetched", "reused", "computed", "rate", "stage", "left"):
        heads = [head.strip() for head in rows[0]]
        if table.width(rows) > columns and name in heads:
            index = heads.index(name)
            rows = [[*row[:index], *row[index + 1 :]] for row in rows]
    return rows


def _counts(counts: Counter[str]) -> str:
    counted = [(counts[outcome], outcome) for outcome in OUTCOMES if counts[outcome]]
    return ", ".join(
        f"{count} {outcome}" if index else f"{plural(count, 'task')} {outcome}"
        for index, (count, outcome) in enumerate(counted)
    )


def _rate(work: Work, now: float) -> str:
    return _per_second(work.rate(now))


def _left(work: Work, now: float) -> str:
    return _clock(work.left(now))


def _per_second(rate: float | None) -> str:
    return "" if rate is None else f"{size(rate)}/s"


def _clock(left: float | None) -> str:
    return "" if left is None else clock(left)


def _peak_memory_bytes() -> int:
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux's ru_maxrss begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024  # type: ignore[index]

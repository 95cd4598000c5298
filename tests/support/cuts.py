"""cuts: builds that are killed, refused a call of the system, or left without power."""

import errno
import importlib
import os
import random
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mlx_make import cli
from support import faults, forked
from support.projects import FOUR_BIT, SOURCES, Project, contents, create
from support.running import temporary

CHANGED = {"dtype": "bfloat16", "quantize": {"bits": 8}, "max_shard_size": "300kB"}
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -signal.SIGKILL}
REFUSALS = (
    errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENOLCK,
    errno.ESTALE, errno.EXDEV, errno.EINTR,
)  # fmt: skip
POWER, SHORT = "power", "short"
HARMS = (
    *(number.name for number in SIGNALS), *(errno.errorcode[cause] for cause in REFUSALS), SHORT,
    POWER,
)  # fmt: skip
# What may become of a build, each with the next one whole.
OUTCOMES = ("built all the same", "stopped, nothing built", "stopped, as it was", "wrong")
Contents = dict[str, str]


@dataclass
class Start:
    """How a build begins.

    Attributes:
        folder: the project as it is then.
        before: what is built there.
        wanted: what is to be built.
        calls: how many calls of the system a build makes about files of the project.
    """

    folder: Path
    before: Contents
    wanted: Contents
    calls: int


@dataclass
class Cuts:
    """Attempts in a folder; each begins as its seed tells.

    Attributes:
        folder: where all lies.
        starts: how builds begin, by source, and whether something else is built there.
    """

    folder: Path
    starts: dict[tuple[str, bool], Start] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Where each project lies while it is built."""
        return self.folder / "work"

    def attempt(self, harm: str, seed: int) -> tuple[str, str]:
        """Build with a harm; return one of `OUTCOMES`, and what is wrong."""
        choose = random.Random(f"{harm} {seed}")
        source, again = choose.choice(SOURCES), choose.random() < 0.7
        start = self._start(source, again)
        at = choose.randrange(1, start.calls)
        if harm == POWER and choose.random() < 0.3:
            at = 0  # after its end
        self._put(start, again)
        journal = self.folder / "journal" if harm == POWER else None
        ended = self._call(_harmed, self.work, at, _number(harm), journal)
        lost = faults.cut_power(self.work, journal, choose) if journal else []
        built = contents(self.work / "build" / "model")
        wrong = [*_wrong(harm, ended, built, start), *self._left(start)]
        if wrong:
            what = f"{harm} at call {at} of {source}{' again' * again}, seed {seed}"
            facts = [f"{what}: {'; '.join(wrong)}", ended.said, *lost]
            return "wrong", "\n".join(facts)
        if ended.status == 0:
            return OUTCOMES[0], ""
        return (OUTCOMES[2] if built == start.before and built else OUTCOMES[1]), ""

    def _left(self, start: Start) -> list[str]:
        """What is wrong with the next build."""
        status, said, built, left = self._value(_next, self.work)
        return [
            *([f"the next build fails: {said}"] if status or "Traceback" in said else []),
            *(["the next build is another"] if not status and built != start.wanted else []),
            *([f"left behind: {left}"] if left else []),
        ]

    def _start(self, source: str, again: bool) -> Start:
        if (source, again) not in self.starts:
            shutil.rmtree(self.work, ignore_errors=True)
            kept = self.folder / f"{source}{'-again' * again}"
            before, wanted = self._value(_prepare, self.work, source, again)
            self.work.rename(kept)
            start = Start(kept, before, wanted, 0)
            self._put(start, again)
            start.calls, modules = self._value(_counted, self.work)
            for name in modules:  # once for all; nothing of it may start a thread
                with suppress(ImportError):
                    importlib.import_module(name)
            assert len(os.listdir("/proc/self/task")) == 1
            self.starts[source, again] = start
        return self.starts[source, again]

    def _put(self, start: Start, again: bool) -> None:
        """Put a project in its place; what is built is known to be up to date there."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(start.folder, self.work, symlinks=True)
        if again:
            self._value(_change, self.work)

    def _call(self, function, *args) -> forked.Ended:
        return forked.call(function, *args, folder=self.folder)

    def _value(self, function, *args) -> Any:
        """What a function returns that is not harmed."""
        ended = self._call(function, *args)
        assert ended.returned, ended.said
        return ended.value


def _number(harm: str) -> int:
    if harm == POWER:
        return faults.SIGNAL - signal.SIGKILL
    if harm == SHORT:
        return faults.SHORT
    return faults.SIGNAL - signal.Signals[harm] if harm.startswith("SIG") else getattr(errno, harm)


def _wrong(harm: str, ended: forked.Ended, built: Contents, start: Start):
    """What is wrong with a build that was harmed."""
    signals = {number.name: status for number, status in SIGNALS.items()} | {POWER: -signal.SIGKILL}
    if "Traceback" in ended.said:
        yield "a traceback"
    if harm in signals and ended.status not in (0, signals[harm]):
        yield f"exit status {ended.status}"
    if harm not in signals and ended.status and "ERROR" not in ended.said:
        yield f"exit status {ended.status}, and no error was said"
    if built not in ([start.wanted] if ended.status == 0 else [start.before, start.wanted]):
        yield "what is built is neither what was there nor what is wanted"


# In processes of their own.


def _prepare(folder: Path, source: str, again: bool) -> tuple[Contents, Contents]:
    """Make a project of which nothing is built, or something else."""
    project = create(folder, source, **FOUR_BIT)
    before = {}
    if again:
        project.doit()
        before = project.built()
        project.configure(**CHANGED)
    wanted = project.anew()
    project.configure(**FOUR_BIT, max_shard_size=None)
    return before, wanted


def _change(folder: Path) -> None:
    project = Project(folder, "")
    project.doit()
    project.configure(**CHANGED)


def _main(folder: Path) -> int:
    with mock.patch.object(sys, "argv", ["mlx-make", f"models={folder / 'models.toml'}"]):
        return cli.main()


def _counted(folder: Path) -> tuple[int, list[str]]:
    before = {*sys.modules}
    faults.arm(folder, 0, 0)
    _main(folder)
    return faults.calls(), sorted(sys.modules.keys() - before)


def _harmed(folder: Path, at: int, harm: int, journal: Path | None) -> int:
    faults.arm(folder, at, harm, journal)
    return _main(folder)


def _next(folder: Path) -> tuple[int, str, Contents, list[str]]:
    project = Project(folder, "")
    done = project.doit(expect=None)
    said = f"{done.stdout}{done.stderr}"
    return done.returncode, said, project.built(), temporary(folder / "build")

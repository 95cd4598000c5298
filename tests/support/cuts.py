"""cuts: builds that are killed, refused a call of the system, or left without power.

Of checkpoints in folders and on a hub, and with a remote store: a folder, which comes to harm as
the project does, or a server.
"""

import errno
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

from mlx_make import cli
from support import checkpoints, faults, forked, hub_server, servers
from support.machines import REMOTE
from support.projects import FOUR_BIT, Project, contents, create
from support.projects import SOURCES as FOLDERS
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
STORE, SERVER, HUB = "store", "server", "hub"
SOURCES = (*FOLDERS, STORE, SERVER, HUB)
# What may become of a build, each with the next one whole.
OUTCOMES = ("built all the same", "stopped, nothing built", "stopped, as it was", "wrong")
REPOSITORY = "org/model"
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


class Where(NamedTuple):
    """Where a build finds what is not in its folder.

    Attributes:
        environ: variables that name a remote store.
        hub: the URL of the hub that its checkpoint is on.
    """

    environ: Mapping[str, str] = MappingProxyType({})
    hub: str = ""

    @contextmanager
    def there(self, folder: Path) -> Iterator[None]:
        """Have a build of a project find it."""
        hub = hub_server.Hub(folder)
        hub.url = self.hub
        around = hub.inside(folder / "home") if self.hub else nullcontext()
        with mock.patch.dict(os.environ, self.environ), around:
            yield


@dataclass
class Cuts:
    """Attempts in a folder; each begins as its seed tells.

    Attributes:
        folder: where all lies.
        starts: how builds begin, by source, and whether something else is built there.
        urls: of what is served, by source, once something is.
        sources: those that are taken.
    """

    folder: Path
    starts: dict[tuple[str, bool], Start] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = SOURCES

    @property
    def work(self) -> Path:
        """Where each project lies while it is built."""
        return self.folder / "work"

    def attempt(self, harm: str, seed: int) -> tuple[str, str]:
        """Build with a harm; return one of `OUTCOMES`, and what is wrong."""
        choose = random.Random(f"{harm} {seed}")
        source, again = choose.choice(self.sources), choose.random() < 0.7
        start = self._start(source, again)
        at = choose.randrange(1, start.calls)
        if harm == POWER and choose.random() < 0.3:
            at = 0  # after its end
        self._put(start, source, again)
        where = self._where(source, f"{harm}-{seed}")
        journal = self.folder / "journal" if harm == POWER else None
        ended = self._call(_harmed, self.work, where, at, _number(harm), journal)
        lost = faults.cut_power(self.work, journal, choose) if journal else []
        built = contents(self.work / "build" / "model")
        wrong = [*_wrong(harm, ended, built, start), *self._left(start, where)]
        if wrong:
            what = f"{harm} at call {at} of {source}{' again' * again}, seed {seed}"
            facts = [f"{what}: {'; '.join(wrong)}", ended.said, *lost]
            return "wrong", "\n".join(facts)
        if ended.status == 0:
            return OUTCOMES[0], ""
        return (OUTCOMES[2] if built == start.before and built else OUTCOMES[1]), ""

    def _left(self, start: Start, where: Where) -> Iterator[str]:
        """What is wrong with the next build, and with what another machine builds by the store."""
        others = ["the next build", *["a build by the store"] * (REMOTE in where.environ)]
        for which in others:
            status, said, built, left = self._value(_next, self.work, where)
            if status or "Traceback" in said:
                yield f"{which} fails: {said}"
            elif built != start.wanted:
                yield f"{which} is another"
            if left:
                yield f"left behind by {which}: {left}"
            for folder in (".mlx-make", "build"):
                shutil.rmtree(self.work / folder, ignore_errors=True)

    def _where(self, source: str, name: str) -> Where:
        """Where a build finds a hub, and a store of its own."""
        if source in (HUB, SERVER) and not self.urls:
            self.urls = _serve(self.folder / "served")
        return {
            STORE: Where(environ={REMOTE: (self.work / "store").as_uri()}),
            SERVER: Where(environ={REMOTE: f"{self.urls.get(SERVER)}/{name}"}),
            HUB: Where(hub=self.urls.get(HUB, "")),
        }.get(source, Where())

    def _start(self, source: str, again: bool) -> Start:
        if (source, again) not in self.starts:
            shutil.rmtree(self.work, ignore_errors=True)
            kept = self.folder / f"{source}{'-again' * again}"
            where = self._where(source, f"{again}")
            before, wanted = self._value(_prepare, self.work, where, source, again)
            self.work.rename(kept)
            start = Start(kept, before, wanted, 0)
            self._put(start, source, again)
            start.calls, modules = self._value(_counted, self.work, where)
            for name in modules:  # once for all; nothing of it may start a thread
                with suppress(ImportError):
                    importlib.import_module(name)
            assert len(os.listdir("/proc/self/task")) == 1
            self.starts[source, again] = start
        return self.starts[source, again]

    def _put(self, start: Start, source: str, again: bool) -> None:
        """Put a project in its place; what is built is known to be up to date there."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(start.folder, self.work, symlinks=True)
        if again:
            self._value(_change, self.work, self._where(source, "changed"))

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


def _serve(folder: Path) -> dict[str, str]:
    """Have a hub and a store be served, by a process that lives as long as this one."""
    receive, send = os.pipe()
    this = os.getpid()
    if not os.fork():
        try:
            os.close(receive)
            with hub_server.serve(folder / "uploaded") as hub, servers.faulty() as server:
                hub.repository(REPOSITORY).add_folder(checkpoints.make("llama", folder / "model"))
                urls = {HUB: hub.url, SERVER: f"http://127.0.0.1:{server.port}"}
                os.write(send, json.dumps(urls).encode())
                os.close(send)
                while os.getppid() == this:
                    time.sleep(0.1)
        finally:
            os._exit(0)
    os.close(send)
    with open(receive) as file:
        return dict(json.load(file))


# In processes of their own.


def _prepare(folder: Path, where: Where, source: str, again: bool) -> tuple[Contents, Contents]:
    """Make a project of which nothing is built, or something else."""
    keys = {**FOUR_BIT, "source": f"hf:{REPOSITORY}"} if source == HUB else FOUR_BIT
    kind = source if source in FOLDERS else "huggingface"
    before, wanted = {}, {}
    with where.there(folder):
        project = create(folder, kind, **keys)
        if again:
            project.doit()
            before = project.built()
            project.configure(**CHANGED)
        if source == HUB:
            other = create(folder.parent / "other", kind, **project.models["model"])
            other.doit()
            wanted = other.built()
            shutil.rmtree(other.folder)
        else:
            wanted = project.anew()
    project.configure(**FOUR_BIT, max_shard_size=None)
    return before, wanted


def _change(folder: Path, where: Where) -> None:
    project = Project(folder, "", {"model": {"source": _source(where)}})
    with where.there(folder):
        project.doit()
    project.configure(**CHANGED)


def _source(where: Where) -> str:
    return f"hf:{REPOSITORY}" if where.hub else "checkpoint"


def _main(folder: Path) -> int:
    with mock.patch.object(sys, "argv", ["mlx-make", f"models={folder / 'models.toml'}"]):
        return cli.main()


def _counted(folder: Path, where: Where) -> tuple[int, list[str]]:
    before = {*sys.modules}
    with where.there(folder):
        faults.arm(folder, 0, 0)
        _main(folder)
    return faults.calls(), sorted(sys.modules.keys() - before)


def _harmed(folder: Path, where: Where, at: int, harm: int, journal: Path | None) -> int:
    with where.there(folder):
        faults.arm(folder, at, harm, journal)
        return _main(folder)


def _next(folder: Path, where: Where) -> tuple[int, str, Contents, list[str]]:
    project = Project(folder, "")
    with where.there(folder):
        done = project.doit(expect=None)
    said = f"{done.stdout}{done.stderr}"
    return done.returncode, said, project.built(), temporary(folder / "build")

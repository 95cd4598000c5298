"""diff: ``doit diff``: how two built models differ, or two builds of one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from doit.exceptions import InvalidCommand

from cache.errors import one_line
from cache.records.manifests import Manifest
from cache.store import Store
from tasks.cli import table
from tasks.cli.command import Command
from tasks.cli.commands.forecasting import indented
from tasks.cli.commands.plan import JSON
from tasks.cli.doit_adapter import models_file
from tasks.cli.failures import as_invalid_dodo_file
from tasks.config import reader
from tasks.config.reader import Config
from tasks.core.program import COMMAND
from tasks.core.text import percent, size, some
from tasks.core.workspace import BUILD, Workspace
from tasks.planning import lock_format
from tasks.report import builds, difference, figures
from tasks.report.builds import Build
from tasks.report.difference import Difference, Side
from tasks.stages import reasons

DIFFERS = 1  # exit status of ``doit diff``
SHOWN = 10  # names of tensors and files in one line
ARROW = " → "


class Diff(Command):
    """``doit diff``."""

    name = "diff"
    doc_purpose = "say how two built models differ, or two builds of one"
    doc_usage = "A [B]"
    doc_description = """\
A and B are targets as they were last built. TARGET@REVISION is what models.lock had of it at that
revision of git, or, if it is a file, what that one has. Of one alone it is said how it differs from
the build before, or the build of now from that revision. Exit status 0: they are the same, 1: they
differ, 3: an error."""
    cmd_options = (JSON,)
    names_tasks = False

    def execute(self, opt_values: Any, pos_args: list[str]) -> int:
        """Compare them."""
        if not 1 <= len(pos_args) <= 2:
            raise InvalidCommand(f"what from what? {COMMAND} diff A B; {COMMAND} help diff")
        with as_invalid_dodo_file():
            config = reader.load(models_file())
            store = Store.at(config.cache.dir, read_only=True)
            sides = _Sides(config, store, Workspace(config.path.parent))
            first, second = sides.pair(*pos_args)
            wanted = [c for each in (first, second) for c in difference.quantized(each).items()]
            targets = {sides.parts(name)[0] for name in pos_args}
            known = builds.records(store, sides.workspace, sorted(targets), wanted)
            found = difference.between(first, second, known)
        if opt_values["as_json"]:
            self.outstream.write(json.dumps(found.json, indent=1) + "\n")
        else:
            self.outstream.writelines(f"{one_line(line)}\n" for line in _lines(found))
        return DIFFERS if found.is_something else 0


class _Sides:
    """Finds what is to be compared."""

    def __init__(self, config: Config, store: Store, workspace: Workspace) -> None:
        self._config = config
        self._store = store
        self.workspace = workspace

    def pair(self, first: str, second: str | None = None) -> tuple[Build, Build]:
        """Return the two; of one alone, what it is compared with, too."""
        if second is not None:
            return self._side(first), self._side(second)
        target, revision = self.parts(first)
        if revision:
            return self._side(first), self._now(target, target)
        before = Manifest.at(self.workspace.packed_before(target))
        now = self._now(target, target)
        if before is None:
            raise InvalidCommand(
                f"{target} was not built in another way before, or that was not written down. "
                f"Name another target, or {target}@REVISION."
            )
        return Build.of(f"{target} before", before), now

    def parts(self, name: str) -> tuple[str, str]:
        """Return the target that a name or its folder is of, and the revision, if it has one."""
        name = name.removeprefix(f"{BUILD}/")  # which a shell completes, with a slash behind it
        target, _, revision = name.partition("@")
        target = target.rstrip("/")
        if target not in self._config.targets:
            raise InvalidCommand(
                f"there is no target {target!r}. There are {', '.join(self._config.targets)}."
            )
        return target, revision

    def _side(self, name: str) -> Build:
        target, revision = self.parts(name)
        return self._locked(name, target, revision) if revision else self._now(name, target)

    def _now(self, name: str, target: str) -> Build:
        packed = Manifest.at(self.workspace.packed(target))
        if packed is None:
            raise InvalidCommand(f"{target} was not built here yet: {COMMAND} {target}")
        blobs = self._store.blobs
        return Build.of(name, packed, figures.evaluated(blobs, self.workspace, target, packed))

    def _locked(self, name: str, target: str, revision: str) -> Build:
        lock = self._config.path.with_suffix(".lock")
        file = Path(revision)
        if file.is_file():
            own = file.samefile(lock) if lock.exists() else False
            mend = lock_format.RESTORE if own else f"Name a {lock.name}, or a revision of git."
            read = lock_format.parse(file.read_bytes(), file, mend)
        else:
            read = lock_format.parse(_of_git(lock, revision), lock)
        locked = read.targets.get(target)
        if locked is None:
            raise InvalidCommand(f"{name}: {lock.name} has no {target} there")
        return Build.locked(name, self._store, self.workspace, target, locked)


def _of_git(lock: Path, revision: str) -> bytes:
    """Return what a file held at a revision.

    Raises:
        InvalidCommand: git knows neither.
    """
    if revision.startswith("-"):
        raise InvalidCommand(f"{revision!r} is no revision of git, and no file")
    call = ["git", "-C", str(lock.parent), "show", f"{revision}:./{lock.name}"]
    if not shutil.which("git"):
        raise InvalidCommand(f"{revision!r} is no file, and there is no git to ask for it")
    done = subprocess.run(call, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise InvalidCommand(
            f"{revision!r} is no file, and git has no {lock.name} of it: {(said or [''])[0]}"
        )
    return done.stdout


def _lines(found: Difference) -> Iterator[str]:
    """Yield what differs, in lines: a table of all, one by layer, and names."""
    for build in found.builds:
        if not build.tensors:
            yield from indented(
                f"note: what {build.name} packed is not on record here any more: what is told of "
                "it is what models.lock has",
                0,
            )
    if not found.is_something:
        yield "no difference" + ("" if found.is_known else ", as far as is known")
    yield from table.aligned(_whole(found))
    if found.layers:
        yield ""
        rows = [_HEAD, *(_row(name, *each) for name, each in found.layers.items())]
        told = [at for at in range(len(_HEAD)) if any(row[at] for row in rows[1:])]
        yield from table.aligned([[row[at] for at in told] for row in rows])
    if found.modules:
        yield ""
        was, now = ({p: each[i] for p, each in found.modules.items() if each[i]} for i in (0, 1))
        for reason in reasons.changes("settings:", was, now, "not quantized"):
            yield from indented(str(reason), 0)
    for what, names in (
        ("tensors with other contents", found.tensors),
        (f"tensors that only {found.builds[0].name} has", found.gone),
        (f"tensors that only {found.builds[1].name} has", found.come),
        ("files that differ", found.files),
    ):
        if names:
            yield from indented(f"{len(names)} {what}: {some(names, SHOWN)}", 0)


_HEAD = ["layer", "size", "bits/weight", "error", "estimated KL"]


def _whole(found: Difference) -> list[list[str]]:
    qualities = [build.quality for build in found.builds]
    rows = [
        ["", *(build.name for build in found.builds)],
        ["all files", *(_size(build.nbytes) for build in found.builds)],
        *([name, *map(show, found.sides)] for name, show in _FIGURES.items()),
        ["KL divergence", *(f"{q.mean:.4g}" if q else "" for q in qualities)],
        ["perplexity", *(f"{q.perplexity:.4g}" if q else "" for q in qualities)],
    ]
    return [row for row in rows if any(row[1:])]


def _row(layer: str, first: Side, second: Side) -> list[str]:
    cells = []
    for show in _FIGURES.values():
        was, now = show(first), show(second)
        cells.append(was if was == now else ARROW.join(cell or "?" for cell in (was, now)))
    return [layer, *cells]


def _size(nbytes: int | None) -> str:
    return "" if nbytes is None else size(nbytes)


def _percent(part: float | None) -> str:
    return "" if part is None else percent(part)


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"


_FIGURES: dict[str, Callable[[Side], str]] = {
    "tensors": lambda side: _size(side.nbytes),
    "bits per weight": lambda side: _number(side.bits),
    "relative error": lambda side: _percent(side.error),
    "estimated KL": lambda side: _number(side.cost),
}

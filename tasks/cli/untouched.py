"""untouched: targets that nothing happened to since they were last found up to date.

To find a target up to date takes its plan and a look at every layer. All that this look depends on
has one digest, which is kept once the look found nothing to do. As long as it is the same, so is
the verdict; whatever else it is, also of a file that was merely touched, has the target looked at.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from cache.digest import digest
from cache.errors import NoRoom
from cache.files import atomic
from cache.files.stamp import Stamp
from cache.records.sealed import Damaged, seal, unseal
from tasks.cli.failures import message
from tasks.core.program import ROOT
from tasks.core.spec import Target
from tasks.core.workspace import Workspace
from tasks.layouts import asking
from tasks.layouts.libraries import MLX_LM
from tasks.layouts.registry import LAYOUTS
from tasks.planning import model_card
from tasks.planning.lockfile import Lock
from tasks.planning.plan import Plan, Planner, SharedPlan
from tasks.stages import registry

FILE = "up-to-date.json"

_encoder = msgspec.json.Encoder(enc_hook=str, order="deterministic")


@dataclass
class Untouched:
    """What is remembered of targets that were up to date, beside doit's database.

    Attributes:
        workspace: where things lie beside models.toml.
        lock: models.lock.
        planner: what several targets have in common.
        saved: returns a digest of what doit's database has saved of a target's tasks, or None.
        look: tells whether a look at a target finds nothing to do.
        targets: those that need no tasks.
    """

    workspace: Workspace
    lock: Lock
    planner: Planner
    saved: Callable[[str], str | None]
    look: Callable[[Plan], bool]
    targets: dict[str, Target] = field(default_factory=dict)
    _now: dict[str, str | None] = field(default_factory=dict)
    _shared: dict[int, str] = field(default_factory=dict)  # by id of what the planner keeps
    _noted: dict[str, str] = field(default_factory=dict)

    @property
    def _path(self) -> Path:
        return self.workspace.state / FILE

    @cached_property
    def _known(self) -> dict[str, str]:
        try:
            return unseal(FILE, self._path.read_bytes(), dict[str, str])
        except (FileNotFoundError, Damaged):
            return {}

    def holds(self, target: Target) -> bool:
        """Tell whether a target is as it was when it was last found up to date.

        Raises:
            BuildError: its checkpoint or model makes it impossible.
        """
        self._now[target.name] = now = self._digest(target)
        if now is None or self._known.get(target.name) != now:
            return False
        self._noted[target.name] = now
        self.targets[target.name] = target
        return True

    def finds_nothing_to_do(self, plan: Plan) -> bool:
        """Tell whether a target is up to date of which ``holds`` told nothing."""
        name = plan.target.name
        if self.saved(name) is None or not self.look(plan):
            return False
        if now := self._now[name]:
            self._noted[name] = now
        self.targets[name] = plan.target
        return True

    def save(self) -> None:
        """Keep it for the next run."""
        if self._noted != self._known:
            try:
                atomic.write(self._path, seal(FILE, self._noted))
            except NoRoom as error:  # the next run looks again
                print(f"warning: {message(error)}", file=sys.stderr)

    def _digest(self, target: Target) -> str | None:
        """Return the digest of all that a look depends on; None if that is not to be told."""
        if target.files or target.card or target.adapter:  # it reads them all
            return None
        if target.quantize and target.quantize.chooses:  # by what is on record of running it
            return None
        if target.quantize and target.quantize.method:  # it reads the text
            return None
        shared = self.planner.share(target)
        saved = self.saved(target.name)
        if saved is None:
            return None
        try:
            if id(shared) not in self._shared:
                self._shared[id(shared)] = digest(_encoder.encode(_of_shared(target, shared)))
            lock, built = self.lock, self.lock.targets.get(target.name)
            facts = [
                self._program,
                self._shared[id(shared)],
                {**msgspec.structs.asdict(target), "where": ""},
                lock.sources.get(target.source_name),
                built.without_sha256 if built else None,
                saved,
                [_stamps(str(folder)) for folder in self._folders(target.name)],
                Stamp.of(self.workspace.packed(target.name)),
            ]
            return digest(_encoder.encode(facts))
        except (OSError, UnicodeEncodeError, OverflowError, TypeError):
            return None

    def _folders(self, target: str) -> Iterator[str | Path]:
        for stage in registry.PIPELINE:
            yield os.path.dirname(self.workspace.manifest(target, stage.name, ""))
        yield self.workspace.built(target)

    @cached_property
    def _program(self) -> str:
        """A digest of this program, which is another in a checkout every minute."""
        stages = [(stage.name, stage.version) for stage in registry.stages()]
        code = [[*_code(str(ROOT / room))] for room in ("cache", "tasks")]
        return digest(_encoder.encode([sys.version, stages, code, model_card.program()]))


def _of_shared(target: Target, shared: SharedPlan) -> list[Any]:
    checkpoint, source = shared.checkpoint, shared.checkpoint.source
    files = LAYOUTS[target.layout].sources(checkpoint)
    return [
        [source.location, source.identity, source.available],
        [checkpoint.names, checkpoint.config, checkpoint.files, checkpoint.stored],
        [checkpoint.tensors, checkpoint.stamps, checkpoint.changed_at, checkpoint.notes],
        [shared.model, shared.computer, LAYOUTS[target.layout].programs(checkpoint)],
        [(str(path), *Stamp.of(path)) for path in files],
        asking.versions(shared.model.library or MLX_LM),  # the card names them
    ]


def _stamps(folder: str) -> list[tuple[str, int, int, int]]:
    """Return the names and stamps of a folder's files, links followed.

    Raises:
        OSError: a link leads nowhere, or it has folders.
    """
    stamps: list[tuple[str, int, int, int]] = []
    if not os.path.lexists(folder):  # of a stage that the target has not, or has lost
        return stamps
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # a path to each takes a tenth more
    try:
        with os.scandir(descriptor) as entries:
            for entry in entries:
                info = entry.stat()
                if stat.S_ISDIR(info.st_mode):
                    raise IsADirectoryError(f"{folder}/{entry.name}")
                stamps.append((entry.name, info.st_size, info.st_mtime_ns, info.st_ino))
    finally:
        os.close(descriptor)
    stamps.sort()
    return stamps


def _code(folder: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield the paths and stamps of a folder's Python files."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                path = f"{root}/{name}"
                yield (path, *Stamp.of(path))

"""ownership: whether what lies at build/TARGET was built here, and so may be replaced or removed.

A record says what was built. A folder in which nothing of that is left but what any copy of the
model would have, a tokenizer for one, was put there by somebody, whatever was built there before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache.files import atomic
from cache.records.manifests import Action, Manifest, Tensor
from cache.records.memos import Memos
from cache.records.sealed import Damaged, seal, unseal
from tasks.checkpoints import file_digests
from tasks.checkpoints.file_digests import XXH3
from tasks.core.errors import BuildError
from tasks.core.task_names import PACK
from tasks.core.text import some
from tasks.core.workspace import Workspace
from tasks.execution.filling import place
from tasks.execution.filling.place import Contents, Stamps
from tasks.layouts.card import CARD
from tasks.layouts.registry import is_loaded
from tasks.planning import bundle
from tasks.planning.lockfile import Lock
from tasks.planning.plan import Plan

MAX_NAMES = 3  # of files, in a message


@dataclass(frozen=True)
class Evidence:
    """What is known of what was built here of a target, held against what lies in its folder.

    Attributes:
        workspace: where it lies.
        target: its name.
        folder: build/TARGET, links followed.
        builds: the files of each build that may lie there: more than one where a run was killed as
            it exchanged them.
        stamps: of the last build's files when they were built, as far as they are known.
    """

    workspace: Workspace
    target: str
    folder: Path
    builds: tuple[Mapping[str, Tensor], ...]
    stamps: Stamps = field(default_factory=dict)
    _as_built: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def on_record(cls, workspace: Workspace, target: str, stamps: Stamps) -> Evidence:
        """Return what the records here say.

        Raises:
            BuildError: the folder is a link to nowhere, or a file.
        """
        paths = (workspace.packed(target), workspace.may_be_packed(target))
        found = [manifest for path in paths if (manifest := Manifest.at(path))]
        builds = tuple(manifest.tensors for manifest in found)
        return cls(workspace, target, place.folder_of(workspace, target), builds, stamps)

    def contents(self, also: Mapping[str, Tensor] | None = None) -> Contents:
        """Look through the folder; ``also`` are files that count as built."""
        builds = [*self.builds, *([also] if also else [])]
        return Contents.of(self.folder, builds, self.stamps)

    def check(self) -> None:
        """Refuse a folder that was not built here.

        Raises:
            BuildError: it was not.
        """
        if self.is_ours:
            return
        others = [name for name in sorted(place.walk(self.folder)) if not self._is_as_built(name)]
        raise BuildError(
            f"{self.workspace.built(self.target)} was not built here, as far as is on record: it "
            f"holds {some(others, MAX_NAMES)}. Nothing there is replaced. Move it, or rename the "
            "target; or remove it, if it is an older build that is not wanted."
        )

    @property
    def is_ours(self) -> bool:
        """Whether the folder is one that was built here, with whatever people added or edited.

        Small files are looked into first: weights only where these leave a doubt.
        """
        there = sorted(place.walk(self.folder), key=self._size)
        weights = [name for name in there if is_loaded(name)]
        if not there or any(self._has_all_small(build) for build in self.builds):
            return True
        if any(map(self._is_as_built, weights)) or all(map(self._is_as_built, there)):
            return True
        if not weights:  # they were taken away, or a clean left what is not ours
            return any(map(self._is_as_built, (CARD, "config.json"))) or self._was_left(there)
        return False

    def note_left(self, names: Sequence[str]) -> None:
        """Remember what is left of a folder that was ours: what people put there is no other one.

        Not where weights are among it: who has a model there is to say what becomes of it.
        """
        path = self.workspace.left(self.target)
        if not names or any(map(is_loaded, names)):
            path.unlink(missing_ok=True)
            return
        atomic.write(path, seal(self.target, dict(self._stamps(names))))

    def _was_left(self, there: Sequence[str]) -> bool:
        """Tell whether nothing lies there but what a clean left, one of it as it was."""
        try:
            data = self.workspace.left(self.target).read_bytes()
            left = unseal(self.target, data, dict[str, list[int]])
        except (FileNotFoundError, Damaged):
            return False
        now = dict(self._stamps(there))
        return now.keys() <= left.keys() and any(left[name] == now[name] for name in now)

    def _stamps(self, names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
        for name in names:
            info = os.lstat(self.folder / name)
            yield name, [info.st_size, info.st_mtime_ns, info.st_ino]

    def _has_all_small(self, build: Mapping[str, Tensor]) -> bool:
        """Tell whether a build's small files are all there as built: its weights were changed.

        Another tool's model of the same checkpoint has the same tokenizer, and perhaps the same
        config.json, but not the card. Where a layout has none, weights that decayed have their
        size still. Of a build of which nothing is there it is not told.
        """
        weights = [name for name in build if is_loaded(name)]
        small = build.keys() - weights
        present = [name for name in weights if os.path.lexists(self.folder / name)]
        if not (small or present) or not all(map(self._is_as_built, small)):
            return False
        return CARD in build or all(self._size(name) == build[name].nbytes for name in present)

    def _is_as_built(self, name: str) -> bool:
        if name not in self._as_built:
            path = self.folder / name
            built = [build[name] for build in self.builds if name in build]
            self._as_built[name] = bool(built) and place.is_as_built(
                path, built, self.stamps.get(name)
            )
        return self._as_built[name]

    def _size(self, name: str) -> int:
        return os.lstat(self.folder / name).st_size


def check(workspace: Workspace, plan: Plan, lock: Lock, memos: Memos, stamps: Stamps) -> None:
    """Refuse a target whose folder holds what was not built here, before any work.

    Args:
        workspace: where it lies.
        plan: the target.
        lock: models.lock: it knows the target's files where their record is gone.
        memos: remember files' digests.
        stamps: of the target's files when they were last built, as far as they are known.

    Raises:
        BuildError: it does; or a link leads nowhere, or into the folder of another target.
    """
    target = plan.target.name
    evidence = Evidence.on_record(workspace, target, stamps)
    _check_is_own_place(workspace, evidence)
    if evidence.is_ours:
        return
    locked = lock.targets.get(target)
    if locked and as_locked(evidence.folder, bundle.small_names(plan, memos), locked.output, memos):
        return
    evidence.check()


def as_locked(
    folder: Path, small: Sequence[str], output: str | None, memos: Memos
) -> dict[str, Tensor]:
    """Return a folder's files if they are what models.lock has: their record was removed.

    Args:
        folder: the folder.
        small: the names of its files that are no weights, in the order in which a build has them.
        output: the digest of the files' names and digests that models.lock has, if any.
        memos: remember files' digests.
    """
    weights = sorted(path.name for path in folder.iterdir() if is_loaded(path.name))
    files = {
        name: Tensor("uint8", (path.stat().st_size,), file_digests.of_file(path, XXH3, memos))
        for name in (*weights, *small)
        if (path := folder / name).is_file()
    }
    return files if Manifest(Action(PACK, bundle.VERSION, {}, {}), files).result == output else {}


def _check_is_own_place(workspace: Workspace, evidence: Evidence) -> None:
    """Refuse a link to where another target is built: each would be replaced by the other.

    Raises:
        BuildError: it is one.
    """
    path = workspace.built(evidence.target)
    beside = Path(os.path.realpath(path.parent))
    if path.is_symlink() and evidence.folder.parent == beside and evidence.folder.name != path.name:
        raise BuildError(
            f"{path} is a link to {evidence.folder}, which is the place of the target "
            f"{evidence.folder.name}. Remove the link, or have it lead out of {beside}."
        )

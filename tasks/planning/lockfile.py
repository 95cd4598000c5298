"""lockfile: models.lock: what it has of sources, adapters and targets, and how it changes.

What it allows a build to be: ``locked_sources`` and ``locked_targets``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cache.digest import digest_record
from cache.records.manifests import Action, Manifest
from tasks.core.errors import BuildError, ConfigError
from tasks.core.program import COMMAND
from tasks.core.spec import Target
from tasks.core.text import some
from tasks.planning import lock_format, source_record
from tasks.planning.lock_format import Built, Locked
from tasks.planning.plan import Plan
from tasks.planning.source_record import LockedSource

MAX_NAMES = 10  # names in a message
LOCKED_OTHERWISE = "another result of it is locked"  # why all of a target is made again


@dataclass
class Lock:
    """models.lock. Safe in threads.

    Attributes:
        path: the file.
        sources: by their names in models.toml.
        targets: by name.
        adapters: those on a hub, by their names in models.toml: at a commit, as sources are that
            nothing was built of yet.
        strict: whether any difference is an error (``doit --locked``).
        digests: of the tensors of records that were looked into, by record.
    """

    path: Path
    sources: dict[str, LockedSource]
    targets: dict[str, Built]
    adapters: dict[str, LockedSource]
    strict: bool = False
    digests: dict[str, dict[str, str]] = field(default_factory=dict)
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _is_saved: bool = False  # by this process, without what models.toml does not have any more

    @classmethod
    def load(cls, path: Path, *, strict: bool) -> Lock:
        """Read the file, which need not exist unless ``strict``.

        Raises:
            ConfigError: it is damaged, or a newer version wrote it.
        """
        try:
            locked = lock_format.read(path)
        except FileNotFoundError as error:
            if strict:
                raise ConfigError(
                    f"{path} does not exist, and --locked builds only what it says. Run "
                    f"{COMMAND} without --locked, and commit the file."
                ) from error
            locked = Locked({}, {}, {})
        return cls(path, locked.sources, locked.targets, locked.adapters, strict)

    def accept(self, plan: Plan, now: LockedSource, targets: Mapping[str, Target]) -> None:
        """Lock a target's source as it is now.

        Args:
            plan: the target.
            now: its source.
            targets: all of models.toml, by name.
        """
        name = plan.target.source_name
        with self._writing:
            if self._is_saved and self.sources.get(name) == now:
                return  # of another target, a moment ago
            self.sources[name] = now
            self._save(targets)

    def choose_anew(self, target: str, targets: Mapping[str, Target]) -> None:
        """Have what a budget chooses for a target chosen anew, whatever is locked.

        Args:
            target: its name.
            targets: of models.toml, by name.
        """
        with self._writing:
            built = self.targets.get(target)
            if built and built.chosen is not None:
                forgotten = msgspec.structs.replace(built, chosen=None, chosen_for=None)
                self.targets[target] = forgotten.sealed
                self._save(targets)

    def move(self, plan: Plan, now: LockedSource, targets: Mapping[str, Target]) -> str:
        """Lock a target's source at another commit, unless it is locked at that one.

        Args:
            plan: the target.
            now: its source, see ``source_record.pinned``.
            targets: all of models.toml, by name.

        Returns:
            What changed, for people.
        """
        name = plan.target.source_name
        old = self.sources.get(name)
        if not old or old.revision != now.revision:
            self.accept(plan, now, targets)
        return _moved(name, old, now)

    def move_adapter(self, plan: Plan, targets: Mapping[str, Target]) -> str:
        """Lock a target's adapter, if it is on a hub, at the commit that it was planned at.

        Args:
            plan: the target.
            targets: all of models.toml, by name.

        Returns:
            What changed, for people; nothing, where there is none on a hub.
        """
        now = source_record.pinned_adapter(plan.model.adapter)
        if now is None:
            return ""
        name = str(plan.target.adapter)
        with self._writing:
            old = self.adapters.get(name)
            self.adapters[name] = now
            self._save(targets)
        return _moved(f"adapter {name}", old, now)

    def wants_blake3(self, plan: Plan, *, shared: bool) -> bool:
        """Tell whether a target's output has its BLAKE3 in the lock, or gets it.

        It takes as long as copying the output does, and is for who gets results from others.
        """
        locked = self.targets.get(plan.target.name)
        return shared or bool(locked and locked.blake3)

    def output(self, plan: Plan, action: Action) -> str | None:
        """Return the locked digest of what ``action`` packs; None if it is not that of the lock."""
        locked = self.targets.get(plan.target.name)
        return locked.output if locked and locked.action == action.key else None

    def update(
        self, plan: Plan, source: LockedSource, built: Built, targets: Mapping[str, Target]
    ) -> None:
        """Lock what was built, unless ``strict``: then it is what is locked.

        Args:
            plan: the target.
            source: its source.
            built: what was built of it.
            targets: all of models.toml, by name.
        """
        if self.strict:
            return
        with self._writing:
            self.sources[plan.target.source_name] = source
            self.targets[plan.target.name] = built
            if adapter := source_record.pinned_adapter(plan.model.adapter):
                self.adapters[str(plan.target.adapter)] = adapter
            self._save(targets)

    def add_sha256(
        self,
        plan: Plan,
        packed: Manifest,
        sha256: dict[str, str],
        targets: Mapping[str, Target],
    ) -> None:
        """Lock the SHA-256 of a target's files, unless ``strict``.

        Args:
            plan: the target.
            packed: its manifest.
            sha256: of each of its files, by name.
            targets: all of models.toml, by name.

        Raises:
            BuildError: another is locked of what has the same digests.
        """
        name = plan.target.name
        with self._writing:
            locked = self.targets.get(name)
            if not locked or locked.output != packed.result or locked.sha256 == sha256:
                return
            if locked.sha256 is not None:
                files = sorted(dict(locked.sha256.items() ^ sha256.items()))
                raise BuildError(
                    f"{name}: {some(files, MAX_NAMES)} has another SHA-256 than in "
                    f"{self.path.name}, though the same xxh3: a file was made to be taken "
                    f"for another one, or {self.path.name} was edited. If it was, take it from "
                    "version control again."
                )
            if not self.strict:
                self.targets[name] = msgspec.structs.replace(locked, sha256=sha256)
                self._save(targets)

    def state(self, plan: Plan) -> str | None:
        """Return a digest of what is locked of a target, or None if it is not."""
        source = self.sources.get(plan.target.source_name)
        built = self.targets.get(plan.target.name)
        if not source or not built:
            return None
        named = plan.target.adapter
        adapter = self.adapters.get(str(named)) if named else None
        pinned = [adapter.json] if adapter else []
        return digest_record([source.json, built.without_sha256.json, *pinned])

    def _save(self, targets: Mapping[str, Target]) -> None:
        """Write the file, without what models.toml does not have any more."""
        kept = {target.source_name for target in targets.values()}
        adapters = {str(target.adapter) for target in targets.values() if target.adapter}
        lock_format.write(
            self.path,
            Locked(
                {name: source for name, source in self.sources.items() if name in kept},
                {name: built for name, built in self.targets.items() if name in targets},
                {name: adapter for name, adapter in self.adapters.items() if name in adapters},
            ),
        )
        self._is_saved = True


def _moved(name: str, old: LockedSource | None, now: LockedSource) -> str:
    """Return for people at which commit what is on a hub is locked now, and what is another."""
    if old is None:
        return f"{name} is locked at commit {now.revision}"
    if old.revision == now.revision:
        return f"{name} is locked at its newest commit, {now.revision}"
    changed = some(source_record.moved(old, now), MAX_NAMES) or "no file that is used is another"
    return f"{name} moved from commit {old.revision} to {now.revision}: {changed}"

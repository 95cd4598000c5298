"""accept: sources as they are now, held against models.lock, and accepted into it.

To look at a source is to digest all of it: what needs no looking is ``planning.locked_sources``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cache.records.manifests import Action, Manifest
from tasks.checkpoints import file_digests
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.spec import Target
from tasks.execution import changed_files
from tasks.execution.builder import Builder
from tasks.execution.filling import place
from tasks.execution.filling.place import Contents, Stamps
from tasks.execution.streaming import whole_files
from tasks.planning import bundle, locked_sources, locked_targets, source_record
from tasks.planning.lock_format import Built
from tasks.planning.lockfile import Lock
from tasks.planning.node import Node
from tasks.planning.plan import Plan
from tasks.planning.source_record import LockedSource
from tasks.stages import registry
from tasks.stages.stage import ActionSpec, LeafStage


def snapshot(builder: Builder, plans: Iterable[Plan], *, mends: bool = False) -> LockedSource:
    """Return the source that ``plans`` have in common as it is now, and keep its record.

    Tensors that no action digested yet are digested.

    Args:
        builder: digests what is not known.
        plans: the targets.
        mends: see ``record.share``.

    Raises:
        CheckpointError: a file cannot be read.
    """
    plans = list(plans)
    digests = _all_digests(builder, plans)
    changed_files.refuse_wrong_files(builder, plans)
    checkpoint = plans[0].checkpoint
    unverified = whole_files.unverified(builder.store.memos, checkpoint, digests)
    return source_record.take(builder.store, checkpoint, digests, unverified, mends=mends)


def _all_digests(builder: Builder, plans: Iterable[Plan]) -> dict[str, str]:
    """Return the digest of each stored tensor, also of those that no target uses."""
    digests: dict[str, str] = {}
    seen = set()
    for plan in plans:
        for node in plan.leaves:
            if node.spec.digest not in seen:
                seen.add(node.spec.digest)
                found = builder.recall(plan, node) or builder.scan(plan, node)
                tensors = found.tensors
                digests |= {key: tensor.digest for key, tensor in tensors.items()}
    if rest := [key for key in plan.checkpoint.stored if key not in digests]:
        stage = next(stage for stage in registry.PIPELINE if isinstance(stage, LeafStage))
        spec = ActionSpec(stage, "rest", stage.planned(plan.checkpoint, rest))
        tensors = builder.scan(plan, Node(spec, plan.target.name)).tensors
        digests |= {key: tensor.digest for key, tensor in tensors.items()}
    return digests


@dataclass
class Acceptor:
    """Holds the sources of a run's targets against models.lock. Safe in threads.

    Attributes:
        lock: models.lock.
        builder: digests what is not known.
        plans: all targets that are planned.
        targets: all of models.toml, by name: models.lock keeps what they name.
    """

    lock: Lock
    builder: Builder
    plans: list[Plan]
    targets: Mapping[str, Target]
    _snapshots: dict[str, LockedSource] = field(default_factory=dict)
    _taking: threading.Lock = field(default_factory=threading.Lock)

    def snapshot(self, plan: Plan) -> LockedSource:
        """Return a target's source as it is now, worked out once a run."""
        name = plan.target.source_name
        with self._taking:
            if name not in self._snapshots:
                same = [each for each in self.plans if each.target.source_name == name]
                self._snapshots[name] = snapshot(self.builder, same)
            return self._snapshots[name]

    def source(self, plan: Plan) -> tuple[LockedSource, list[str]]:
        """Return a target's source as it is now; its weights must be as they are locked, if so.

        Returns:
            The source, and notes for people: small files that are others than are locked.

        Raises:
            BuildError: they are not; or, if the lock is strict, a small file is another.
        """
        locked = locked_sources.locked_record(self.lock, plan)
        if locked:
            return locked, []
        now = self.snapshot(plan)
        return now, locked_sources.check_files(self.lock, plan, now.files)

    def accept(self, plan: Plan) -> list[str]:
        """Lock a target's source as it is now; what a budget chooses for it is chosen anew.

        Returns:
            Lines for people, of a source and of an adapter that are on the hub: what changed.

        Raises:
            BuildError: nothing is to be written.
        """
        if self.lock.strict:
            raise BuildError(f"--locked never writes models.lock. Run {COMMAND} lock without it.")
        self.lock.choose_anew(plan.target.name, self.targets)
        changes = [self.lock.move_adapter(plan, self.targets)]
        source = plan.checkpoint.source
        if source.available and source.identity is None:
            self.lock.accept(plan, self.snapshot(plan), self.targets)
        elif source.available:
            pinned = source_record.pinned(plan.checkpoint)
            changes.insert(0, self.lock.move(plan, pinned, self.targets))
        return [change for change in changes if change]

    def wants_blake3(self, plan: Plan) -> bool:
        """Tell whether a target's output has its BLAKE3 in the lock, or gets it."""
        return self.lock.wants_blake3(plan, shared=self.builder.store.sharing is not None)

    def sha256(self, plan: Plan, packed: Manifest, stamps: Stamps | None = None) -> dict[str, str]:
        """Return the SHA-256 of a target's files, by name; if all are as built, lock it.

        Builds do not: it takes a core longer than all else that is done with a file.

        Args:
            plan: the target.
            packed: its manifest.
            stamps: of its files when they were built, as far as they are known.

        Raises:
            BuildError: it is not what is locked.
        """
        folder = place.folder_of(self.builder.workspace, plan.target.name)
        there, memos = Contents.of(folder, [packed.tensors], stamps), self.builder.store.memos
        sha256 = {
            name: file_digests.of_file(folder / name, file_digests.SHA256, memos)
            for name in there.kept
        }
        if sha256.keys() == packed.tensors.keys():
            self.lock.add_sha256(plan, packed, sha256, self.targets)
        return sha256

    def target(self, plan: Plan) -> TargetAcceptance:
        """Return what accepts a target's packing.

        Raises:
            BuildError: its source is not what is locked.
        """
        source, notes = self.source(plan)
        if plan.choice and plan.choice.anew:
            notes = [*notes, f"settings are chosen anew: {plan.choice.anew}"]
        return TargetAcceptance(self, plan, source, self.wants_blake3(plan), notes)


@dataclass
class TargetAcceptance:
    """What models.lock has to say of a target's packing: see ``pack.Acceptance``.

    Attributes:
        acceptor: of the run.
        plan: the target.
        source: its source as it is now.
        with_blake3: whether the output's BLAKE3 is wanted.
        notes: for people: of this lock, not of the result, which others may share.
    """

    acceptor: Acceptor
    plan: Plan
    source: LockedSource
    with_blake3: bool
    notes: list[str] = field(default_factory=list)
    _built: Built | None = None

    def contradicted(self, action: Action) -> bool:
        """Tell whether models.lock knows better what the target is packed of."""
        return locked_targets.contradicts(
            self.acceptor.lock, self.plan, self.source, action, self._recorded
        )

    def output(self, action: Action) -> str | None:
        """Return the digest of what ``action`` packs, if models.lock knows it."""
        return self.acceptor.lock.output(self.plan, action)

    @property
    def locked_output(self) -> str | None:
        """The digest of the files' names and digests that models.lock has, if any."""
        locked = self.acceptor.lock.targets.get(self.plan.target.name)
        return locked.output if locked else None

    def check(self, action: Action) -> None:
        """Refuse what is not to be packed.

        Raises:
            BuildError: it differs from what is locked, and that is an error.
        """
        lock = self.acceptor.lock
        self.notes += locked_targets.check_target(
            lock, self.plan, self.source, action, self._recorded
        )

    def _recorded(self, key: str) -> Manifest | None:
        builder = self.acceptor.builder
        last = builder.workspace.packed(self.plan.target.name)
        return bundle.recorded(builder.store, last, key)

    def accept(self, packed: Manifest, blake3: str | None) -> None:
        """Refuse what is not to take the folder's place.

        Raises:
            BuildError: it differs from what is locked, and that is an error.
        """
        lock = self.acceptor.lock
        self._built = locked_targets.check_output(lock, self.plan, self.source, packed, blake3)

    def update_lock(self) -> None:
        """Lock what was built."""
        if self._built:
            lock, targets = self.acceptor.lock, self.acceptor.targets
            lock.update(self.plan, self.source, self._built, targets)

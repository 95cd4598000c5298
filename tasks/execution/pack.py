"""pack: the built model's folder takes its place in build/."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Protocol

from cache.errors import BlobLost, FileChanged
from cache.files import space, trash
from cache.files.durable import sync, sync_tree
from cache.records.actions import Hit
from cache.records.manifests import Action, Manifest, Tensor
from tasks.core.errors import BuildError
from tasks.core.task_names import PACK, task_name
from tasks.execution import changed_files
from tasks.execution.builder import Builder
from tasks.execution.early import PackInProgress
from tasks.execution.filling import fill, ownership, place
from tasks.execution.filling.fill import Filling, PackedFolder
from tasks.execution.filling.ownership import Evidence
from tasks.execution.filling.place import Contents, Stamps
from tasks.layouts.registry import LAYOUTS
from tasks.planning import bundle
from tasks.planning.bundle import Bundle
from tasks.planning.lockfile import LOCKED_OTHERWISE
from tasks.planning.node import Inputs
from tasks.planning.plan import Plan


class Acceptance(Protocol):
    """Refuses what must not be built: models.lock may say what it has to be."""

    @property
    def with_blake3(self) -> bool:
        """Whether ``accept`` wants the BLAKE3 of the table of the files' names and BLAKE3s."""

    def contradicted(self, action: Action) -> bool:
        """Tell whether it knows that something else is packed of the same, by the same computer."""

    def output(self, action: Action) -> str | None:
        """Return the digest of what ``action`` packs, if it is known."""

    @property
    def locked_output(self) -> str | None:
        """The digest of the files' names and digests that models.lock has, if any."""

    def check(self, action: Action) -> None:
        """Refuse what must not be written.

        Raises:
            BuildError: it must not.
        """

    def accept(self, packed: Manifest, blake3: str | None) -> None:
        """Refuse what must not take the folder's place.

        Raises:
            BuildError: it must not.
        """


@dataclass(frozen=True)
class Packing:
    """The packing of one target: its new folder is written beside the old one, and exchanged.

    So a build that is cut off leaves the last one whole.

    Attributes:
        builder: gives the blobs.
        plan: the target.
        acceptance: what may be built.
        begun: what was written of it already, if anything.
        stamps: of the files of the last build, as far as they are known.
        notes: for people: what was set aside.
    """

    builder: Builder
    plan: Plan
    acceptance: Acceptance
    begun: PackInProgress | None
    stamps: Stamps = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def folder(self) -> Path:
        """build/TARGET, links followed."""
        return place.folder_of(self.builder.workspace, self.plan.target.name)

    @property
    def _pending_path(self) -> Path:
        """Where the manifest lies of what is about to take the folder's place."""
        return self.builder.workspace.may_be_packed(self.plan.target.name)

    def _stamps(self, known: Mapping[str, Tensor]) -> Stamps:
        """Return the stamps of the last build's files, of those that are among ``known``."""
        last = Manifest.at(self.builder.workspace.packed(self.plan.target.name))
        files = last.tensors if last else {}
        return {name: s for name, s in self.stamps.items() if files.get(name) == known.get(name)}

    @property
    def _loaded(self) -> str:
        return LAYOUTS[self.plan.target.layout].loaded

    def run(self, why: str) -> Manifest:
        """Bring the target's folder up to date.

        Args:
            why: what made it look.

        Raises:
            BuildError: something there was never built here.
            NoRoom: the disk cannot take the new folder.
        """
        builder, plan = self.builder, self.plan
        path = builder.workspace.packed(plan.target.name)
        try:
            with builder.logged(task_name(PACK, plan.target.name), why) as record:
                inputs, wanted, notes = self._wanted()
                if self.acceptance.contradicted(wanted.action):
                    self._make_again()
                    inputs, wanted, notes = self._wanted()
                self.acceptance.check(wanted.action)
                last = self._last(wanted.action)
                known = last.tensors if last else {}
                there = Contents.of(self.folder, [known], self._stamps(known))
                if last and set(there.kept) == set(known):
                    record["outcome"] = "reused"
                    result = last
                    self.acceptance.accept(result, self._blake3(known))
                    self.notes.extend(place.set_aside_loaded(there, self._loaded))
                else:
                    known = known or bundle.same_weights(Manifest.at(path), wanted.action)
                    result = self._write(inputs, wanted, known, notes)
                    builder.store.actions.put(result)
                    shared = self._share(result)
                    record["outcome"] = "reused" if last else "fetched" if shared else "computed"
                before = Manifest.at(path)
                if before and before.result != result.result:
                    builder.files.write(builder.workspace.packed_before(plan.target.name), before)
                builder.files.write(path, result, durable=True)
                self._pending_path.unlink(missing_ok=True)
                return result
        finally:
            builder.drafts.end(plan.target.name)

    def _wanted(self) -> tuple[Inputs, Bundle, tuple[str, ...]]:
        """Return what packing reads, what it makes of that, and notes for people."""
        builder, plan = self.builder, self.plan
        results = {node: builder.manifest(plan, node) for node in plan.last}
        stages = [node for nodes in plan.stages.values() for node in nodes if not node.is_leaf]
        manifests = (
            results.get(node) or Manifest.at(node.manifest_path(builder.workspace))
            for node in stages
        )
        notes = [*plan.notes, *(note for each in manifests if each for note in each.notes)]
        inputs = bundle.inputs(plan, {node: each.tensors for node, each in results.items()})
        tensors = {key.name: tensor for key, (_, tensor) in inputs.items()}
        wanted = Bundle.of(plan, tensors, builder.store.memos)
        return inputs, wanted, tuple(dict.fromkeys(notes))

    def _make_again(self) -> None:
        """Make here what is on record, but not as it is locked.

        Raises:
            BuildError: it cannot be made here.
        """
        target = self.plan.target.name
        try:
            self.builder.make_again(self.plan, LOCKED_OTHERWISE)
        except BuildError as error:
            raise BuildError(
                f"{target}: what is on record of its layers, perhaps fetched, is not what is "
                f"locked, and cannot be made here. {error}"
            ) from error

    def _last(self, action: Action) -> Manifest | None:
        """Return what was packed here of the same, unless models.lock has it otherwise."""
        entry = self.builder.store.actions.get(action)
        if not isinstance(entry, Hit):
            return None
        locked = self.acceptance.output(action)
        return entry.manifest if locked in (None, entry.manifest.result) else None

    def _share(self, result: Manifest) -> bool:
        """Tell whether the remote has a result already; if not, have it uploaded."""
        sharing = self.builder.store.sharing
        if sharing and not (there := sharing.agrees(result)):
            sharing.push(result, None)
        self.builder.push_list(self.plan, result)
        return bool(sharing and there)

    def _blake3(self, files: Mapping[str, Tensor]) -> str | None:
        return fill.blake3_of(self.folder, files, {}) if self.acceptance.with_blake3 else None

    def _write(
        self, inputs: Inputs, wanted: Bundle, known: Mapping[str, Tensor], notes: tuple[str, ...]
    ) -> Manifest:
        """Write the folder anew; ``known`` is what it held the last time, if that is on record."""
        builder = self.builder
        new = place.beside(self.folder)
        filling = Filling(
            self.plan, wanted, new, builder.store.blobs, builder.drafts,
            self.acceptance.with_blake3, known,
        )  # fmt: skip
        need = filling.need
        try:
            filled = self._filled(inputs, filling)
            meter = builder.store.blobs.meter
            meter.read += wanted.weights_nbytes
            meter.written += filled.written
            result = Manifest(wanted.action, filled.files, notes)
            self.acceptance.accept(result, filled.blake3)
            changed_files.check_unchanged(builder, self.plan)
            self.notes.extend(place.keep(self._there(filled.files), new, self._loaded))
            # Lest a kill makes it nobody's, and a power cut leaves neither the old nor the new.
            builder.files.write(self._pending_path, result, durable=True)
            sync_tree(new)
            _exchange(new, self.folder)
            sync(self.folder.parent)
        except OSError as error:
            if space.is_full(error):
                raise space.no_room(self.folder.parent, need) from error
            raise
        finally:
            trash.discard(new, builder.workspace.trash)  # the old one, once they are exchanged
        return result

    def _there(self, new: Mapping[str, Tensor]) -> Contents:
        """Return what lies in the folder: of the last build, of ``new`` if none is on record.

        Raises:
            BuildError: it was never built here.
        """
        builder, target = self.builder, self.plan.target.name
        evidence = Evidence.on_record(builder.workspace, target, self.stamps)
        if not evidence.is_ours:
            small = [name for name in new if not fnmatchcase(name, self._loaded)]
            output, memos = self.acceptance.locked_output, builder.store.memos
            if locked := ownership.as_locked(self.folder, small, output, memos):
                evidence = replace(evidence, builds=(*evidence.builds, locked), _as_built={})
            evidence.check()
        return evidence.contents(new)

    def _filled(self, inputs: Inputs, filling: Filling) -> PackedFolder:
        """Fill the new folder: by what was begun, if that is of the same, or from the cache."""
        blobs = self.builder.store.blobs
        if self.begun:
            if filling.is_whole:
                self.begun.stop()
            elif filled := self.begun.finish(filling.bundle):
                return filled
        fill.make_empty(filling.folder, filling.need)
        try:
            return self._fill(inputs, filling)
        # Lost, corrupt and perhaps not the only one, of another time, or another thread dropped
        # it; it is made again.
        except (BlobLost, FileChanged, FileNotFoundError):
            self.builder.drafts.end(self.plan.target.name)  # as little to be trusted as the blobs
            for _, tensor in inputs.values():
                blobs.drop_if_wrong(tensor.digest)
            fill.make_empty(filling.folder, filling.need)
            return self._fill(inputs, filling)

    def _fill(self, inputs: Inputs, filling: Filling) -> PackedFolder:
        places = {}
        if not filling.is_whole:
            self.builder.fetch(self.plan, inputs, inputs, packs=True)
            places = {
                key.name: (tensor.digest, self.builder.locate(self.plan, inputs, key))
                for key, (_, tensor) in inputs.items()
            }
        return fill.fill(filling, places.__getitem__, lambda: filling.bundle.small)


def _exchange(new: Path, old: Path) -> None:
    """Let two folders take each other's place, in one step where the system has one."""
    if not old.exists():
        new.rename(old)
        return
    if not _exchange_in_one(os.fsencode(new), os.fsencode(old)):
        aside = place.aside(old)
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
        new.rename(old)
        aside.rename(new)


def _exchange_in_one(new: bytes, old: bytes) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if platform.system() == "Darwin":
            return bool(libc.renamex_np(new, old, 2) == 0)  # RENAME_SWAP
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(at_cwd, new, at_cwd, old, exchange) == 0)
    except AttributeError:  # a libc without it
        return False

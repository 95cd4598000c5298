"""lockfile: what models.lock allows a build of its sources and targets to be."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cache.digest import digest_record
from cache.records.manifests import Action, Manifest, Tensor
from cache.records.memos import Memos
from cache.store import Store
from tasks.checkpoints import record, sources
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.loaders import weight_patterns
from tasks.checkpoints.source import LockedCommit, Opening, ReadableSource
from tasks.core.errors import BuildError, CheckpointError, ConfigError
from tasks.core.program import COMMAND
from tasks.core.spec import SourceSpec, Target
from tasks.core.text import some
from tasks.layouts.card import is_document
from tasks.layouts.registry import is_read
from tasks.planning import bundle, lock_format, source_record
from tasks.planning.lock_format import Built, Locked
from tasks.planning.plan import Plan
from tasks.planning.source_record import LockedSource
from tasks.stages.stage import PROGRAMS

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
    """

    path: Path
    sources: dict[str, LockedSource]
    targets: dict[str, Built]
    adapters: dict[str, LockedSource]
    strict: bool = False
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _digests: dict[str, dict[str, str]] = field(default_factory=dict)  # by record
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

    def open_source(self, store: Store, target: Target, *, newest: bool = False) -> ReadableSource:
        """Open a target's source as it is locked, if it is.

        Args:
            store: where what was fetched is remembered, also in a run that writes nothing else.
            target: the target.
            newest: whether to take it as it is now.
        """
        source = self.sources.get(target.source_name)

        def digests() -> Mapping[str, str]:
            recalled = (
                source and source.record and record.recall(store, source.record, source.nbytes)
            )
            return recalled.source.digests if recalled else {}

        return self._open(store, target.source, source, digests, newest=newest)

    def open_adapter(self, store: Store, target: Target, *, newest: bool = False) -> ReadableSource:
        """Open the adapter of a target that has one, as it is locked, if it is.

        Args:
            store: as for ``open_source``.
            target: the target.
            newest: whether to take it as it is now.
        """
        assert target.adapter is not None
        locked = self.adapters.get(str(target.adapter))
        return self._open(store, target.adapter, locked, dict, newest=newest)

    def _open(
        self,
        store: Store,
        spec: SourceSpec,
        source: LockedSource | None,
        digests: Callable[[], Mapping[str, str]],
        *,
        newest: bool,
    ) -> ReadableSource:
        locked = None
        if source and source.revision:
            locked = LockedCommit(source.revision, frozenset(source.hashes or ()), digests)
        project = str(self.path.parent.absolute())
        opening = Opening(is_read, Memos(store.memos.root), project, locked, newest)
        return sources.open_source(spec, opening)

    def recall(self, store: Store, target: Target, here: ReadableSource) -> Checkpoint | None:
        """Return a target's checkpoint by its record, where its weights are not here.

        Raises:
            CheckpointError: the record is nowhere, or what is here is another checkpoint's.
        """
        source = self.sources.get(target.source_name)
        if source is None or not source.record or here.available:
            return None
        refusal = None
        mismatched = []
        try:
            mismatched = source_record.mismatched_files(here.small_files, source)
        except CheckpointError as error:  # of a hub: there is no folder to compare
            refusal = error
        if mismatched:
            raise CheckpointError(
                f"source {target.source} has no weights, and {', '.join(mismatched[:MAX_NAMES])} "
                f"there {'is' if len(mismatched) == 1 else 'are'} not what {self.path.name} has. "
                "Get the whole checkpoint, or take the file away."
            )
        checkpoint = record.recall(store, source.record, source.nbytes, source.revision)
        if checkpoint is None:
            record_is = (
                f"what {self.path.name} says of it (record {source.record[:16]}…) is neither in "
                "the cache nor whole in a remote"
            )
            if refusal:
                raise CheckpointError(f"{refusal} And {record_is}.") from refusal
            fact = "has no weights" if here.small_files.exists() else "does not exist"
            if any(here.names(pattern) for pattern in weight_patterns()):
                fact = "has Git LFS pointers for weights (git lfs pull gets them)"
            raise CheckpointError(
                f"source {target.source} {fact}, and {record_is}. Get the checkpoint, or name the "
                "remote that it was built with: [cache] remote."
            )
        return checkpoint

    def check_plans(self, plans: Iterable[Plan]) -> None:
        """Refuse adapters that are not as they are locked, and, if ``strict``, any difference.

        Raises:
            BuildError: models.toml, or what it names, is not what was locked.
        """
        now = {plan.target.name: plan for plan in plans}
        self._check_adapters(now.values())
        if not self.strict:
            return
        names = {plan.target.source_name for plan in now.values()}
        differences = [
            f"{file} of source {source_name} is another"
            for source_name, plan in {p.target.source_name: p for p in now.values()}.items()
            if source_name in self.sources
            for file in source_record.mismatched_files(
                plan.checkpoint.folder, self.sources[source_name]
            )
        ]
        differences += [
            f"source {name} is not in it" for name in sorted(names - self.sources.keys())
        ]
        differences += [f"it has a source {name}" for name in sorted(self.sources.keys() - names)]
        named = {name for plan in now.values() if (name := _adapter_on_hub(plan))}
        differences += [f"adapter {n} is not in it" for n in sorted(named - self.adapters.keys())]
        differences += [f"it has an adapter {n}" for n in sorted(self.adapters.keys() - named)]
        differences += [
            f"it has a target {name}" for name in sorted(self.targets.keys() - now.keys())
        ]
        for name, plan in now.items():
            if name not in self.targets:
                differences.append(f"target {name} is not in it")
            elif not plan.undecided and self.targets[name].settings != settings(plan):
                adapted = ", or its adapter other weights" if plan.target.adapter else ""
                differences.append(
                    f"target {name} has other settings, or its source other tensors{adapted}, or a "
                    "stage of this mlx-make makes others"
                )
            elif (source := self.sources.get(plan.target.source_name)) and (
                source.record != self.targets[name].source
            ):
                differences.append(f"target {name} is of an older source")
        if differences:
            raise BuildError(
                f"{self.path.name} is not of this models.toml and its sources: "
                f"{some(differences, MAX_NAMES, '; ')}. If that is wanted, run {COMMAND} "
                "without --locked, and commit the file."
            )

    def _check_adapters(self, plans: Iterable[Plan]) -> None:
        for plan in plans:
            now = source_record.pinned_adapter(plan.model.adapter)
            locked = self.adapters.get(str(plan.target.adapter))
            if not now or not locked or now.revision != locked.revision:
                continue  # of another commit, that is to be locked
            if changed := source_record.moved(locked, now):
                raise BuildError(
                    f"{plan.target.name}: adapter {plan.target.adapter} at commit "
                    f"{locked.revision} is not what {self.path.name} has: "
                    f"{some(changed, MAX_NAMES)}. A commit never changes: the lock was edited, or "
                    "a mirror gives other files (HF_ENDPOINT)."
                )

    def check_layer(self, store: Store, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a layer of the checkpoint that is not what was locked.

        Raises:
            BuildError: it is another.
        """
        source = self.sources.get(plan.target.source_name)
        if source is None or plan.checkpoint.source.identity == source.record or not source.record:
            return
        sizes = {name: stamp.size for name, stamp in plan.checkpoint.stamps.items()}
        differences = [
            f"{name} has {size:,} bytes, locked are {source.files[name][0]:,}"
            for name, size in sizes.items()
            if name in source.files and source.files[name][0] != size
        ]
        if source.record not in self._digests:
            self._digests[source.record] = record.tensor_digests(store, source.record)
        known = self._digests[source.record]
        differences += [
            f"tensor {key} has other contents"
            for key, tensor in tensors.items()
            if known.get(key, tensor.digest) != tensor.digest
        ]
        if differences:
            raise self._drift(plan.target, differences)

    def locked_record(self, plan: Plan) -> LockedSource | None:
        """Return a target's source where it is known by the very record that is locked."""
        locked = self.sources.get(plan.target.source_name)
        return locked if locked and plan.checkpoint.source.identity == locked.record else None

    def check_files(self, plan: Plan, now: Mapping[str, list[Any]]) -> list[str]:
        """Refuse a target's source that is not as it is locked, if it is.

        Args:
            plan: the target.
            now: its files, see ``LockedSource.files``.

        Returns:
            Notes for people: small files that are others, unless ``strict``.

        Raises:
            BuildError: its weights are others, or what config.json says of them; or anything is,
                and ``strict``.
        """
        locked = self.sources.get(plan.target.source_name)
        return self._compare(plan, now, locked.files) if locked and locked.record else []

    def check_known(self, plan: Plan, digests: Mapping[str, str]) -> None:
        """Refuse what ``check_files`` will, as far as that is known without reading weights.

        Args:
            plan: the target.
            digests: of stored tensors, by key.

        Raises:
            BuildError: the source is not as it is locked.
        """
        locked = self.sources.get(plan.target.source_name)
        if locked and locked.record and plan.checkpoint.source.identity != locked.record:
            now = source_record.file_digests(plan.checkpoint, digests)
            unknown = plan.checkpoint.stamps.keys() - now.keys()
            as_locked = {name: locked.files[name] for name in unknown & locked.files.keys()}
            self._compare(plan, now | as_locked, locked.files)

    def _compare(
        self, plan: Plan, now: Mapping[str, list[Any]], locked: Mapping[str, list[Any]]
    ) -> list[str]:
        # What is for people is no matter, and a lock of an older version has none of it.
        names = [
            name
            for name in sorted(now.keys() | locked.keys())
            if now.get(name) != locked.get(name) and (self.strict or not is_document(name))
        ]
        differences = [
            f"{name} is "
            + ("new" if name not in locked else "gone" if name not in now else "another")
            for name in names
        ]
        config = plan.checkpoint.config_file  # it says what the weights are
        if any(self.strict or name == config or source_record.is_weights(name) for name in names):
            raise self._drift(plan.target, differences)
        if not differences:
            return []
        return [
            f"source {plan.target.source_name} is not what {self.path.name} had: "
            f"{some(differences, MAX_NAMES, '; ')}. It is locked as it is now"
        ]

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
                self.targets[target] = msgspec.structs.replace(built, chosen=None, chosen_for=None)
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

    def check_target(
        self,
        plan: Plan,
        source: LockedSource,
        action: Action,
        recorded: Callable[[str], Manifest | None],
    ) -> list[str]:
        """Compare what is about to be packed with what is locked.

        Args:
            plan: the target.
            source: its source as it is now.
            action: that packs it.
            recorded: returns what the action of a key made, if that is on record.

        Returns:
            Notes for people: what differs although nothing that was asked for does.

        Raises:
            BuildError: it differs, and ``strict``.
        """
        locked = self.targets.get(plan.target.name)
        if not locked or locked.action == action.key:
            return []
        asked = (source.record, settings(plan))
        if (locked.source, locked.settings) != asked and not self.strict:
            return []
        then = recorded(locked.action)
        if not self.strict and then and _is_another_card(then.action, action):
            return []  # for people, and by other versions: it is locked as it is now
        fact = f"differs from {self.path.name} although nothing it is built from does: "
        fact += _differences(then, action)
        if locked.computer != plan.computer:
            fact += f"; locked was computed by {_in_words(locked.computer)}, this by "
            fact += _in_words(plan.computer)
        if self.strict:
            raise self._another(plan, fact)
        return [fact]

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

    def contradicts(
        self,
        plan: Plan,
        source: LockedSource,
        action: Action,
        recorded: Callable[[str], Manifest | None],
    ) -> bool:
        """Tell whether the same source, settings and computer made other tensors than are locked.

        Args:
            plan: the target.
            source: its source as it is now.
            action: that packs it.
            recorded: as for ``check_target``.
        """
        locked = self.targets.get(plan.target.name)
        if not locked or locked.action == action.key:
            return False
        asked = (source.record, settings(plan), plan.computer)
        if (locked.source, locked.settings, locked.computer) != asked:
            return False
        then = recorded(locked.action)
        return then is None or then.action.inputs != action.inputs

    def will_contradict(
        self, plan: Plan, action: Action, recorded: Callable[[str], Manifest | None]
    ) -> bool:
        """Tell whether it ``contradicts`` once a source that is not refused is read.

        Args:
            plan: the target.
            action: that packs it.
            recorded: as for ``check_target``.
        """
        source = self.sources.get(plan.target.source_name)
        return (
            source is not None
            and self.contradicts(plan, source, action, recorded)
            and not source_record.mismatched_files(plan.checkpoint.folder, source)
        )

    def check_output(
        self, plan: Plan, source: LockedSource, packed: Manifest, blake3: str | None
    ) -> Built:
        """Compare what was packed with what is locked, and return what is to be locked of it.

        Raises:
            BuildError: the same action made something else, or somebody made it to look as if it
                did not; or it differs, and ``strict``.
        """
        locked = self.targets.get(plan.target.name)
        sha256 = locked.sha256 if locked and locked.output == packed.result else None
        built = Built(
            source.record, settings(plan), plan.computer, packed.action.key, packed.result, blake3,
            sha256, _chosen(plan), plan.choice.record if plan.choice else None,
        )  # fmt: skip
        if locked and locked.output != built.output:
            fact = f"was built as {built.output}, and is {locked.output} in {self.path.name}"
            if locked.action == built.action:  # else check_target said what differs
                raise BuildError(
                    f"{plan.target.name} {fact}, of the same tensors and files: that was edited, "
                    f"or another mlx-make wrote it. Take {self.path.name} from version control "
                    f"again, or remove it: {COMMAND} then writes it anew."
                )
            if self.strict:
                raise self._another(plan, fact)
        # By accident no two outputs have one xxh3.
        if locked and locked.output == built.output and locked.blake3 not in (None, blake3):
            raise BuildError(
                f"{plan.target.name} was built with BLAKE3 {blake3}, and is {locked.blake3} in "
                f"{self.path.name}, though with the same xxh3: a tensor was made to be taken for "
                "another one, or the file was edited. If it was not, remove the cache's folder, "
                "and find out who wrote to its remote, or to it."
            )
        return built

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
        adapter = self.adapters.get(str(plan.target.adapter))
        pinned = [adapter.json] if adapter else []
        return digest_record([source.json, built.without_sha256.json, *pinned])

    def _save(self, targets: Mapping[str, Target]) -> None:
        """Write the file, without what models.toml does not have any more."""
        kept = {target.source_name for target in targets.values()}
        adapters = {str(target.adapter) for target in targets.values()}
        lock_format.write(
            self.path,
            Locked(
                {name: source for name, source in self.sources.items() if name in kept},
                {name: built for name, built in self.targets.items() if name in targets},
                {name: adapter for name, adapter in self.adapters.items() if name in adapters},
            ),
        )
        self._is_saved = True

    def _another(self, plan: Plan, fact: str) -> BuildError:
        return BuildError(
            f"{plan.target.name} {fact}. If that is wanted, run {COMMAND} without --locked, and "
            "commit the file."
        )

    def _drift(self, target: Target, differences: list[str]) -> BuildError:
        return BuildError(
            f"{target.name}: source {target.source_name} is not what {self.path.name} has: "
            f"{some(differences, MAX_NAMES, '; ')}. If the new one is wanted, accept it: "
            f"{COMMAND} lock, then {COMMAND}."
        )


def _adapter_on_hub(plan: Plan) -> str | None:
    """Return what models.toml calls a target's adapter, if it is on a hub."""
    return str(plan.target.adapter) if source_record.pinned_adapter(plan.model.adapter) else None


def _moved(name: str, old: LockedSource | None, now: LockedSource) -> str:
    """Return for people at which commit what is on a hub is locked now, and what is another."""
    if old is None:
        return f"{name} is locked at commit {now.revision}"
    if old.revision == now.revision:
        return f"{name} is locked at its newest commit, {now.revision}"
    changed = some(source_record.moved(old, now), MAX_NAMES) or "no file that is used is another"
    return f"{name} moved from commit {old.revision} to {now.revision}: {changed}"


def _chosen(plan: Plan) -> dict[str, tuple[int, int, str]] | None:
    if plan.choice is None:
        return None
    paths = {name: name.removesuffix("weight").removesuffix(".") for name in plan.model.settings}
    return {paths[name]: tuple(setting) for name, setting in plan.model.settings.items()}


def settings(plan: Plan) -> str:
    """Return a digest of all that a target depends on, but for what computes it."""
    nodes = [
        [n.stage.name, n.layer, n.stage.version,
         {key: value for key, value in n.params.record.items() if key not in PROGRAMS}]
        for stage in plan.stages.values() for n in stage
    ]  # fmt: skip
    target = plan.target
    laid_over = [bundle.params(plan)["files"]] if target.files else []
    shards = target.max_shard_bytes
    return digest_record(
        [target.layout, shards, plan.names, json.dumps(plan.config), nodes, *laid_over]
    )


def _differences(old: Manifest | None, new: Action) -> str:
    """Return in words how what is packed differs, tensor by tensor."""
    if old is None:
        return "what was packed then is not on record here"
    before, after = old.action.inputs, new.inputs
    changed = [
        name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)
    ]
    if not changed:
        return f"the tensors are the same, {some(_changed_files(old.action, new), MAX_NAMES)} not"
    return f"{len(changed)} of {len(after)} tensors: {some(changed, MAX_NAMES)}"


def _changed_files(old: Action, new: Action) -> list[str]:
    """Return the names of small files that are not packed the same."""
    before, after = old.params["files"], new.params["files"]
    return [name for name in sorted({**before, **after}) if before.get(name) != after.get(name)]


def _is_another_card(old: Action, new: Action) -> bool:
    """Tell whether two packings differ in what is for people alone."""
    same = {**old.params, "files": None} == {**new.params, "files": None}
    return same and old.inputs == new.inputs and all(map(is_document, _changed_files(old, new)))


def _in_words(computer: dict[str, str] | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (computer or {}).items()) or "nothing"

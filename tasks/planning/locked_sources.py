"""locked_sources: sources held against models.lock, and opened as they are locked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cache.records.manifests import Tensor
from cache.records.memos import Memos
from cache.store import Store
from tasks.checkpoints import record, sources
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.loaders import weight_patterns
from tasks.checkpoints.source import LockedCommit, Opening, ReadableSource
from tasks.core.errors import BuildError, CheckpointError
from tasks.core.program import COMMAND
from tasks.core.spec import SourceSpec, Target
from tasks.core.text import some
from tasks.layouts.card import is_document
from tasks.layouts.registry import is_read
from tasks.planning import source_record
from tasks.planning.lockfile import MAX_NAMES, Lock
from tasks.planning.plan import Plan
from tasks.planning.source_record import LockedSource


def open_source(
    lock: Lock, store: Store, target: Target, *, newest: bool = False
) -> ReadableSource:
    """Open a target's source as it is locked, if it is.

    Args:
        lock: models.lock.
        store: where what was fetched is remembered, also in a run that writes nothing else.
        target: the target.
        newest: whether to take it as it is now.
    """
    source = lock.sources.get(target.source_name)

    def digests() -> Mapping[str, str]:
        recalled = source and source.record and record.recall(store, source.record, source.nbytes)
        return recalled.source.digests if recalled else {}

    return _open(lock, store, target.source, source, digests, newest=newest)


def open_adapter(
    lock: Lock, store: Store, target: Target, *, newest: bool = False
) -> ReadableSource:
    """Open the adapter of a target that has one, as it is locked, if it is.

    Args:
        lock: models.lock.
        store: as for ``open_source``.
        target: the target.
        newest: whether to take it as it is now.
    """
    assert target.adapter is not None
    locked = lock.adapters.get(str(target.adapter))
    return _open(lock, store, target.adapter, locked, dict, newest=newest)


def _open(
    lock: Lock,
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
    project = str(lock.path.parent.absolute())
    opening = Opening(is_read, Memos(store.memos.root), project, locked, newest)
    return sources.open_source(spec, opening)


def recall(lock: Lock, store: Store, target: Target, here: ReadableSource) -> Checkpoint | None:
    """Return a target's checkpoint by its record, where its weights are not here.

    Raises:
        CheckpointError: the record is nowhere, or what is here is another checkpoint's.
    """
    source = lock.sources.get(target.source_name)
    if source is None or not source.record or here.available:
        return None
    refusal = None
    mismatched = []
    try:
        mismatched = source_record.mismatched_files(here.small_files, source)
        refusal = here.unreachable
    except CheckpointError as error:  # of a hub: there is no folder to compare
        refusal = error
    if mismatched:
        raise CheckpointError(
            f"source {target.source} has no weights, and {', '.join(mismatched[:MAX_NAMES])} "
            f"there {'is' if len(mismatched) == 1 else 'are'} not what {lock.path.name} has. "
            "Get the whole checkpoint, or take the file away."
        )
    checkpoint = record.recall(store, source.record, source.nbytes, source.revision)
    if checkpoint is None:
        record_is = (
            f"what {lock.path.name} says of it (record {source.record[:16]}…) is neither in "
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
    return replace(checkpoint, written_by=source.written_by)


def check_layer(lock: Lock, store: Store, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a layer of the checkpoint that is not what was locked.

    Raises:
        BuildError: it is another.
    """
    source = lock.sources.get(plan.target.source_name)
    if source is None or plan.checkpoint.source.identity == source.record or not source.record:
        return
    sizes = {name: stamp.size for name, stamp in plan.checkpoint.stamps.items()}
    differences = [
        f"{name} has {size:,} bytes, locked are {source.files[name][0]:,}"
        for name, size in sizes.items()
        if name in source.files and source.files[name][0] != size
    ]
    if source.record not in lock.digests:
        lock.digests[source.record] = record.tensor_digests(store, source.record)
    known = lock.digests[source.record]
    differences += [
        f"tensor {key} has other contents"
        for key, tensor in tensors.items()
        if known.get(key, tensor.digest) != tensor.digest
    ]
    if differences:
        raise _drift(lock, plan.target, differences)


def locked_record(lock: Lock, plan: Plan) -> LockedSource | None:
    """Return a target's source where it is known by the very record that is locked."""
    locked = lock.sources.get(plan.target.source_name)
    return locked if locked and plan.checkpoint.source.identity == locked.record else None


def check_files(lock: Lock, plan: Plan, now: Mapping[str, list[Any]]) -> list[str]:
    """Refuse a target's source that is not as it is locked, if it is.

    Args:
        lock: models.lock.
        plan: the target.
        now: its files, see ``LockedSource.files``.

    Returns:
        Notes for people: small files that are others, unless ``strict``.

    Raises:
        BuildError: its weights are others, or what config.json says of them; or anything is,
            and ``strict``.
    """
    locked = lock.sources.get(plan.target.source_name)
    return _compare(lock, plan, now, locked.files) if locked and locked.record else []


def check_known(lock: Lock, plan: Plan, digests: Mapping[str, str]) -> None:
    """Refuse what ``check_files`` will, as far as that is known without reading weights.

    Args:
        lock: models.lock.
        plan: the target.
        digests: of stored tensors, by key.

    Raises:
        BuildError: the source is not as it is locked.
    """
    locked = lock.sources.get(plan.target.source_name)
    if locked and locked.record and plan.checkpoint.source.identity != locked.record:
        now = source_record.file_digests(plan.checkpoint, digests)
        unknown = plan.checkpoint.stamps.keys() - now.keys()
        as_locked = {name: locked.files[name] for name in unknown & locked.files.keys()}
        _compare(lock, plan, now | as_locked, locked.files)


def _compare(
    lock: Lock, plan: Plan, now: Mapping[str, list[Any]], locked: Mapping[str, list[Any]]
) -> list[str]:
    # What is for people is no matter, and a lock of an older version has none of it.
    names = [
        name
        for name in sorted(now.keys() | locked.keys())
        if now.get(name) != locked.get(name) and (lock.strict or not is_document(name))
    ]
    differences = [
        f"{name} is " + ("new" if name not in locked else "gone" if name not in now else "another")
        for name in names
    ]
    config = plan.checkpoint.config_file  # it says what the weights are
    if any(lock.strict or name == config or source_record.is_weights(name) for name in names):
        raise _drift(lock, plan.target, differences)
    if not differences:
        return []
    return [
        f"source {plan.target.source_name} is not what {lock.path.name} had: "
        f"{some(differences, MAX_NAMES, '; ')}. It is locked as it is now"
    ]


def _drift(lock: Lock, target: Target, differences: list[str]) -> BuildError:
    return BuildError(
        f"{target.name}: source {target.source_name} is not what {lock.path.name} has: "
        f"{some(differences, MAX_NAMES, '; ')}. If the new one is wanted, accept it: "
        f"{COMMAND} lock, then {COMMAND}."
    )

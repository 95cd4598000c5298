"""source_record: what models.lock has of a source, and whether a source still is that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cache.digest import digest, digest_file, digest_list
from cache.store import Store
from tasks.checkpoints import adapter as adapters
from tasks.checkpoints import record
from tasks.checkpoints.adapter import Adapter
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.loaders import weight_patterns
from tasks.checkpoints.small_files import read_bytes
from tasks.checkpoints.stored import Stored
from tasks.core.errors import CheckpointError
from tasks.layouts import architecture, mlx_vlm_mtp
from tasks.layouts.registry import LAYOUTS


@dataclass(frozen=True)
class LockedSource:
    """A checkpoint as models.lock has it.

    Attributes:
        files: size in bytes and digest of each file that is used. Of a weight file it is that of
            the table of its tensors, with their digests.
        record: BLAKE3 of the record; "" of a commit on the hub that nothing was built of yet.
        nbytes: of the record.
        revision: the commit on the hub that it is of, if that is known.
        hashes: of a source on the hub: size and ``sha256:…``, or ``git:…``, of each of the files.
        unverified: the weight files that were fetched in parts, by several runs, so that nobody
            held all their bytes against the sha256 that is known of them.
        written_by: see ``Checkpoint``; None, nothing in it predicts further tokens, or an older
            version locked it.
    """

    files: dict[str, list[Any]]
    record: str
    nbytes: int
    revision: str | None = None
    hashes: dict[str, list[Any]] | None = None
    unverified: tuple[str, ...] | None = None
    written_by: str | None = None

    @property
    def json(self) -> dict[str, Any]:
        """What models.lock has: of a folder, no hashes."""
        record = asdict(self)
        for name in ("hashes", "unverified", "written_by"):
            if record[name] is None:
                del record[name]
        return record


def take(
    store: Store,
    checkpoint: Checkpoint,
    digests: Mapping[str, str],
    unverified: Iterable[str] = (),
    *,
    mends: bool = False,
) -> LockedSource:
    """Return a checkpoint as models.lock has it, and keep its record.

    Args:
        store: where the record is kept, and shared from.
        checkpoint: the checkpoint.
        digests: of all its tensors, by key.
        unverified: see ``LockedSource``.
        mends: see ``record.share``.
    """
    if not checkpoint.source.available:
        raise ValueError("a recalled checkpoint is what its record says")
    small = _small_files(checkpoint)
    name, nbytes = record.keep(store, checkpoint, digests, small, mends=mends)
    files = _files(checkpoint, digests, small)
    files = dict(sorted(files.items()))
    revision, hashes = checkpoint.source.revision, _hashes(checkpoint, files)
    written_by = None
    if architecture.predictors(checkpoint):
        written_by = mlx_vlm_mtp.written_by(checkpoint, store.memos)
    return LockedSource(
        files, name, nbytes, revision, hashes or None, tuple(unverified) or None, written_by
    )


def pinned(checkpoint: Checkpoint) -> LockedSource:
    """Return a checkpoint that its source pins, without reading its weights."""
    files = [*_small_files(checkpoint), *checkpoint.stamps]
    return LockedSource({}, "", 0, checkpoint.source.revision, _hashes(checkpoint, files))


def pinned_adapter(adapter: Adapter | None) -> LockedSource | None:
    """Return an adapter as models.lock has it: at a commit, with its files' digests.

    None if there is none, or it is on no hub.
    """
    known = adapter.source.hashes if adapter else {}
    if not adapter or not known:
        return None
    names = (adapters.CONFIG, adapter.file)
    hashes = {name: [known[name].size, known[name].digest] for name in sorted(names)}
    return LockedSource({}, "", 0, adapter.source.revision, hashes)


def moved(old: LockedSource | None, new: LockedSource) -> list[str]:
    """Say which files are others at another commit."""
    before, after = (old and old.hashes) or {}, new.hashes or {}
    return [
        f"{name} is {'new' if name not in before else 'gone' if name not in after else 'another'}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _hashes(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, list[Any]]:
    known = checkpoint.source.hashes
    return {n: [known[n].size, known[n].digest] for n in sorted(names) if n in known}


def file_digests(checkpoint: Checkpoint, digests: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return ``LockedSource.files``, of weight files those whose digests are all known."""
    return _files(checkpoint, digests, _small_files(checkpoint))


def _files(
    checkpoint: Checkpoint, digests: Mapping[str, str], small: Mapping[str, bytes]
) -> dict[str, list[Any]]:
    files = {name: [len(data), digest(data)] for name, data in small.items()}
    tables: dict[str, list[tuple[str, Stored]]] = {name: [] for name in checkpoint.stamps}
    for key, stored in checkpoint.stored.items():
        tables[stored.file].append((key, stored))
    for name, table in tables.items():
        if all(key in digests for key, _ in table):
            rows = ([key, stored.dtype, stored.shape, digests[key]] for key, stored in table)
            files[name] = [checkpoint.stamps[name].size, digest_list(rows)]
    return files


def mismatched_files(folder: Path, source: LockedSource) -> list[str]:
    """Return the names of a source's small files that are others in a folder."""
    return [
        name
        for name, (size, known) in source.files.items()
        if not is_weights(name)
        and (folder / name).is_file()
        and ((folder / name).stat().st_size != size or digest_file(folder / name) != known)
    ]


def is_weights(name: str) -> bool:
    """Tell whether a source's file holds weights."""
    return any(fnmatch(name, pattern) for pattern in weight_patterns())


def _small_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return all files that are read besides the weights, by name, whatever the layout."""
    names = {*checkpoint.files, checkpoint.config_file}
    for layout in LAYOUTS.values():
        with suppress(CheckpointError):  # it cannot be built in that layout
            paths = layout.sources(checkpoint)
            names |= {path.relative_to(checkpoint.folder).as_posix() for path in paths}
    return {name: read_bytes(checkpoint.folder / name) for name in sorted(names)}

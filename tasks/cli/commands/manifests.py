"""manifests: what was last built of the targets of a models.toml, as its manifests say."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cache.digest import digest
from cache.files.stamp import Stamp
from cache.maintenance.gc import Wanted
from cache.maintenance.survey import Survey, inventory
from cache.records.manifests import Manifest, ManifestError
from tasks.checkpoints import record as source_records
from tasks.cli.doit_database import Database, Left
from tasks.config.reader import Config
from tasks.core.task_names import PACK, is_packing, task_name
from tasks.core.workspace import Workspace
from tasks.planning.lockfile import Lock
from tasks.stages import registry

_Stamp = tuple[int, int, int]  # a ``Stamp`` as a plain tuple: of half a million, made in a third


class Record(NamedTuple):
    """One task's manifest.

    Attributes:
        target: the target's name.
        stage: the stage's, or pack.
        layer: the layer's; of packing, none.
        manifest: what it says; one for all tasks that left the same.
    """

    target: str
    stage: str
    layer: str
    manifest: Manifest

    @property
    def task(self) -> str:
        """The task's name."""
        return task_name(_group(self.stage), self.target, self.layer)

    def path(self, workspace: Workspace) -> Path:
        """Return where the manifest lies."""
        if is_packing(self.stage):
            return workspace.packed(self.target)
        return Path(workspace.manifest(self.target, self.stage, self.layer))


def read(config: Config, stages: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the records of all targets, each target's in the order of its stages.

    Args:
        config: what models.toml says.
        stages: those to read; by default all, and packing.
    """
    groups = {stage: _group(stage) for stage in stages or (*registry.names(), PACK)}
    workspace = Workspace(config.path.parent)
    database = Database(str(workspace.state / "doit.json"), None)
    reader = _Reader()
    for target in config.targets:
        left = database.left(target)
        for stage, group in groups.items():
            of_target = task_name(group, target)
            for layer, path, now in _files(workspace, target, stage):
                task = f"{of_target}:{layer}" if layer else of_target  # there are thousands
                manifest = reader.at(path, now, left.get(task))
                if manifest:  # else doit makes it again
                    yield Record(target, stage, layer, manifest)


def _group(stage: str) -> str:
    """Return the group of a stage's tasks, or of packing."""
    groups = {each.name: each.group for each in registry.stages()}
    return groups.get(stage, stage)


def _files(workspace: Workspace, target: str, stage: str) -> Iterator[tuple[str, str, _Stamp]]:
    """Yield the layers of a stage that have a manifest, where it lies, and its stamp."""
    if is_packing(stage):
        with suppress(FileNotFoundError, NotADirectoryError):
            path = workspace.packed(target)
            yield "", str(path), Stamp.of(path)
        return
    files: list[tuple[str, str, _Stamp]] = []
    folder = os.path.dirname(workspace.manifest(target, stage, ""))
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json"):
                info = entry.stat()
                now = info.st_size, info.st_mtime_ns, info.st_ino
                files.append((sys.intern(entry.name[: -len(".json")]), entry.path, now))
    files.sort()
    yield from files


class _Reader:
    """Reads manifests; of those that many targets have in common, only the first."""

    def __init__(self) -> None:
        self._known: dict[str, Manifest] = {}

    def at(self, path: str, stamp: _Stamp, left: Left | None) -> Manifest | None:
        """Return the manifest in a file, or None if there is none that can be read.

        Args:
            path: the file's.
            stamp: the file's.
            left: what the task left there, by doit's database: the same stamp saves to read it.
        """
        if left and left[:3] == stamp and (manifest := self._known.get(left[3])):
            return manifest
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            return None
        key = digest(data)
        if key not in self._known:
            try:
                self._known[key] = Manifest.from_bytes(data)
            except ManifestError:
                return None
        return self._known[key]


def survey(config: Config) -> Survey:
    """Return what the cache holds, records of sources included."""
    return inventory(config.cache.dir, [source_records.KIND])


def wanted(config: Config, records: Iterable[Record]) -> Wanted:
    """Return what the targets need of the cache, to be built with other settings as well.

    Raises:
        ConfigError: models.lock, which names the sources' records, cannot be read.
    """
    locked = Lock.load(config.path.with_suffix(".lock"), strict=False).sources
    sources = {target.source_name for target in config.targets.values()}
    manifests = {id(record.manifest): record.manifest for record in records}.values()
    return Wanted(
        frozenset(tensor.digest for m in manifests for tensor in m.tensors.values()),
        frozenset(manifest.action.key for manifest in manifests),
        frozenset(source.record for name, source in locked.items() if name in sources),
        memos=True,
    )


def owners(
    records: Iterable[Record], digests: Container[str] | None = None
) -> dict[str, list[tuple[Record, str]]]:
    """Return by digest the records that name a blob, in the order of stages, and the tensor.

    Args:
        records: what was built.
        digests: of the blobs; of all by default.
    """
    by_digest: dict[str, list[tuple[Record, str]]] = {}
    for record in records:
        for name, tensor in record.manifest.tensors.items():
            if digests is None or tensor.digest in digests:
                by_digest.setdefault(tensor.digest, []).append((record, name))
    order = (*registry.names(), PACK)
    for holders in by_digest.values():
        holders.sort(key=lambda holder: order.index(holder[0].stage))
    return by_digest


def described(named: Iterable[tuple[Record, str]]) -> str:
    """Return for people what a blob is, given the records that name it."""
    holders = list(named)
    if not holders:
        return "of no current target"
    record, name = holders[0]
    others = {other.target for other, _ in holders} - {record.target}
    more = f", and of {', '.join(sorted(others))}" if others else ""
    return f"{record.task} {name}{more}"

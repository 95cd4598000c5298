"""records: what was last built of the targets of a models.toml, as its manifests say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cache.maintenance.gc import Wanted
from cache.maintenance.survey import Survey, inventory
from cache.records.manifests import Manifest
from tasks.checkpoints import record as source_records
from tasks.config.reader import Config
from tasks.core.task_names import PACK, task_name
from tasks.core.workspace import STATE
from tasks.planning.lockfile import Lock
from tasks.stages import registry


@dataclass(frozen=True)
class Record:
    """One task's manifest.

    Attributes:
        target: the target's name.
        task: the task's name.
        path: where the manifest lies.
        manifest: what it says.
    """

    target: str
    task: str
    path: Path
    manifest: Manifest


def read(config: Config) -> list[Record]:
    """Return the records of all targets, stage by stage."""
    folder = config.path.parent / STATE / "manifests"
    records = []
    patterns = {stage.group: f"{stage.name}/*.json" for stage in registry.stages()}
    for group, pattern in {**patterns, PACK: "pack.json"}.items():
        for target in config.targets:
            for path in sorted((folder / target).glob(pattern)):
                task = task_name(group, target, "" if group == PACK else path.stem)
                if manifest := Manifest.at(path):  # else made again when doit looks
                    records.append(Record(target, task, path, manifest))
    return records


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
    records = list(records)
    return Wanted(
        frozenset(
            tensor.digest for record in records for tensor in record.manifest.tensors.values()
        ),
        frozenset(record.manifest.action.key for record in records),
        frozenset(s.record for name, s in locked.items() if name in sources and s.record),
        memos=True,
    )


def owners(records: Iterable[Record]) -> dict[str, list[tuple[Record, str]]]:
    """Return by digest the records that name a blob, in the order of stages, and the tensor."""
    by_digest: dict[str, list[tuple[Record, str]]] = {}
    for record in records:
        for name, tensor in record.manifest.tensors.items():
            by_digest.setdefault(tensor.digest, []).append((record, name))
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

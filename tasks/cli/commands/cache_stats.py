"""cache_stats: what a cache holds, for people: by kind, stage and target, and its hits."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from cache.maintenance.survey import Survey
from cache.records.manifests import Manifest
from tasks.cli.commands.manifests import Record, described, owners, read
from tasks.cli.table import aligned, cut
from tasks.config.reader import Config
from tasks.core.program import COMMAND
from tasks.core.task_names import PACK
from tasks.core.text import plural, size
from tasks.core.workspace import STATE
from tasks.execution.log import OUTCOMES, Log
from tasks.stages import registry
from tasks.stages.forward_params import is_handed_on
from tasks.stages.running import ModelStage

WIDTH = 80
LARGEST = 5
KIND_NAMES = {
    "blob": "blobs",
    "reference": "references",
    "container": "containers of blobs",
    "action": "action entries",
    "memo": "memos",
    "source": "source records",
    "temporary": "temporary files",
    "corrupt": "set aside as corrupt",
}


def text(config: Config, survey: Survey) -> Iterator[str]:
    """Yield the lines of ``doit cache stats``."""
    records = [*read(config, registry.names())]
    bound = f" of {size(config.cache.max_bytes)}" if config.cache.max_bytes is not None else ""
    yield f"{config.cache.dir}: {size(survey.size)}{bound}"
    yield ""
    yield from _kinds(survey)
    yield ""
    yield from _targets(config, survey, records)
    yield ""
    yield from _largest(config, survey, records)
    yield from _hits(Log(config.path.parent / STATE / "log.jsonl"))


def _kinds(survey: Survey) -> Iterator[str]:
    rows = [("kind", "files", "size")]
    for kind, name in KIND_NAMES.items():
        count, nbytes = survey.count(kind)
        if count or kind in ("blob", "reference", "action", "memo"):
            rows.append((name, str(count), size(nbytes)))
    yield from aligned(rows, WIDTH)
    elsewhere = size(survey.references.elsewhere())
    yield f"References name {elsewhere} in checkpoints, which are not copied."


def _targets(config: Config, survey: Survey, records: Sequence[Record]) -> Iterator[str]:
    """Say what each target needs, a blob under the stage that made it."""
    own = survey.owned
    rows: list[tuple[str, ...]] = [("target", *(stage.group for stage in registry.stages()), "all")]
    owned_so_far: set[str] = set()
    shared_bytes = 0
    makers_of = _Makers(survey)
    by_target = {t: [*of] for t, of in groupby(records, key=lambda record: record.target)}
    for target in config.targets:
        makers = makers_of([record.manifest for record in by_target.get(target, ())])
        rows.append(_row(target, makers, own))
        shared_bytes += sum(own[digest] for digest in makers.keys() & owned_so_far)
        owned_so_far |= makers.keys()
    in_use = makers_of.in_use
    first = _FirstStages(survey)
    for manifest in {id(record.manifest): record.manifest for record in records}.values():
        first.see(manifest)
    if not own.keys() <= in_use:  # else there is nothing of what was made before
        for manifest in survey.manifests():
            first.see(manifest)
    rows.append(("(no current target)", *map(size, first.sizes(without=in_use))))
    rows.append(("(all)", *map(size, first.sizes())))
    # Most models have neither an adapter nor a method, and none is run.
    empty = {i for i, name in enumerate(rows[0][:-1]) if rows[-1][i] == size(0)}
    yield from aligned([_without(row, empty) for row in rows], WIDTH)
    if shared_bytes:
        yield f"What several targets share, {size(shared_bytes)}, is counted once in (all)."
    if handed_on := sum(map(own.__getitem__, _handed_on(records) & own.keys())):
        yield f"{size(handed_on)} are states between blocks, for runs that go on from there."
    # What lies in one container with something that is needed stays with it.
    needed = sum(map(own.__contains__, in_use)) + sum(
        not in_use.isdisjoint(survey.references.pinned(index))
        for index in own.every_inside()
        if survey.references.files.key_at(index) not in in_use
    )
    if count := len(own) - needed:
        removes = f"{COMMAND} cache gc removes such with a size cap"
        yield f"No current target needs {count} blobs; {removes}."


def _handed_on(records: Iterable[Record]) -> set[str]:
    """Return the digests of what a block of a model, as that was run, left for the next one."""
    runs_models = {stage.name for stage in registry.stages() if isinstance(stage, ModelStage)}
    return {
        tensor.digest
        for record in records
        if record.manifest.action.stage in runs_models
        for name, tensor in record.manifest.tensors.items()
        if is_handed_on(name)
    }


def _without(row: Sequence[str], columns: Collection[int]) -> tuple[str, ...]:
    return tuple(cell for i, cell in enumerate(row) if i not in columns)


class _Makers:
    """Tells which stage made blobs. What a manifest says is worked out once.

    Attributes:
        in_use: all that the manifests name that were asked of, or that is a part of it.
    """

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._reached: dict[int, tuple[Manifest, dict[str, str]]] = {}  # by id of the manifest
        self.in_use: set[str] = set()

    def __call__(self, manifests: Iterable[Manifest]) -> dict[str, str]:
        """Return by digest the first stage that names a blob: later ones only pass it on.

        Of blobs that the cache itself has, and no others.
        """
        names = registry.names()
        layers = [manifest for manifest in manifests if manifest.action.stage in names]
        makers: dict[str, str] = {}
        for manifest in sorted(layers, key=lambda m: -names.index(m.action.stage)):
            makers |= self._reach(manifest)
        return makers

    def _reach(self, manifest: Manifest) -> dict[str, str]:
        if id(manifest) not in self._reached:
            reached = self._survey.reach(tensor.digest for tensor in manifest.tensors.values())
            self.in_use |= reached
            owned = filter(self._survey.owned.__contains__, reached)
            self._reached[id(manifest)] = manifest, dict.fromkeys(owned, manifest.action.stage)
        return self._reached[id(manifest)][1]


class _FirstStages:
    """Tells of all blobs that the cache has, of which there may be millions, which stage made them.

    It is the first that names a blob: later ones only pass it on.
    """

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._stages = registry.names()
        self._of_files = bytearray([len(self._stages)]) * len(survey.owned.files)
        self._of_inside = bytearray([len(self._stages)]) * len(survey.references.files)

    def see(self, manifest: Manifest) -> None:
        """Take note of what a manifest names."""
        if manifest.action.stage not in self._stages:
            return
        stage = self._stages.index(manifest.action.stage)
        for digest in self._survey.reach(tensor.digest for tensor in manifest.tensors.values()):
            of, index = self._find(digest)
            if index is not None:
                of[index] = min(of[index], stage)

    def _find(self, digest: str) -> tuple[bytearray, int | None]:
        """Return where it is noted who made a blob."""
        owned = self._survey.owned
        if (index := owned.files.find(digest)) is not None:
            return self._of_files, index
        return self._of_inside, owned.find_inside(digest)

    def sizes(self, without: Collection[str] = ()) -> list[int]:
        """Return the bytes of the blobs that each stage made, and at last those of all blobs.

        Args:
            without: digests of those to be left out.
        """
        owned = self._survey.owned
        sizes = [0] * (len(self._stages) + 1)  # the last: nobody knows
        for stage, nbytes in zip(self._of_files, owned.files.sizes, strict=True):
            sizes[stage] += nbytes
        for index in owned.every_inside():
            sizes[self._of_inside[index]] += owned.references.sizes[index]
        for digest in without:
            of, place = self._find(digest)
            if place is not None:
                sizes[of[place]] -= owned[digest]
        return [*sizes[:-1], sum(sizes)]


def _row(name: str, makers: Mapping[str, str], own: Mapping[str, int]) -> tuple[str, ...]:
    by_stage = dict.fromkeys(registry.names(), 0)
    for digest, stage in makers.items():
        by_stage[stage] += own[digest]
    return name, *map(size, by_stage.values()), size(sum(by_stage.values()))


def _largest(config: Config, survey: Survey, records: Iterable[Record]) -> Iterator[str]:
    largest = survey.owned.largest(LARGEST)
    named = owners(records, largest)
    if unnamed := largest.keys() - named.keys():
        named |= owners(read(config, [PACK]), unnamed)
    if largest:
        yield "largest blobs"
        for digest, nbytes in largest.items():
            yield cut(f"{size(nbytes):>9}  {described(named.get(digest, ()))}", WIDTH)
        yield ""


def _hits(log: Log) -> Iterator[str]:
    entries = list(log.entries())
    if not entries:
        yield "The build log says nothing: nothing was built here yet."
        return
    since = time.strftime("%Y-%m-%d", time.localtime(entries[0].start))
    runs = plural(len({entry.run for entry in entries}), "run")
    yield f"since {since}, in {runs} that built something"
    rows = [("tasks", "count", "read", "written")]
    for outcome in OUTCOMES:
        chosen = [entry for entry in entries if entry.outcome == outcome]
        read = sum(entry.bytes_read for entry in chosen)
        rows.append(
            (outcome, str(len(chosen)), size(read), size(sum(e.bytes_written for e in chosen)))
        )
    yield from aligned(rows, WIDTH)

"""gc: garbage collection: what may go from a cache, least recently used first.

It is made so that nobody else has to be asked: who has a cache folder in common with others knows
only what they used of late. See ``cache.lock`` on builds that run meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cache.files import atomic, trash
from cache.maintenance.survey import CORRUPT, File, Survey

RECORD_SECONDS = 90 * 24 * 3600  # how long records (all but blobs) are kept that nobody uses


@dataclass(frozen=True)
class Wanted:
    """What must stay.

    Attributes:
        blobs: by digest.
        actions: by key.
        others: records of other kinds than the cache's own, by key.
        memos: whether all of them; nobody can tell whose they are, and they are small.
    """

    blobs: frozenset[str] = frozenset()
    actions: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    memos: bool = False


@dataclass(frozen=True)
class Collection:
    """What goes and what stays.

    Attributes:
        garbage: nobody can use it, or nobody did for long.
        evicted: usable; goes for the sake of the size.
        spare: usable, not wanted, stays.
        size: bytes that stay, of all kinds.
    """

    garbage: list[File] = field(default_factory=list)
    evicted: list[File] = field(default_factory=list)
    spare: list[File] = field(default_factory=list)
    size: int = 0


def plan(survey: Survey, wanted: Wanted, max_bytes: int | None, now: float) -> Collection:
    """Choose what goes.

    Args:
        survey: what there is.
        wanted: what must stay.
        max_bytes: what is to be left at most, or None for no bound.
        now: Unix time.
    """
    stays = survey.reach(wanted.blobs)
    filled = {key for digest in survey.parts for key in survey.pinned(digest)}
    records = {"action": wanted.actions, "memo": frozenset[str]()}
    records |= dict.fromkeys(survey.others, wanted.others)
    garbage = [file for file in survey.files if _is_garbage(file, records, filled, now)]
    left = survey.size - sum(file.size for file in garbage)
    evicted: list[File] = []
    spare: list[File] = []
    seen = set(garbage)
    for group in (*_blobs(survey, stays), *_records(survey, wanted)):
        # What lies in two files is in both groups, and goes with the first.
        new = [file for file in group if file not in seen]
        seen.update(new)
        if max_bytes is not None and left > max_bytes:
            evicted += new
            left -= sum(file.size for file in new)
        else:
            spare += new
    return Collection(garbage, evicted, spare, left)


def carry_out(collection: Collection) -> None:
    """Remove what goes; the lock must be held alone."""
    for file in (*collection.garbage, *collection.evicted):
        trash.remove(file.path)


def _is_garbage(
    file: File, records: Mapping[str, frozenset[str]], filled: set[str], now: float
) -> bool:
    """Tell whether nobody can use a file, or nobody did for long.

    Args:
        file: the file.
        records: the keys of those that are wanted, by kind.
        filled: keys of the containers in which a blob lies.
        now: Unix time.
    """
    if file.kind == "temporary":
        return atomic.abandoned(file.path)
    if file.kind == "container":  # one that is begun has no blob yet
        return file.key not in filled and now - file.used > atomic.SWEEP_SECONDS
    if file.kind in records:
        return file.key not in records[file.kind] and now - file.used > RECORD_SECONDS
    return file.kind == CORRUPT


def _blobs(survey: Survey, stays: set[str]) -> Iterator[list[File]]:
    """Yield blobs and references in the order in which they may go, in groups that go as a whole.

    A file in which a reference's parts lie is used whenever that is. If it is a blob it goes after
    it; a container goes with all references into it, since there is no room to be had of a part.
    """
    containers = survey.of("container")
    inside: dict[str, list[File]] = defaultdict(list)
    groups = []
    for digest, file in survey.of("reference").items():
        where = survey.pinned(digest)
        for key in where:
            inside[key].append(file)
        if where.isdisjoint(containers):
            groups.append([file])
    # The file last: if removing is interrupted, no reference is left to nothing.
    groups += [[*inside[key], file] for key, file in (survey.of("blob") | containers).items()]

    def turn(group: list[File]) -> tuple[float, bool]:
        return max(file.used for file in group), group[-1].kind == "blob"

    unwanted = [group for group in groups if stays.isdisjoint(file.key for file in group)]
    yield from sorted(unwanted, key=turn)


def _records(survey: Survey, wanted: Wanted) -> Iterator[list[File]]:
    """Yield other records, each alone; after the blobs, since they are small and save much."""
    unwanted = [
        *(file for key, file in survey.of("action").items() if key not in wanted.actions),
        *(
            file
            for kind in survey.others
            for key, file in survey.of(kind).items()
            if key not in wanted.others
        ),
        *(survey.of("memo").values() if not wanted.memos else ()),
    ]
    yield from ([file] for file in sorted(unwanted, key=lambda file: file.used))

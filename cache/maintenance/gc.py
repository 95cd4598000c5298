"""gc: garbage collection: what may go from a cache, least recently used first.

It is made so that nobody else has to be asked: who has a cache folder in common with others knows
only what they used of late. See ``cache.lock`` on builds that run meanwhile.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from cache.files import atomic
from cache.maintenance.survey import CORRUPT, File, Files, Survey

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


GARBAGE = "garbage"  # nobody can use it, or nobody did for long
EVICTED = "least recently used"  # usable; goes for the sake of the size


@dataclass
class Collection:
    """What goes and what stays.

    Attributes:
        removed: files and bytes that go, by why and kind.
        spare: bytes that are usable, not wanted, and stay.
        size: bytes that stay, of all kinds.
    """

    removed: dict[tuple[str, str], tuple[int, int]]
    spare: int
    size: int

    def remove(self, file: File, why: str) -> None:
        """Count a file that goes."""
        count, size = self.removed.get((why, file.kind), (0, 0))
        self.removed[why, file.kind] = count + 1, size + file.size
        self.size -= file.size


def collect(
    survey: Survey,
    wanted: Wanted,
    max_bytes: int | None,
    now: float,
    remove: Callable[[File], object],
) -> Collection:
    """Choose what goes, and remove it.

    Args:
        survey: what there is.
        wanted: what must stay.
        max_bytes: what is to be left at most, or None for no bound.
        now: Unix time.
        remove: removes a file; the lock must be held alone.
    """
    stays = survey.reach(wanted.blobs)
    filled = {key for digest in survey.parts for key in survey.pinned(digest)}
    records = {"action": wanted.actions, "memo": frozenset[str]()}
    records |= dict.fromkeys(survey.others, wanted.others)
    collected = Collection({}, 0, survey.size)
    seen: set[File] = set()  # of those that are in several groups
    for file in survey.files:
        if _is_garbage(file, records, filled, now):
            seen.add(file)
            collected.remove(file, GARBAGE)
            remove(file)
    for group in chain(_blobs(survey, stays), _records(survey, wanted)):
        # What lies in two files is in both groups, and goes with the first.
        new = [file for file in group if file not in seen]
        seen.update(file for file in new if file.kind == "reference")
        if max_bytes is not None and collected.size > max_bytes:
            for file in new:
                collected.remove(file, EVICTED)
                remove(file)
        else:
            collected.spare += sum(file.size for file in new)
    return collected


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
        if not any(key in containers for key in where):
            groups.append([file])
    files = survey.own_files
    held = {key: files[key] for key in inside if key in files}
    # The file last: if removing is interrupted, no reference is left to nothing.
    groups += [[*inside[key], file] for key, file in chain(held.items(), containers.items())]

    def turn(group: list[File]) -> tuple[int, bool]:
        return int(max(file.used for file in group)), group[-1].kind == "blob"

    unwanted = [group for group in groups if stays.isdisjoint(file.key for file in group)]
    alone = _oldest_first(files, stays.union(held))
    yield from heapq.merge(sorted(unwanted, key=turn), alone, key=turn)


def _oldest_first(files: Files, without: Iterable[str]) -> Iterator[list[File]]:
    """Yield blobs in which no reference's parts lie, each alone: there may be millions.

    Args:
        files: those that have a file.
        without: keys of those to be left out.
    """
    left_out = {files.find(key) for key in without}
    order = [int(used) << 32 | index for index, used in enumerate(files.used)]
    order.sort()
    for each in order:
        index = each & 0xFFFFFFFF
        if index not in left_out:
            yield [files.at(index)]


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

"""gc: garbage collection: what may go from a cache, least recently used first.

It is made so that nobody else has to be asked: who has a cache folder in common with others knows
only what they used of late. See ``cache.lock`` on builds that run meanwhile.
"""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import cast

from cache.files import atomic
from cache.maintenance.files import File, Files, ordered
from cache.maintenance.survey import CORRUPT, Survey

RECORD_SECONDS = 90 * 24 * 3600  # how long records (all but blobs) are kept that nobody uses


# When it was last used, whether a blob's file is the last of it, and what gives its files.
_Group = tuple[int, bool, Callable[[], list[File]]]


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
    filled = {*survey.references.keys}
    records = {"action": wanted.actions, "memo": frozenset[str]()}
    records |= dict.fromkeys(survey.others, wanted.others)
    collected = Collection({}, 0, survey.size)
    for file in survey.files:
        if _is_garbage(file, records, filled, now):
            collected.remove(file, GARBAGE)
            remove(file)
    for group in chain(_blobs(survey, stays), _records(survey, wanted)):
        new = [file for file in group if not _is_garbage(file, records, filled, now)]
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
    files, references = survey.own_files, survey.references
    containers = survey.of("container")
    lying = _LyingIn(survey, stays)
    groups = [*lying.groups(stays)]
    filled = {*references.keys}
    for key, container in containers.items():
        if key not in filled and key not in stays:
            groups.append((int(container.used), False, partial(list, [container])))
    groups.sort(key=_turn)
    held = {key for key in references.keys if key not in containers}
    without = {files.find(key) for key in stays | held}
    alone: Iterator[_Group] = (
        (time, False, partial(lying.by_itself, index))
        for time, index in _oldest_first(references.files, lying.goes_with_another)
    )
    blobs: Iterator[_Group] = (
        (time, True, partial(_at, files, index))
        for time, index in _oldest_first(files, without.__contains__)
    )
    for _, _, group in heapq.merge(groups, alone, blobs, key=_turn):
        yield group()


class _LyingIn:
    """What lies in which of the cache's files: some bytes for each reference."""

    def __init__(self, survey: Survey, stays: set[str]) -> None:
        self._references = references = survey.references
        containers, files = survey.of("container"), survey.own_files
        self._own = [containers.get(key) or files.get(key) for key in references.keys]
        self._inside: dict[int, array[int]] = defaultdict(lambda: array("Q"))
        self._latest: dict[int, float] = defaultdict(float)
        self._pinned: set[int] = set()  # files in which something lies that stays
        self._gone: set[int] = set()  # what lies in two files goes with the first
        self._with_another = bytearray(len(references.files))
        stay = {references.files.find(key) for key in stays}
        for index, used in enumerate(references.files.used):
            where = references.where(index)
            for place in where:
                self._inside[place].append(index)
                self._latest[place] = max(self._latest[place], used)
            if index in stay:
                self._pinned.update(where)
            kinds = {file.kind for place in where if (file := self._own[place])}
            self._with_another[index] = index in stay or "container" in kinds

    def groups(self, stays: set[str]) -> Iterator[_Group]:
        """Yield a group for each file in which something lies, if nothing of it stays."""
        for place, file in enumerate(self._own):
            if file and place not in self._pinned and file.key not in stays:
                used = max(self._latest[place], file.used)
                yield int(used), file.kind == "blob", partial(self._lying_in, place, file)

    def _lying_in(self, place: int, file: File) -> list[File]:
        new = [index for index in self._inside[place] if index not in self._gone]
        self._gone.update(index for index in new if len(self._references.where(index)) > 1)
        # The file last: if removing is interrupted, no reference is left to nothing.
        return [*map(self._references.files.at, new), file]

    def goes_with_another(self, index: int) -> bool:
        """Tell whether a reference stays, or goes with the container in which it lies."""
        return bool(self._with_another[index])

    def by_itself(self, index: int) -> list[File]:
        """Return the files of a reference that goes alone."""
        new = index not in self._gone
        if self._references.where(index):
            self._gone.add(index)
        return [self._references.files.at(index)] if new else []


def _at(files: Files, index: int) -> list[File]:
    return [files.at(index)]


def _turn(group: _Group) -> tuple[int, bool]:
    return group[:2]


def _oldest_first(files: Files, is_left_out: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
    """Yield when files were last used, and their places among them: there may be millions."""
    used = array("Q", map(int, files.used))
    places = array("Q", range(len(used)))
    return ((time, index) for time, index in ordered(used, places) if not is_left_out(index))


def _records(survey: Survey, wanted: Wanted) -> Iterator[list[File]]:
    """Yield other records, each alone; after the blobs, since they are small and save much."""
    rest = [
        *(
            file
            for kind in survey.others
            for key, file in survey.of(kind).items()
            if key not in wanted.others
        ),
        *(survey.of("memo").values() if not wanted.memos else ()),
    ]
    rest.sort(key=lambda file: int(file.used))
    actions = cast(Files, survey.of("action"))
    kept = {actions.find(key) for key in wanted.actions}
    oldest = (actions.at(index) for _, index in _oldest_first(actions, kept.__contains__))
    yield from ([file] for file in heapq.merge(rest, oldest, key=lambda file: int(file.used)))

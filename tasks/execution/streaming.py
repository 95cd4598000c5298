"""streaming: a checkpoint whose bytes come from elsewhere passes through the cache.

Layers come in the order in which their bytes lie in its files. A layer's bytes are fetched once, by
the first task that asks for them, and dropped when all tasks of the run that may read them are
done, of whatever target; so a disk has to hold a few layers of it, besides what is built.

A *group* is what must be here together: the stored tensors that some task reads, and those that
other tasks read with them. The budget is reserved for a group as a whole, by the first of its tasks
that begins, before that task holds anything that another one might wait for: no lock, no memory.

So no build waits for ever. Say that all threads wait for room. Whoever has room is a group with
tasks that are not done, else it is dropped. Each of these needs only tasks of the same group, so
one of them is ready or running. It is not running: all threads wait, and who is of that group does
not. So it is ready, and the last thread to wait would have been given it: the dispatcher hands out
what is ready before it begins anything new. What is fetched anew within a task, since it was lost,
reserves at once and never waits; and when a task fails, so that no more are handed out, nobody
waits any longer. A task that needs what another layer became, as those do that run a model, is of
no group: it waits alone, for what it reads itself, needs nothing more once it runs, and so may
fetch a layer again. A group that is dropped late, since bytes before its own in a file are still to
be hashed, waits only for groups that have room already; for others it does not, where anybody
waits.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from cache.blobs import Part
from cache.digest import digest_record
from cache.errors import BlobLost, CacheError, WrongLength
from cache.fetched import FetchedBlobs
from cache.files import own
from cache.store import Store
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import BuildError, CheckpointError, Stopped
from tasks.execution.resources import DiskBudget
from tasks.execution.whole_files import WholeFile
from tasks.planning.node import Node
from tasks.planning.plan import Plan
from tasks.stages.stage import Keep

CONNECTIONS = 4  # of one task
SMALL = 1 / 1000  # of a file: a tensor that may be fetched to be hashed, where no task wants it
KIND = "whole-files"  # of memos: digests of tensors, by the sha256 of the file that they are of


class Copy(NamedTuple):
    """The copy of a stored tensor.

    Attributes:
        checkpoint: the checkpoint.
        key: the tensor's.
        name: the copy's in the store.
    """

    checkpoint: Checkpoint
    key: str
    name: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.checkpoint.stored[self.key].nbytes

    @property
    def place(self) -> tuple[str, str, int]:
        """Where it lies: copies come in this order."""
        stored = self.checkpoint.stored[self.key]
        return self.checkpoint.source.location, stored.file, stored.offset


@dataclass(eq=False)
class _Group:
    """Copies that are wanted together.

    Attributes:
        copies: by their names.
        tasks: names of those that may read them, and are not done.
        users: names of later ones that read them again, and have begun.
        held: names of the copies that room is reserved for.
        left: names of the copies that this run is to drop.
        entering: held by the task that reserves it.
    """

    copies: dict[str, Copy] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    entering: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies.values())

    @property
    def is_used(self) -> bool:
        return bool(self.tasks or self.users)


class Streaming:
    """What a run fetches, holds and drops. Safe in threads.

    Attributes:
        store: the cache.
        budget: of the bytes that lie here at once.
        drops: whether they go when they were used.
    """

    def __init__(self, store: Store, budget: DiskBudget, *, drops: bool) -> None:
        """Begin with nothing.

        Args:
            store: the cache.
            budget: of the bytes that lie here at once.
            drops: whether they go when they were used.
        """
        self.store = store
        self.budget = budget
        self.drops = drops
        self._blobs = FetchedBlobs(store.blobs)
        self._groups: dict[str, _Group] = {}  # by the names of copies
        self._by_task: dict[str, _Group] = {}
        self._later: dict[str, dict[str, Copy]] = {}  # what tasks read that are of no group
        self._done: list[_Group] = []  # and not dropped yet
        self._digests: dict[str, str] = {}  # of copies, by name
        self._names: dict[tuple[int, str], Copy] = {}
        self._files: dict[tuple[str, str], WholeFile] = {}
        self._adopted: list[Copy] = []
        self._unread: set[str] = set()  # names of copies that no task fetches
        self._locks: list[int] = []
        self._changed = threading.Condition()
        self._todo = self._busy = self._over = False
        self._thread: threading.Thread | None = None

    def arrange(self, nodes: Iterable[tuple[Plan, Node]]) -> list[Node]:
        """Take note of the tasks of a run that may read what is fetched.

        Returns:
            Them in the order in which they are to begin.
        """
        known: dict[Node, dict[str, Copy]] = {}
        reads = {node: self._reads(plan, node, known) for plan, node in nodes}
        reads = {node: copies for node, copies in reads.items() if copies}
        group_of = _joined({n: copies for n, copies in reads.items() if not _follows_a_layer(n)})
        for node, group in group_of.items():
            group.tasks.add(node.name)
            self._by_task[node.name] = group
            self._groups |= dict.fromkeys(group.copies, group)
        for node in reads.keys() - group_of.keys():
            self._later[node.name] = reads[node]
            for name, copy in reads[node].items():
                self._groups.setdefault(name, _Group({name: copy}))
        first = {id(g): min(copy.place for copy in g.copies.values()) for g in group_of.values()}
        return sorted(group_of, key=lambda node: first[id(group_of[node])])

    @property
    def _copies(self) -> list[Copy]:
        """All copies that tasks may read."""
        return [group.copies[name] for name, group in self._groups.items()]

    @property
    def nbytes(self) -> int:
        """The size of all that tasks may read."""
        return sum(copy.nbytes for copy in self._copies)

    @property
    def largest(self) -> int:
        """The size of the largest group."""
        return max((group.nbytes for group in self._groups.values()), default=0)

    def begin(self, recorded: Collection[str]) -> int:
        """Begin the run, and return how many bytes are here that a killed one had fetched.

        Args:
            recorded: names of tasks whose results are on record: what only they read is dropped.
        """
        alone = {where for where in {c.place[0] for c in self._copies} if self._is_alone(where)}
        adopted = 0
        for copy in self._copies:
            self._watch(copy)
            size = self._blobs.size(copy.name) if copy.place[0] in alone else None
            group = self._groups[copy.name]
            if size is None:
                continue
            if self.drops and group.tasks and group.tasks <= set(recorded):
                self._blobs.drop(copy.name, self._digests.get(copy.name))
                continue
            self._adopted.append(copy)
            adopted += size
        return adopted

    def set_limit(self, limit: int) -> None:
        """Set the budget's limit, and take over what a killed run fetched, as far as it has room.

        Beside it there must be room for any group: else one might wait for what is taken over.
        """
        self.budget.limit = limit
        for copy in sorted(self._adopted, key=lambda copy: copy.place):
            group = self._groups[copy.name]
            if self.drops and self.budget.reserved + copy.nbytes + self.largest > limit:
                self._blobs.drop(copy.name, self._digests.get(copy.name))
                continue
            group.left.add(copy.name)
            group.held.add(copy.name)
            self.budget.reserve_at_once(copy.nbytes)

    def _reads(self, plan: Plan, node: Node, known: dict[Node, dict[str, Copy]]) -> dict[str, Copy]:
        """Return the copies that a node may read, itself or by what it needs, by name.

        What a stage made that is always kept is read where that is.
        """
        if node not in known:
            if node.is_leaf:
                fetched = [key for key in node.outputs() if key in plan.checkpoint.fetched]
                copies = [self._copy(plan.checkpoint, key) for key in fetched]
                known[node] = {copy.name: copy for copy in copies}
            else:
                through = [n for n in node.needs if n.is_leaf or n.stage.keep is not Keep.ALWAYS]
                read = [self._reads(plan, need, known) for need in through]
                known[node] = {name: copy for each in read for name, copy in each.items()}
        return known[node]

    def enter(self, task: str) -> None:
        """Wait until there is room for all that a task reads.

        Raises:
            Stopped: there will be none.
        """
        if not self.drops:
            return
        if later := self._later.get(task):
            self._enter_later(task, later)
            return
        group = self._by_task.get(task)
        if group is None:
            return
        with group.entering:
            missing = group.copies.keys() - group.held
            if missing:
                need = sum(group.copies[name].nbytes for name in missing)
                self.budget.reserve(need, self._wake)
                group.held |= missing

    def _enter_later(self, task: str, copies: Mapping[str, Copy]) -> None:
        with self._changed:
            groups = {name: self._groups[name] for name in copies}
            missing = [name for name, group in groups.items() if name not in group.held]
            for group in groups.values():
                group.users.add(task)
            for name in missing:
                groups[name].held.add(name)
        self.budget.reserve(sum(copies[name].nbytes for name in missing), self._wake)

    def finished(self, task: str) -> None:
        """Take note that a task is done, or will not be: what nobody else reads is dropped."""
        first = self._by_task.pop(task, None)
        groups = [first] if first else [self._groups[n] for n in self._later.pop(task, ())]
        if not groups:
            return
        with self._changed:
            for group in groups:
                group.tasks.discard(task)
                group.users.discard(task)
                if self.drops and not group.is_used and group not in self._done:
                    self._done.append(group)
        self._wake()

    def stop(self) -> None:
        """Let no task wait any more, since no other one begins."""
        self.budget.stop(Stopped("it waited for room on the disk when another task failed"))

    def end(self) -> None:
        """Drop what is left, when all tasks have ended."""
        if self._thread:
            with self._changed:
                self._over = True
                self._changed.notify_all()
            self._thread.join()
        if self.drops:  # what is not done yet, since something failed, the next run goes on with
            groups = {id(group): group for group in self._groups.values() if not group.is_used}
            self._done = list(groups.values())
            self._drop(always=True)
        for descriptor in self._locks:
            os.close(descriptor)

    def note(self, checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
        """Take note of stored tensors' digests, by key, that are known without fetching them."""
        with self._changed:
            for key, digest in digests.items():
                self._digests.setdefault(self._copy(checkpoint, key).name, digest)

    def fetch(
        self, checkpoint: Checkpoint, keys: Sequence[str], known: Mapping[str, str], *, reread: bool
    ) -> dict[str, str]:
        """Have the cache hold stored tensors, and return their digests.

        Args:
            checkpoint: the checkpoint.
            keys: of the tensors.
            known: digests of other ones, that need not be fetched.
            reread: whether somebody waits for the bytes, that were here before: they stay until
                the run ends, or its tasks that read them are done.

        Raises:
            CheckpointError: they cannot be read.
            NoRoom: the disk is full.
        """
        self.note(checkpoint, known)
        copies = sorted((self._copy(checkpoint, key) for key in keys), key=lambda copy: copy.place)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            digests = list(pool.map(partial(self._fetch, reread=reread), copies))
        self._wake()
        return dict(zip((copy.key for copy in copies), digests, strict=True))

    def _fetch(self, copy: Copy, *, reread: bool) -> str:
        group = self._groups.get(copy.name)
        file = self._files.get(copy.place[:2])
        if group is None and not reread and file and copy.key in file.digests:
            return file.digests[copy.key]  # which is all that is wanted
        if group is None:
            group = _Group({copy.name: copy})
            if reread:
                self._groups[copy.name] = group
        with self._changed:
            group.left.add(copy.name)
            if copy.name not in group.held:  # lost, or of no task that began
                group.held.add(copy.name)
                self.budget.reserve_at_once(copy.nbytes)
        digest = self._copied(copy)
        with self._changed:
            self._digests[copy.name] = digest
            if self.drops and copy.name not in self._groups:
                self._done.append(group)
        self._wake()
        return digest

    def _copied(self, copy: Copy) -> str:
        """Have the cache hold a stored tensor, and return its digest."""
        source, stored = copy.checkpoint.source, copy.checkpoint.stored[copy.key]

        def read(start: int) -> Iterator[bytes]:
            return source.read(stored.file, stored.offset + start, stored.nbytes - start)

        try:
            return self._blobs.fetch(copy.name, stored.nbytes, read)
        except (OSError, WrongLength) as error:
            raise CheckpointError(
                f"{stored.file} of {source.location}: tensor {copy.key} cannot be read: {error}"
            ) from error

    def wrong_files(self, checkpoint: Checkpoint) -> dict[str, WholeFile]:
        """Return the files whose bytes have all passed, and are not those of their sha256."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None or not (self._todo or self._busy))
        files = self._files.values()
        return {f.name: f for f in files if f.checkpoint is checkpoint and f.is_wrong}

    def forget(self, checkpoint: Checkpoint, files: Collection[str]) -> None:
        """Drop what was fetched of files."""
        for copy in self._copies:
            if copy.checkpoint is checkpoint and copy.place[1] in files:
                self._blobs.drop(copy.name, self._digests.get(copy.name))

    def unverified_files(self, checkpoint: Checkpoint, digests: Mapping[str, str]) -> list[str]:
        """Return the files of which a sha256 is known, but not that all tensors are of that file.

        Args:
            checkpoint: the checkpoint.
            digests: of all its stored tensors, by key.
        """
        known = {
            name: sha256 for name in checkpoint.stamps if (sha256 := self._sha256(checkpoint, name))
        }
        get = self.store.memos.get
        return [
            name
            for name, sha256 in known.items()
            if get(KIND, _question(checkpoint, name, sha256), str)
            != _table(checkpoint, name, digests)
        ]

    @staticmethod
    def _sha256(checkpoint: Checkpoint, file: str) -> str | None:
        """Return what a file's sha256 is said to be, if it is fetched."""
        return None if checkpoint.source.path(file) else checkpoint.sha256(file)

    def _copy(self, checkpoint: Checkpoint, key: str) -> Copy:
        at = (id(checkpoint), key)
        if at not in self._names:
            name = digest_record([checkpoint.fingerprint([key]), checkpoint.stored[key].nbytes])
            self._names[at] = Copy(checkpoint, key, name)
        return self._names[at]

    def _watch(self, copy: Copy) -> None:
        """Have the file of a copy hashed as it passes, if its sha256 is known."""
        checkpoint, (location, file, _) = copy.checkpoint, copy.place
        if (location, file) not in self._files and (sha256 := self._sha256(checkpoint, file)):
            self._files[location, file] = WholeFile(checkpoint, file, sha256)

    # What the thread does that hashes and drops.

    def _wake(self) -> None:
        with self._changed:
            self._todo = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="passing", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._todo or self._over)
                if not self._todo:
                    return
                self._todo, self._busy = False, True
            try:
                self._hash()
                self._drop()
            except (CacheError, OSError) as error:  # nobody is to wait for what does not come
                self.budget.stop(error)

    def _hash(self) -> None:
        for file in self._files.values():
            locate = partial(self._parts, file.checkpoint)
            if not file.is_over:
                try:
                    file.advance(self.store.blobs, locate, partial(self._is_read, file.checkpoint))
                except (BuildError, CacheError, OSError):  # no build fails for what it does not use
                    file.incomplete = True
                if file.found == file.sha256:
                    self._remember(file)

    def _remember(self, file: WholeFile) -> None:
        """Remember that these tensors are of the file of its sha256."""
        checkpoint, name = file.checkpoint, file.name
        digests = dict(file.digests)
        for key, stored in checkpoint.stored.items():
            if stored.file == name and stored.nbytes and key not in digests:
                digests[key] = self._digests[self._copy(checkpoint, key).name]
        question = _question(checkpoint, name, file.sha256)
        self.store.memos.put(KIND, question, _table(checkpoint, name, digests))

    def _is_read(self, checkpoint: Checkpoint, key: str) -> bool:
        name = self._copy(checkpoint, key).name
        return name in self._groups and name not in self._unread

    def _drop(self, *, always: bool = False) -> None:
        """Drop the copies that nobody reads any more; ``always``: also before they are hashed."""
        with self._changed:
            done = list(self._done)
        for group in done:
            for copy in [c for n, c in group.copies.items() if n in group.left | group.held]:
                with self._changed:  # lest a later task begins to read it just now
                    # What is not left is on record, and was not fetched.
                    fetched = copy.name in group.left
                    if not group.is_used and (not fetched or always or self._may_go(copy)):
                        self._drop_copy(group, copy, fetched=fetched)
            with self._changed:
                if group.is_used or not group.left:
                    self._done.remove(group)

    def _drop_copy(self, group: _Group, copy: Copy, *, fetched: bool) -> None:
        if fetched:
            self._blobs.drop(copy.name, self._digests.get(copy.name))
            group.left.discard(copy.name)
        if copy.name in group.held:
            group.held.discard(copy.name)
            self.budget.give_back(copy.nbytes)

    def _may_go(self, copy: Copy) -> bool:
        """Tell whether the bytes of a copy are not to be hashed any more."""
        file = self._files.get(copy.place[:2])
        if file is None or file.passed(copy.key) or (awaited := file.awaited) is None:
            return True
        group = self._groups.get(self._copy(copy.checkpoint, awaited).name)
        if group is None:  # it is hashed before long
            return False
        if self._parts(copy.checkpoint, awaited) is not None:
            return False
        missing = not group.is_used or (not group.held and self.budget.is_short)
        if missing and copy.checkpoint.stored[awaited].nbytes <= SMALL * file.size:
            with self._changed:  # a norm that is on record, say: it is read for the hash alone
                self._unread.add(self._copy(copy.checkpoint, awaited).name)
                self._todo = True
            return False
        file.incomplete = missing
        return missing

    def _parts(self, checkpoint: Checkpoint, key: str) -> list[Part] | None:
        """Return where a stored tensor's bytes lie, or None if they are not here."""
        copy = self._copy(checkpoint, key)
        digest = self._digests.get(copy.name)
        if digest and self._blobs.size(copy.name) == copy.nbytes:
            return [self._blobs.part(copy.name, copy.nbytes)]
        try:  # it lies in its place in a weight file, or as another tensor of the same bytes
            return self.store.blobs.locate(digest, copy.nbytes) if digest else None
        except BlobLost:
            return None

    # Whether another run is fetching from the same place, into the same cache.

    def _is_alone(self, location: str) -> bool:
        """Tell whether no other run fetches from there; what was left there is then this one's."""
        path = self.store.root / f"fetching-{digest_record(location)}"
        descriptor = own.open_own(path, os.O_RDWR | os.O_CREAT)
        self._locks.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        return True


def _question(checkpoint: Checkpoint, file: str, sha256: str) -> list[Any]:
    return [checkpoint.source.location, file, *checkpoint.stamps[file], sha256]


def _table(checkpoint: Checkpoint, file: str, digests: Mapping[str, str]) -> str:
    """Return the digest of a file's tensors' digests."""
    stored = checkpoint.stored.items()
    return digest_record([[k, digests[k]] for k, s in stored if s.file == file and s.nbytes])


def _follows_a_layer(node: Node) -> bool:
    """Tell whether a node needs what its own stage, or one that it reads, makes of another layer.

    So do those that run a model, segment by segment.
    """
    return any(need.stage is node.stage or _follows_a_layer(need) for need in node.needs)


def _joined(reads: Mapping[Node, dict[str, Copy]]) -> dict[Node, _Group]:
    """Return the group of each node, given what each reads: what one of them does is of one."""
    group_of: dict[str, _Group] = {}  # by the names of copies
    for copies in reads.values():
        groups = {id(group): group for name in copies if (group := group_of.get(name))}
        joined = max(groups.values(), key=lambda group: len(group.copies), default=_Group())
        for group in groups.values():
            joined.copies |= group.copies
        joined.copies |= copies
        group_of |= dict.fromkeys(joined.copies, joined)
    return {node: group_of[next(iter(copies))] for node, copies in reads.items()}

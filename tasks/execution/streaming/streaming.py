"""streaming: a checkpoint whose bytes come from elsewhere passes through the cache.

Layers come in the order in which their bytes lie in its files. A layer's bytes are fetched once, by
the first task that asks for them, and dropped when all tasks of the run that may read them are
done, of whatever target; so a disk has to hold a few layers of it, besides what is built.

A *group* is what must be here together: the stored tensors that some task reads, and those that
other tasks read with them. The budget is reserved for a group as a whole, by the first of its tasks
that begins, before that task holds anything that another one might wait for: no lock, no memory.

Tasks that run a model need what its layer before became. Then the groups have room in the order in
which they are run. A group that some task needs later ones for, as that of an embedding that is the
head, too, stays until then: room for it is counted besides.

So no build waits for ever. Say that all threads wait. Of the groups that are not done, but for
those that stay, take the first one that has room. All before it are done, so its tasks need only
what is done, or each other: one of them is ready or running. It is not running: all threads wait,
and who is of that group does not. So it is ready, and the last thread to wait would have been given
it: the dispatcher hands out what is ready before it begins anything new, and of that the first
group's first. What is fetched anew within a task, since it was lost, reserves at once and never
waits; and when a task fails, so that no more are handed out, nobody waits any longer.

A group that is dropped late, since bytes before its own in a file are still to be hashed, waits
only for groups that have room already; for others it does not, where anybody waits.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cache.errors import CacheError
from cache.store import Store
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import Stopped
from tasks.execution.resources import DiskBudget
from tasks.execution.streaming import read_groups
from tasks.execution.streaming.copies import Copies, Copy
from tasks.execution.streaming.read_groups import Group
from tasks.execution.streaming.rounds import Rounds
from tasks.execution.streaming.whole_files import WholeFile, WholeFiles
from tasks.planning.node import Node
from tasks.planning.plan import Plan

CONNECTIONS = 4  # of one task
NEGLIGIBLE = (
    1 / 1000
)  # of a file: a tensor that may be fetched to be hashed, where no task wants it


class Streaming:
    """What a run fetches, holds and drops. Safe in threads.

    Attributes:
        budget: of the bytes that lie here at once.
        drops: whether they go when they were used.
        order: the tasks that may read what is fetched, as they are to begin.
    """

    def __init__(self, store: Store, budget: DiskBudget, *, drops: bool) -> None:
        self.budget = budget
        self.drops = drops
        self.order: list[Node] = []
        self._copies = Copies(store)
        self._files = WholeFiles(store, self._copies)
        self._groups: dict[str, Group] = {}  # by the names of copies
        self._by_task: dict[str, Group] = {}
        self._done: list[Group] = []  # and not dropped yet
        self._adopted: list[Copy] = []
        self._unread: set[str] = set()  # names of copies that no task fetches
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._stopped = False
        self._rounds = Rounds(self._hash_and_drop, "passing")

    def arrange(self, nodes: Iterable[tuple[Plan, Node]]) -> None:
        """Take note of the tasks of a run that may read what is fetched."""
        group_of = read_groups.groups(read_groups.reads(nodes, self._copies))
        for node, group in group_of.items():
            group.tasks.add(node.name)
            self._by_task[node.name] = group
            self._groups |= dict.fromkeys(group.copies, group)
        self.order = [*group_of]

    @property
    def _all_copies(self) -> list[Copy]:
        """All copies that tasks may read."""
        return [group.copies[name] for name, group in self._groups.items()]

    @property
    def nbytes(self) -> int:
        """The size of all that tasks may read."""
        return sum(copy.nbytes for copy in self._all_copies)

    @property
    def largest(self) -> int:
        """The size of what must be here together: the largest group, and those that stay."""
        groups = {*self._groups.values()}
        others = [group.nbytes for group in groups if not group.stays]
        return max(others, default=0) + sum(group.nbytes for group in groups if group.stays)

    def begin(self, recorded: Collection[str], *, parts: bool = False) -> int:
        """Begin the run, and return how many bytes are here that a killed one had fetched.

        Args:
            recorded: names of tasks whose results are on record: what only they read is dropped.
            parts: whether other machines read other parts of the files: none is read for its hash
                alone.
        """
        locations = {copy.place[0] for copy in self._all_copies}
        alone = {location for location in locations if self._copies.is_alone(location)}
        adopted = 0
        for copy in self._all_copies:
            if not parts:
                self._files.watch(copy)
            size = self._copies.size(copy) if copy.place[0] in alone else None
            group = self._groups[copy.name]
            if size is None:
                continue
            if self.drops and group.tasks and group.tasks <= set(recorded):
                self._copies.drop(copy)
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
                self._copies.drop(copy)
                continue
            group.left.add(copy.name)
            group.held.add(copy.name)
            self.budget.reserve_at_once(copy.nbytes)

    def enter(self, task: str) -> None:
        """Wait until there is room for all that a task reads.

        Raises:
            Stopped: there will be none.
        """
        if not self.drops:
            return
        group = self._by_task.get(task)
        if group is None:
            return
        with group.entering:
            missing = group.copies.keys() - group.held
            if missing:
                need = sum(group.copies[name].nbytes for name in missing)
                with self._turn:
                    self._turn.wait_for(
                        lambda: self._stopped or all(other.has_room for other in group.before)
                    )
                self.budget.reserve(need, self._rounds.call)
                with self._turn:
                    group.held |= missing
                    self._turn.notify_all()

    def finished(self, task: str) -> None:
        """Take note that a task is done, or will not be: what nobody else reads is dropped."""
        group = self._by_task.pop(task, None)
        if group is None:
            return
        with self._lock:
            group.tasks.discard(task)
            if self.drops and not group.tasks and group not in self._done:
                self._done.append(group)
            self._turn.notify_all()
        self._rounds.call()

    def stop(self) -> None:
        """Let no task wait any more, since no other one begins."""
        self._stop(Stopped("it waited for room on the disk when another task failed"))

    def _stop(self, cause: Exception) -> None:
        self.budget.stop(cause)
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def end(self) -> None:
        """Drop what is left, when all tasks have ended."""
        self._rounds.end()
        if self.drops:  # what is not done yet, since something failed, the next run goes on with
            groups = {id(group): group for group in self._groups.values() if not group.tasks}
            self._done = list(groups.values())
            self._drop(always=True)
        self._copies.close()

    def note(self, checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
        """Take note of stored tensors' digests, by key, that are known without fetching them."""
        self._copies.note(checkpoint, digests)

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
        copies = [self._copies.of(checkpoint, key) for key in keys]
        copies.sort(key=lambda copy: copy.place)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            digests = list(pool.map(partial(self._fetch, reread=reread), copies))
        self._rounds.call()
        return dict(zip((copy.key for copy in copies), digests, strict=True))

    def _fetch(self, copy: Copy, *, reread: bool) -> str:
        group = self._groups.get(copy.name)
        file = self._files.of(copy)
        if group is None and not reread and file and copy.key in file.digests:
            return file.digests[copy.key]  # which is all that is wanted
        if group is None:
            group = Group({copy.name: copy})
            if reread:
                self._groups[copy.name] = group
        with self._lock:
            group.left.add(copy.name)
            if copy.name not in group.held:  # lost, or of no task that began
                group.held.add(copy.name)
                self.budget.reserve_at_once(copy.nbytes)
        digest = self._copies.fetch(copy)
        with self._lock:
            if self.drops and copy.name not in self._groups:
                self._done.append(group)
        self._rounds.call()
        return digest

    def wrong_files(self, checkpoint: Checkpoint) -> dict[str, WholeFile]:
        """Return the files whose bytes have all passed, and are not those of their sha256."""
        self._rounds.settle()
        return self._files.wrong(checkpoint)

    def forget(self, checkpoint: Checkpoint, files: Collection[str]) -> None:
        """Drop what was fetched of files."""
        for copy in self._all_copies:
            if copy.checkpoint is checkpoint and copy.place[1] in files:
                self._copies.drop(copy)

    # What is done in rounds, by a thread of their own.

    def _hash_and_drop(self) -> None:
        try:
            self._files.advance(self._is_read)
            self._drop()
        except (CacheError, OSError) as error:  # nobody is to wait for what does not come
            self._stop(error)

    def _is_read(self, copy: Copy) -> bool:
        return copy.name in self._groups and copy.name not in self._unread

    def _drop(self, *, always: bool = False) -> None:
        """Drop the copies that nobody reads any more; ``always``: also before they are hashed."""
        with self._lock:
            done = list(self._done)
        for group in done:
            for copy in [c for n, c in group.copies.items() if n in group.left | group.held]:
                with self._lock:  # lest a later task begins to read it just now
                    # What is not left is on record, and was not fetched.
                    fetched = copy.name in group.left
                    if not group.tasks and (not fetched or always or self._may_go(copy)):
                        self._drop_copy(group, copy, fetched=fetched)
            with self._lock:
                if group.tasks or not group.left:
                    self._done.remove(group)

    def _drop_copy(self, group: Group, copy: Copy, *, fetched: bool) -> None:
        if fetched:
            self._copies.drop(copy)
            group.left.discard(copy.name)
        if copy.name in group.held:
            group.held.discard(copy.name)
            self.budget.give_back(copy.nbytes)

    def _may_go(self, copy: Copy) -> bool:
        """Tell whether the bytes of a copy are not to be hashed any more."""
        file = self._files.of(copy)
        if file is None or file.passed(copy.key) or (awaited := file.awaited) is None:
            return True
        following = self._copies.of(copy.checkpoint, awaited)
        group = self._groups.get(following.name)
        if group is None:  # it is hashed before long
            return False
        if self._copies.parts(following) is not None:
            return False
        missing = not group.tasks or (not group.held and self.budget.is_short)
        if missing and following.nbytes <= NEGLIGIBLE * file.size:
            self._unread.add(following.name)  # a norm on record, say: read for the hash alone
            self._rounds.call()
            return False
        file.incomplete = missing
        return missing

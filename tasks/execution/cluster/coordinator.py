"""coordinator: the crew of a build on a Dask cluster: hands units out, and takes over the results.

Dask has a unit made again whose worker is gone. What is added here: only workers that make the same
bits get one; a worker that is silent is given up before long; one that cannot make a unit, or hands
back what it should not, does not get that unit again. A unit that three of them failed at is made
here, as is everything where the cluster is lost, unless ``cluster_lost`` says to stop then.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cache.blobs import Place
from cache.digest import digest_record
from cache.errors import one_line
from cache.records.manifests import Manifest
from tasks.checkpoints.source import is_pinned
from tasks.core.errors import BuildError, Stopped
from tasks.core.program import COMMAND
from tasks.core.text import plural, some
from tasks.execution.cluster import machine
from tasks.execution.cluster.unit import Cannot, Made, Request, Unit, Unlike, manifests, units
from tasks.execution.crew import Delivered, Recorder
from tasks.planning.node import Node
from tasks.planning.plan import Plan

if TYPE_CHECKING:
    from distributed import Future

    from tasks.execution.cluster.scheduler import Connection, Member

ATTEMPTS = 3  # of a unit, by workers that fail at it; killed ones are Dask's to count
SURVEY_SECONDS = 2.0
EMPTY_SECONDS = 30.0  # without any worker that may make a unit
MOST_NAMES = 5  # of workers, in one message


class _Lost(Exception):
    """The cluster is lost, or has nobody left for a unit."""


class _Failed(Exception):
    """A worker cannot make a unit, or what it made is of no use."""

    def __init__(self, worker: str, machine: str, cause: str, *, is_hopeless: bool = False) -> None:
        super().__init__(f"{machine} ({worker}): {cause}" if worker else f"{machine}: {cause}")
        self.worker = worker
        self.is_hopeless = is_hopeless  # so many workers ended at it that no other is asked


@dataclass
class _Asked:
    """A unit that was asked for.

    Attributes:
        lock: held by who has it made.
        results: what came of it, by node, until each was taken.
        is_ours: whether it is made here.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    results: dict[Node, Delivered] = field(default_factory=dict)
    is_ours: bool = False


class Cluster:
    """A crew of Dask's workers. Safe in threads; connected once something must be made.

    Args:
        address: of the scheduler, or a file that names it.
        request: returns what a worker must know of a target.
        stops: whether the build ends where the cluster is lost; else it goes on alone.
    """

    def __init__(self, address: str, request: Callable[[Plan], Request], *, stops: bool) -> None:
        self.address = address
        self._request = request
        self._stops = stops
        self._facts = machine.facts()
        self._lock = threading.Lock()
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._lost = ""
        self._closed = self._is_stopped = False
        self._members: list[Member] = []
        self._scheduler = ""  # its id: another one knows of nothing
        self._empty: set[str] = set()  # resources that nobody offered for long
        self._units: dict[str, dict[Node, Unit]] = {}  # by target
        self._requests: dict[str, tuple[bytes, Any]] = {}  # the same
        self._kinds: set[machine.Kind] = set()
        self._asked: dict[Unit, _Asked] = {}
        self._futures: list[Future] = []
        self._known: set[tuple[str, str]] = set()  # who was asked why it lacks which resource
        self._said: set[str] = set()
        self._failures: dict[frozenset[str], int] = {}  # units made here, by those who could not

    # The crew's contract

    def takes(self, plan: Plan, node: Node) -> bool:
        """Tell whether a node would be handed over."""
        if node.is_leaf and not is_pinned(plan.checkpoint.source):
            return False
        unit = self._unit(plan, node)
        return not self._lost and unit is not None and not self._asked_of(unit).is_ours

    def delivered(self, node: Node) -> Delivered | None:
        """Return a node's result, once, if the unit of another one brought it."""
        unit = self._units.get(node.target, {}).get(node)
        return self._asked_of(unit).results.pop(node, None) if unit else None

    def make(self, recorder: Recorder, plan: Plan, node: Node) -> Delivered | None:
        """Have the unit of a node made, once, and put on record here; None: it is to be made here.

        Raises:
            BuildError: the cluster is lost, and nothing is to be made without it.
        """
        unit = self._unit(plan, node)
        if unit is None:
            return None
        asked = self._asked_of(unit)
        with asked.lock:
            if node not in asked.results and not asked.is_ours:
                asked.results |= self._made(recorder, unit) or {}
                asked.is_ours = True  # from now on: what is lost of it is made here
            return asked.results.pop(node, None)

    def close(self) -> None:
        """Let go of the cluster."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if more := sum(self._failures.values()) - len(self._failures):
            self._failures.clear()
            self._warn(f"{more} more of the cluster's layers were made here, for the same causes")
        if self._connection:
            self._connection.close()

    # One unit

    def _unit(self, plan: Plan, node: Node) -> Unit | None:
        target = plan.target.name
        with self._lock:
            if target not in self._units:
                self._units[target] = units(plan)
            return self._units[target].get(node)

    def _asked_of(self, unit: Unit) -> _Asked:
        with self._lock:
            return self._asked.setdefault(unit, _Asked())

    def _made(self, recorder: Recorder, unit: Unit) -> dict[Node, Delivered] | None:
        """Return what workers made of a unit, put on record; None: nobody did."""
        excluded: dict[str, str] = {}  # causes, by worker
        known = _known(recorder, unit)
        try:
            for attempt in range(ATTEMPTS):
                try:
                    made = self._asked_for(unit, known, excluded)
                    return self._taken(recorder, unit, known, made)
                except _Failed as failed:
                    excluded[failed.worker or f"attempt {attempt}"] = str(failed)
                    if failed.is_hopeless:
                        break
        except _Lost as lost:
            if self._lost or not excluded:  # else nobody is left but those who failed
                if self._stops:
                    raise self._stopped(lost) from lost
                self._warn(f"{lost}; the build goes on alone")
                return None
        self._note_failure(unit, excluded)
        return None

    def _note_failure(self, unit: Unit, causes: Mapping[str, str]) -> None:
        """Say of a unit why it is made here; of others that the same workers fail at, how many."""
        workers = frozenset(causes)
        with self._lock:
            self._failures[workers] = self._failures.get(workers, 0) + 1
            is_first = self._failures[workers] == 1
        if is_first:
            self._warn(f"{self._name(unit)} is made here: {'; '.join(causes.values())}")

    def _stopped(self, lost: _Lost) -> BuildError:
        """Return what ends the build; of all who wait, one says why."""
        with self._lock:
            is_first, self._is_stopped = not self._is_stopped, True
        kept = f"Layers that are done are kept; run {COMMAND} again when it is there."
        message = f'{lost}, and cluster_lost = "stop". {kept}'
        return BuildError(message) if is_first else Stopped(message)

    @staticmethod
    def _name(unit: Unit) -> str:
        return f"{unit.plan.target.name} {unit.nodes[-1].layer}"

    def _asked_for(
        self, unit: Unit, known: Mapping[Node, Manifest], excluded: dict[str, str]
    ) -> Made:
        """Have a unit made by a worker.

        Raises:
            _Failed: a worker cannot.
            _Lost: no worker is there that may.
        """
        from tasks.execution.cluster.scheduler import Gone

        connection = self._connected()
        resource = machine.resource(self._facts, self._kind_of(unit.plan))
        arguments, settings = self._arguments(unit)
        number = 0
        while True:
            able = self._able(resource, excluded)
            # Whoever asks for the same of the same workers has one task with this.
            of = digest_record([_identity(unit, known), settings])
            key = " ".join(["mlx-make", unit.key, of, *sorted(excluded), *["again"] * number])
            try:
                future = connection.submit(
                    key, arguments, resource, able if excluded else None, unit.nbytes
                )
            except Gone:
                self._await_news()
                continue
            try:
                made = self._awaited(future, resource, excluded)
            except (CancelledError, TimeoutError):  # by a scheduler that began anew, for one
                self._await_news()
                number += 1
                continue
            except _Lost:
                raise
            except Exception as error:  # of any kind: what a worker raised
                cause = one_line(f"{type(error).__name__}: {error}")
                ended = type(error).__name__ == "KilledWorker"
                raise _Failed("", "a worker", cause, is_hopeless=ended) from error
            if isinstance(made, Cannot):
                raise _Failed(*made)
            with self._lock:  # until this build ends: another one may ask for the same
                self._futures.append(future)
            return made

    def _arguments(self, unit: Unit) -> tuple[tuple[bytes, str, list[tuple[str, str]]], Any]:
        """Return what a worker is told, and where its results go: what is kept, and the remote."""
        target = unit.plan.target.name
        with self._lock:
            if target not in self._requests:
                request = self._request(unit.plan)
                goes_to = request.settings.keep, request.settings.remote
                self._requests[target] = request.to_bytes(), goes_to
            request_bytes, settings = self._requests[target]
        return (request_bytes, unit.key, unit.layers), settings

    def _kind_of(self, plan: Plan) -> machine.Kind:
        kind = machine.Kind.of(plan)
        with self._lock:
            self._kinds.add(kind)
        return kind

    def _awaited(self, future: Future, resource: str, excluded: Iterable[str]) -> Made | Cannot:
        """Return what a future becomes.

        Raises:
            _Lost: there is nobody to make it.
        """
        done, scheduler = threading.Event(), self._scheduler
        future.add_done_callback(lambda _: done.set())
        while not done.wait(SURVEY_SECONDS):
            self._able(resource, excluded)
            if scheduler != self._scheduler:
                raise CancelledError
        self._check_open()
        made: Made | Cannot = future.result(timeout=EMPTY_SECONDS)
        return made

    def _taken(
        self, recorder: Recorder, unit: Unit, known: Mapping[Node, Manifest], made: Made
    ) -> dict[Node, Delivered]:
        """Put on record here what a worker made, once its bytes are here.

        Raises:
            _Failed: it is not what was asked for, or the bytes are not to be had.
        """
        from tasks.execution.cluster.scheduler import Gone

        connection = self._connected()
        now = time.time()
        try:
            found = manifests(unit, made, known, machine.secret())
            for node in unit.nodes:
                self._bring(connection, recorder, unit.plan, node, found[node], made)
                if node not in known:  # what was read here is on record, by what this machine read
                    recorder.take(unit.plan, node, found[node])
        except (Unlike, Gone) as error:
            raise _Failed(made.worker, made.machine, str(error)) from error
        return {
            node: Delivered(
                found[node],
                result.outcome,
                result.trace._replace(start=result.trace.start + now),
            )
            for node, result in zip(unit.nodes, made.results, strict=True)
        }

    def _bring(
        self,
        connection: Connection,
        recorder: Recorder,
        plan: Plan,
        node: Node,
        manifest: Manifest,
        made: Made,
    ) -> None:
        """Have the bytes here of what is kept of a node: of the remote store, or the worker.

        Raises:
            Gone: the worker has them no more.
            Unlike: they are others.
        """
        if not recorder.shared(plan, node):
            return
        blobs, sharing = recorder.store.blobs, recorder.store.sharing
        if made.shared and sharing:
            draft = recorder.begin_draft(plan) if node in plan.packed else None
            tensors = manifest.tensors
            places: dict[str, Place] = (
                {tensor.digest: draft.place(name) for name, tensor in tensors.items()}
                if draft else {}
            )  # fmt: skip
            key = manifest.action.key
            sharing.fetch_all([(key, tensor) for tensor in tensors.values()], places)
            if draft:
                draft.note_written(tensors.items())
        missing = {n: t for n, t in manifest.tensors.items() if not blobs.has(t.digest, t.nbytes)}
        if not missing:
            return
        context = recorder.context(plan, node, {})
        for name, tensor in missing.items():
            with context.writer(name, tensor.nbytes) as writer:
                for piece in connection.pieces(made.worker, tensor):
                    writer.write(piece)
            if writer.digest != tensor.digest:
                raise Unlike(f"{name} has other bytes than its digest says")
        if sharing:  # also what a worker says is there: its remote may be another of that name
            sharing.push(manifest, recorder.shared(plan, node))

    # The cluster

    def _connected(self) -> Connection:
        """Return the connection, made if there was none.

        Raises:
            _Lost: nobody answers.
        """
        from tasks.execution.cluster.scheduler import Connection, Gone

        with self._changed:
            if self._lost:
                raise _Lost(self._lost)
            if self._connection is None:
                try:
                    self._connection = Connection.open(self.address)
                    self._scheduler, self._members = self._connection.members()
                except Gone as gone:
                    self._lost = f"cluster {self.address} does not answer: {gone}"
                    raise _Lost(self._lost) from gone
                threading.Thread(target=self._watch, name="cluster", daemon=True).start()
            return self._connection

    def _await_news(self) -> None:
        """Wait until somebody has looked whether the cluster is there.

        Raises:
            _Lost: it is not.
        """
        with self._changed:
            self._changed.wait(SURVEY_SECONDS)
        self._check_open()

    def _check_open(self) -> None:
        with self._changed:
            if self._lost or self._closed:
                raise _Lost(self._lost or "the build ends")

    def _able(self, resource: str, excluded: Iterable[str]) -> list[str]:
        """Return the workers that may make a unit; wait a little if there is none.

        Raises:
            _Lost: there is none for long.
        """
        deadline = None
        while True:
            self._check_open()
            with self._changed:
                able = [m.address for m in self._members if resource in m.resources]
                able = [address for address in able if address not in excluded]
                if able:
                    self._empty.discard(resource)
                    return able
                now = time.monotonic()
                deadline = deadline or now + (SURVEY_SECONDS if excluded else EMPTY_SECONDS)
                refused = self._known >= {(m.address, resource) for m in self._members}
                if now >= deadline or (self._members and refused) or resource in self._empty:
                    if not excluded:
                        self._empty.add(resource)
                    raise _Lost(
                        f"cluster {self.address} has no worker that can make its layers, of "
                        f"{plural(len(self._members), 'worker')}"
                    )
                self._changed.wait(SURVEY_SECONDS)

    def _watch(self) -> None:
        """Look every few seconds who is there, and at who is new; until it is lost or closed."""
        from tasks.execution.cluster.scheduler import Gone

        connection = self._connection
        assert connection is not None
        failures = 0
        while True:
            try:
                if not connection.is_open:
                    raise Gone("it closed the connection")
                scheduler, members = connection.members()
                self._look_at(connection, members)
                failures = 0
                with self._changed:
                    self._scheduler, self._members = scheduler, members
            except Gone as gone:
                failures += 1
                with self._changed:
                    if not self._closed and (failures > 1 or not connection.is_open):
                        self._lost = f"cluster {self.address} is lost: {gone}"
            with self._changed:
                self._changed.notify_all()
                if self._lost or self._closed:
                    break
                self._changed.wait(SURVEY_SECONDS)
        if self._lost:
            connection.close()

    def _look_at(self, connection: Connection, members: list[Member]) -> None:
        """Say once of workers that are new, all together, why they get no layers."""
        with self._lock:
            wanted = {kind: machine.resource(self._facts, kind) for kind in self._kinds}
        lacks = {
            member.address: found for member in members
            if (found := self._lacks(member, wanted))
        }  # fmt: skip
        asked = [m.address for m in members if m.address in lacks and not m.is_silent]
        answers = connection.describe(asked, machine.PACKAGES) if asked else {}
        refused: dict[bool, list[str]] = {False: [], True: []}  # by whether it gets others
        for member in (each for each in members if each.address in lacks):
            kinds, address = lacks[member.address], member.address
            gets_others = not member.resources.keys().isdisjoint(wanted.values())
            if cause := self._cause(member, answers.get(address), kinds, gets_others=gets_others):
                refused[gets_others].append(cause)
            self._known |= {(address, wanted[kind]) for kind in kinds}
        for gets_others, causes in refused.items():
            if causes:
                count = plural(len(causes), "worker")
                verb = "gets" if len(causes) == 1 else "get"
                what = "no layers of some targets" if gets_others else "no layers"
                listed = some(causes, MOST_NAMES, "; ")
                self._warn(f"cluster {self.address}: {count} {verb} {what}: {listed}")

    def _lacks(self, member: Member, wanted: Mapping[machine.Kind, str]) -> list[machine.Kind]:
        return [
            kind for kind, resource in wanted.items()
            if resource not in member.resources and (member.address, resource) not in self._known
        ]  # fmt: skip

    def _cause(
        self, member: Member, answer: Any, kinds: list[machine.Kind], *, gets_others: bool
    ) -> str:
        """Say who gets no layers of some kinds, and why; "": there is nothing amiss."""
        if member.is_silent:
            return f"{member.address} is silent"
        if isinstance(answer, Exception):
            return f"{member.address} does not answer: {one_line(str(answer))}"
        name, facts, there = answer
        cause = machine.differences(self._facts, facts, kinds)
        if not cause and not gets_others:  # else it is one of a mixed cluster
            backends = [each for each in there if each != machine.ANY_CLASS]
            cause = f"computes on {', '.join(backends)}"
        return f"{name} ({member.address}) {cause}" if cause else ""

    def _warn(self, text: str) -> None:
        with self._lock:
            is_new = text not in self._said
            self._said.add(text)
        if is_new:
            print(f"warning: {one_line(text)}", file=sys.stderr)


def _known(recorder: Recorder, unit: Unit) -> dict[Node, Manifest]:
    """Return what a unit's leaves are known here to be."""
    known = {}
    for node in unit.nodes:
        with suppress(BuildError):  # the checkpoint is not here: a worker may have it
            if node.is_leaf and (manifest := recorder.recall(unit.plan, node)):
                known[node] = manifest
    return known


def _identity(unit: Unit, known: Mapping[Node, Manifest]) -> list[Any] | None:
    """Return which bytes a unit reads, of a checkpoint that no commit pins."""
    source = unit.plan.checkpoint.source
    if source.revision:
        return None
    digests = [[tensor.digest for tensor in known[node].tensors.values()] for node in known]
    return digests or [str(source.location)]

"""workbench: a cluster's worker: plans targets anew, makes units of them, and serves the bytes."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.blobs import Part
from cache.digest import digest
from cache.errors import CacheError, one_line
from cache.files import space
from cache.records.manifests import Manifest
from cache.store import Store
from tasks.checkpoints import adapter
from tasks.core.errors import BuildError
from tasks.core.workspace import Workspace
from tasks.execution.builder import Builder
from tasks.execution.cluster import machine
from tasks.execution.cluster.unit import (
    Cannot,
    Made,
    Remote,
    Request,
    Result,
    Unit,
    files,
    is_same_work,
    signature,
    units,
)
from tasks.execution.filling.draft import Drafts
from tasks.execution.log import Entry, Log, Trace
from tasks.execution.resources import DiskBudget, MemoryBudget
from tasks.execution.streaming.streaming import Streaming
from tasks.planning import locked_sources
from tasks.planning.choice import Choice
from tasks.planning.lockfile import Lock
from tasks.planning.node import Known, Node
from tasks.planning.plan import Plan, Planner

if TYPE_CHECKING:
    from cache.remote.sharing import Sharing

MOST_PLANS = 32  # of targets, which a worker keeps in memory
MAX_PIECE_BYTES = 16 << 20  # of what is read at once


class _Unlike(BuildError):
    """What this machine has of a checkpoint is not what the build is of."""


@dataclass
class _Planned:
    """A target that was planned here.

    Attributes:
        plan: it.
        nodes: by stage and layer.
        builder: makes its units; each has a log and a streaming of its own.
        units: by node.
    """

    plan: Plan
    nodes: dict[tuple[str, str], Node]
    builder: Builder
    units: dict[Node, Unit]


class _Lines(Log):
    """The log of a unit: the last line of each task, and nothing on the disk."""

    def __init__(self) -> None:
        super().__init__(Path(os.devnull))
        self.lines: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        """Take note of a line."""
        self.lines[entry.task] = entry


@dataclass
class Workbench:
    """What one worker process has. Safe in threads.

    Attributes:
        store: its cache, which it may share with other workers of its machine.
        folder: for what is nobody else's.
        address: the worker's.
        memory: the limit on what its units hold at once.
        name: the machine's.
        facts: what must be alike, see ``machine.facts``.
        classes: of device.
    """

    store: Store
    folder: Path
    address: str
    memory: MemoryBudget
    name: str = field(default_factory=machine.name)
    facts: dict[str, str] = field(default_factory=machine.facts)
    classes: list[str] = field(default_factory=machine.classes)
    _plans: dict[str, _Planned] = field(default_factory=dict)
    _planning: threading.Lock = field(default_factory=threading.Lock)
    _sharing: dict[Remote, Sharing] = field(default_factory=dict)

    def make(self, request: bytes, key: str, layers: Sequence[tuple[str, str]]) -> Made | Cannot:
        """Make a unit, or say why that cannot be done here.

        Args:
            request: the target, see ``Request.to_bytes``.
            key: the unit's.
            layers: its nodes, by stage and layer, in order.
        """
        try:
            return self._make(self._planned(request), key, layers)
        except (BuildError, CacheError, OSError) as error:
            if isinstance(error, OSError) and space.is_full(error):
                error = space.no_room(self.store.root)
            return Cannot(self.address, self.name, one_line(str(error)))
        except Exception as error:  # of any kind: another worker may not meet it
            cause = one_line(f"{type(error).__name__}: {error}")
            return Cannot(self.address, self.name, cause)

    def _make(
        self, planned: _Planned, key: str, layers: Sequence[tuple[str, str]]
    ) -> Made | Cannot:
        if unknown := [layer for layer in layers if layer not in planned.nodes]:
            raise _Unlike(f"its plan has no {':'.join(unknown[0])}")
        nodes = [planned.nodes[layer] for layer in layers]
        if not is_same_work(planned.units[nodes[-1]], key):
            raise _Unlike(
                "its plan of it is another: by a package's version, config.json or the text to "
                "calibrate on"
            )
        plan, sharing = planned.plan, planned.builder.store.sharing
        with self._units_own(planned, nodes) as builder, self.store.lock.using():
            assert isinstance(builder.log, _Lines)
            manifests: dict[Node, Manifest] = {}
            for node in nodes:
                builder.streaming.enter(node.name)
                manifests[node] = builder.run(plan, node, "a build on another machine asked")
            wanted = [node for node in nodes if builder.shared(plan, node)]
            keys = [manifests[node].action.key for node in wanted]
            shared = sharing is not None and all(map(sharing.pushed, keys))
            if not shared:
                for node in wanted:
                    self._keep(builder, plan, node, manifests[node])
        now = time.time()
        known: Known = {}
        results = [
            self._result(
                manifests[node], node.outputs(known), builder.log.lines.get(node.name), now
            )
            for node in nodes
        ]
        signed = signature(key, results, machine.secret())
        return Made(self.address, self.name, results, shared, signed)

    def _result(
        self, manifest: Manifest, outputs: Iterable[str], entry: Entry | None, now: float
    ) -> Result:
        if entry is None:
            trace = Trace(self.name, "", 0.0, 0.0, 0, 0)
            return Result.of(manifest, outputs, "reused", trace)
        trace = Trace(
            self.name, threading.current_thread().name, entry.start - now, entry.seconds,
            entry.bytes_read, entry.bytes_written,
        )  # fmt: skip
        return Result.of(manifest, outputs, entry.outcome, trace)

    @contextmanager
    def _units_own(self, planned: _Planned, nodes: Sequence[Node]) -> Iterator[Builder]:
        """Give a builder with a log of its own, and a streaming of what the unit reads."""
        plan, store = planned.plan, planned.builder.store
        streaming = Streaming(store, DiskBudget(), drops=planned.builder.passes(plan))
        streaming.arrange([(plan, node) for node in nodes])
        streaming.begin((), parts=True)
        try:
            yield replace(planned.builder, log=_Lines(), streaming=streaming)
        finally:
            for node in nodes:
                streaming.finished(node.name)
            streaming.end()

    def _keep(self, builder: Builder, plan: Plan, node: Node, manifest: Manifest) -> None:
        """Have the bytes of what a node made lie here, where nothing that passes takes them along.

        What is lost is made again: it is about to be read.
        """
        blobs, inputs = builder.store.blobs, node.as_inputs(manifest.tensors)
        for key, (_, tensor) in inputs.items():
            parts = builder.locate(plan, inputs, key)
            if not builder.passes(plan) or blobs.path(tensor.digest).exists():
                continue
            with blobs.scratch(tensor.nbytes) as folder:
                path = folder / "passed-on"
                with path.open("wb") as file:
                    file.writelines(map(bytes, blobs.chunks(parts)))
                blobs.adopt(path)

    def read(self, digest: str, nbytes: int, offset: int, length: int) -> memoryview | None:
        """Return a piece of a blob, or None if it is not here any more.

        Args:
            digest: the blob's.
            nbytes: the blob's size.
            offset: the first byte's.
            length: of the piece.
        """
        try:
            parts = _cut(self.store.blobs.locate(digest, nbytes), offset, length)
            buffer = memoryview(bytearray(min(length, MAX_PIECE_BYTES)))
            self.store.blobs.read_into(parts, buffer)
        except (CacheError, FileNotFoundError):
            return None
        return buffer

    def _planned(self, request: bytes) -> _Planned:
        key = digest(request)
        with self._planning:
            if key not in self._plans:
                while len(self._plans) >= MOST_PLANS:
                    self._plans.pop(next(iter(self._plans)))
                self._plans[key] = self._plan(pickle.loads(request), self.folder / key)
            return self._plans[key]

    def _plan(self, request: Request, folder: Path) -> _Planned:
        store = replace(self.store, sharing=self._shares(request.settings.remote))
        workspace = Workspace(folder)
        lock = Lock(folder / "models.lock", request.sources, {}, request.adapters)
        plan = _planner(store, lock, request).plan(request.target)
        _check_files(plan, request.files)
        keep = request.settings.keep
        builder = Builder(
            store,
            workspace,
            _Lines(),
            "",
            None if keep is None else frozenset(keep),
            self.memory,
            Drafts(store.blobs, lambda _: False, workspace.drafts),
            Streaming(store, DiskBudget(), drops=False),
        )
        nodes = {
            (node.stage.name, node.layer): node
            for stage in plan.stages.values() for node in stage
        }  # fmt: skip
        return _Planned(plan, nodes, builder, units(plan))

    def _shares(self, remote: Remote | None) -> Sharing | None:
        """Return what this cache has in common with a build's remote store, if it has one."""
        if remote is None:
            return None
        if remote not in self._sharing:
            from cache.remote.remote import Remote as Store_
            from cache.remote.sharing import Sharing

            opened = Store_(
                remote.url,
                warn=lambda text: print(f"warning: {one_line(text)}", file=sys.stderr),
                read_only=remote.read_only,
                secret=machine.secret(),
            )
            self._sharing[remote] = Sharing(
                self.store.actions, self.store.blobs, self.store.memos, opened
            )
        return self._sharing[remote]

    def close(self) -> None:
        """Let go of remote stores."""
        for sharing in self._sharing.values():
            sharing.close()


def _planner(store: Store, lock: Lock, request: Request) -> Planner:
    """Return what plans a target as its coordinator did: of its source as that pinned it."""

    def choose(*_: Any) -> Choice:
        assert request.choice is not None
        return request.choice

    return Planner(
        store.memos,
        partial(locked_sources.open_source, lock, store),
        partial(locked_sources.recall, lock, store),
        request.settings.quality,
        choose,
        lambda target: adapter.read(
            locked_sources.open_adapter(lock, store, target), store, target.adapter_name or ""
        ),
    )


def _check_files(plan: Plan, wanted: Mapping[str, tuple[int, int]]) -> None:
    """Refuse files of this machine that are not those of the build, by size and time.

    Raises:
        _Unlike: they are not.
    """
    source = plan.checkpoint.source
    if not wanted or not source.available:
        return
    here = files(plan)
    if wrong := [name for name in wanted if here.get(name) != wanted[name]]:
        raise _Unlike(
            f"{source.location} has another {wrong[0]} here, by its size or time. Share the "
            "folder, or copy it with its times (rsync -a)."
        )


def _cut(parts: Sequence[Part], offset: int, length: int) -> list[Part]:
    """Return the runs that hold ``length`` bytes from ``offset`` on."""
    cut: list[Part] = []
    for part in parts:
        skip = min(offset, part.length)
        count = min(part.length - skip, length)
        if count:
            cut.append(part._replace(offset=part.offset + skip, length=count))
        offset, length = offset - skip, length - count
    return cut

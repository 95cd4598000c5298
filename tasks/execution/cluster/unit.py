"""unit: what is handed to a worker, and what it hands back."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from msgspec import structs

from cache.digest import digest, digest_record
from cache.errors import CacheError, Refused
from cache.records.manifests import Manifest, Tensor
from cache.remote.signing import check_signature, sign
from tasks.checkpoints.source import is_pinned
from tasks.core.spec import Quality, Target
from tasks.execution.log import Trace
from tasks.planning import source_record
from tasks.planning.choice import Choice
from tasks.planning.lockfile import Lock
from tasks.planning.node import Known, Node
from tasks.planning.plan import Plan
from tasks.planning.source_record import LockedSource

KIND = "units"  # of records that are signed
DIGITS = 32  # of a digest
_HEX = re.compile("[0-9a-f]*")


class Remote(NamedTuple):
    """The remote store that a build has; credentials are each machine's own.

    Attributes:
        url: of it.
        read_only: whether nothing is put there.
    """

    url: str
    read_only: bool


class Settings(NamedTuple):
    """What all targets of a models.toml have in common that a worker must know."""

    quality: Quality
    keep: tuple[str, ...] | None
    remote: Remote | None


class Request(NamedTuple):
    """A target, as a worker plans it anew.

    Attributes:
        target: what was asked for, without what only packing reads.
        settings: of its models.toml.
        sources: of models.lock, or pinned as they were planned.
        adapters: the same.
        choice: how its modules' settings were chosen, where a budget does.
        files: size and modification time of the checkpoint's files that nothing else pins: what a
            worker reads in their place must be the same.
    """

    target: Target
    settings: Settings
    sources: dict[str, LockedSource]
    adapters: dict[str, LockedSource]
    choice: Choice | None
    files: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, plan: Plan, lock: Lock, settings: Settings) -> Request:
        """Return what a worker must know of a target that was planned here."""
        name, source = plan.target.source_name, plan.checkpoint.source
        sources: dict[str, LockedSource] = {}
        if name in lock.sources:
            sources[name] = lock.sources[name]
        if source.revision and (name not in sources or sources[name].revision != source.revision):
            sources[name] = source_record.pinned(plan.checkpoint)
        adapter = plan.model.adapter
        pinned = source_record.pinned_adapter(adapter)
        return cls(
            structs.replace(plan.target, where=None, files=None, card=None, card_name=None),
            settings,
            sources,
            {str(plan.target.adapter): pinned} if pinned else {},
            plan.choice,
            {} if is_pinned(source) else files(plan),
        )

    def to_bytes(self) -> bytes:
        """Return it as it travels: Dask would pickle it once for each unit."""
        return pickle.dumps(self, 5)


def files(plan: Plan) -> dict[str, tuple[int, int]]:
    """Return size and modification time of a checkpoint's weight files."""
    return {name: (stamp.size, stamp.mtime_ns) for name, stamp in plan.checkpoint.stamps.items()}


@dataclass(frozen=True, eq=False)
class Unit:
    """Nodes of a target that need each other's results, and no other node's.

    Mostly the chain of a layer; where a layer is calibrated with what those before it pass on, all
    of the target.

    Attributes:
        plan: the target.
        key: digests of all that they make, and of what a pinned checkpoint is; the same for whoever
            asks for the same.
        nodes: in an order in which they can be made.
    """

    plan: Plan
    key: str
    nodes: tuple[Node, ...]

    @property
    def layers(self) -> list[tuple[str, str]]:
        """The nodes by stage and layer, as they travel."""
        return [(node.stage.name, node.layer) for node in self.nodes]

    @property
    def nbytes(self) -> int:
        """What it reads of the checkpoint, which tells how long it takes."""
        return sum(node.spec.bytes_of_leaf for node in self.nodes if node.is_leaf)


def units(plan: Plan) -> dict[Node, Unit]:
    """Return the unit of each node that leads to the built model."""
    nodes = [node for stage in plan.stages.values() for node in stage]
    neighbours: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for need in node.needs:
            neighbours[node].append(need)
            neighbours.setdefault(need, []).append(node)
    found: dict[Node, Unit] = {}
    for node in nodes:
        if node not in found:
            unit = _unit(plan, _reached(node, neighbours))
            found |= dict.fromkeys(unit.nodes, unit)
    return found


def _reached(start: Node, neighbours: Mapping[Node, list[Node]]) -> dict[Node, None]:
    reached, left = {start: None}, [start]
    while left:
        for node in neighbours[left.pop()]:
            if node not in reached:
                reached[node] = None
                left.append(node)
    return reached


def _unit(plan: Plan, nodes: dict[Node, None]) -> Unit:
    ordered: dict[Node, None] = {}
    stack = [*nodes][::-1]
    while stack:  # no recursion: a chain of calibrated layers is long
        if missing := [need for need in stack[-1].needs if need not in ordered]:
            stack += missing
        else:
            ordered[stack.pop()] = None
    made = [
        [node.stage.name, node.stage.version, node.layer, digest(node.params.encoded)]
        for node in ordered
    ]
    source = plan.checkpoint.source
    origin = source.revision or (sorted(files(plan).items()) if source.available else None)
    return Unit(plan, f"{digest_record(made)} {digest_record(origin)}", tuple(ordered))


def is_same_work(unit: Unit, key: str) -> bool:
    """Tell whether a unit makes what one of that key does, wherever its checkpoint is read."""
    return unit.key.split()[0] == key.split()[0]


class Result(NamedTuple):
    """What a worker made of one node.

    Its dtypes, shapes and action are what whoever asked has planned: only digests travel.

    Attributes:
        digests: of its tensors, in the order of ``Node.outputs``, one after another.
        notes: what people should know of them.
        outcome: one of ``log.OUTCOMES``.
        trace: how; its start is told from when the worker was done, back: clocks differ.
    """

    digests: str
    notes: tuple[str, ...]
    outcome: str
    trace: Trace

    @classmethod
    def of(cls, manifest: Manifest, outputs: Iterable[str], outcome: str, trace: Trace) -> Result:
        """Return what travels of a manifest."""
        digests = "".join([manifest.tensors[name].digest for name in outputs])
        return cls(digests, manifest.notes, outcome, trace)


class Made(NamedTuple):
    """What a worker hands back of a unit.

    Attributes:
        worker: its address, where the bytes are to be had.
        machine: its name.
        results: of the nodes, in order.
        shared: whether the remote has the bytes.
        signature: of all digests and notes, by the signing key.
    """

    worker: str
    machine: str
    results: list[Result]
    shared: bool
    signature: bytes


class Cannot(NamedTuple):
    """Why a worker did not make a unit: it goes to another.

    Attributes:
        worker: its address.
        machine: its name.
        cause: for people.
    """

    worker: str
    machine: str
    cause: str


class Unlike(CacheError):
    """What a worker handed back is not what was asked for."""


def signature(key: str, results: list[Result], secret: bytes | None) -> bytes:
    """Return what says that somebody with the signing key made a unit's results."""
    return sign(KIND, key, _signed(results), secret)


def _signed(results: list[Result]) -> list[list[Any]]:
    return [[result.digests, [*result.notes]] for result in results]


def manifests(
    unit: Unit, made: Made, leaves: Mapping[Node, Manifest], secret: bytes | None
) -> dict[Node, Manifest]:
    """Return what was made, as what was planned to be made of those digests.

    As with what a remote store has, bytes are held against their digests as they come; that these
    are the right ones, a signing key vouches for.

    Args:
        unit: what was asked for.
        made: what came.
        leaves: what those are that were read here.
        secret: the signing key, if there is one.

    Raises:
        Unlike: it is not what was planned.
    """
    try:
        signed = check_signature(KIND, unit.key, made.signature, secret)
        if signed != _signed(made.results) or len(made.results) != len(unit.nodes):
            raise Unlike("its results are not those that were signed")
    except Refused as error:
        raise Unlike(str(error)) from error
    known: Known = {}  # a layer may have thousands of tensors
    records: dict[Node, dict[str, list[Any]]] = {}
    found: dict[Node, Manifest] = {}
    for node, result in zip(unit.nodes, made.results, strict=True):
        specs, digests = node.output_specs(known), result.digests
        if len(digests) != DIGITS * len(specs) or not _HEX.fullmatch(digests):
            raise Unlike(f"{node.name} has other tensors than were planned")
        tensors = {
            name: Tensor(dtype, shape, digests[at : at + DIGITS])
            for at, (name, (dtype, shape)) in zip(count(0, DIGITS), specs.items(), strict=False)
        }
        if node in leaves and tensors != leaves[node].tensors:
            raise Unlike(f"{node.name} is of other bytes than the checkpoint has here")
        records[node] = {name: tensor.record for name, tensor in tensors.items()}
        found[node] = Manifest(node.action_on(records), tensors, result.notes)
    return found

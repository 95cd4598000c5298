"""build: runs one node: looks its action up, or computes it, and publishes what it made.

Leaves first: blobs, then the action cache's entry, then the manifest that the build tool sees,
so that whoever finds a record finds what it speaks of.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cache.blobs import Part
from cache.errors import BlobLost
from cache.files import atomic
from cache.files.stamp import Stamp
from cache.records.actions import Corrupt, Hit, Miss
from cache.records.manifests import Action, Manifest, ManifestError, Tensor
from cache.store import Store
from tasks.core.errors import BuildError
from tasks.execution.log import Entry, Log
from tasks.execution.resources import Memory
from tasks.planning import sizes
from tasks.planning.plan import Needed, Node, Plan
from tasks.stages import cast, extract, measure, quantize, reasons, unshard
from tasks.tensors import arrays, mx, rows
from tasks.tensors.rows import Rows

if TYPE_CHECKING:
    from cache.remote.sharing import Locate
    from tasks.execution.draft import Drafts

Made = tuple[dict[str, Tensor], list[str]]  # tensors by name, and notes for people


class Stage(Protocol):
    """What the module of a stage that computes has; the modules say what each does."""

    def make(self, builder: Builder, plan: Plan, node: Node, needed: Needed) -> Made:
        """Make a layer's tensors."""


STAGES: dict[str, Stage] = {
    "unshard": unshard, "cast": cast, "quantize": quantize, "error": measure
}  # fmt: skip
AGAIN = {"unshard": unshard.again, "cast": cast.again}  # makes a result that was not kept
ALWAYS_KEPT = ("extract", "quantize", "error")  # the checkpoint's, what is packed, and small


def _not_kept(builder: Builder, node: Node) -> Iterator[Node]:
    """Yield the nodes that are made again whenever ``node`` reads them."""
    for need in node.needs:
        if not builder.keeps(need.stage):
            yield need
            yield from _not_kept(builder, need)


@dataclass
class Builder:
    """Runs nodes. One for each invocation; safe in threads.

    Attributes:
        store: the cache.
        state: folder of what belongs to this models.toml alone (manifests).
        log: the build log.
        run_id: of this invocation.
        keep: stages whose results are kept, besides ``ALWAYS_KEPT``.
        memory: what tensors in work may take together.
        drafts: weight files of what is to be packed.
        streams: MLX's, of each thread.
        torch_lock: held while torch reads a file.
        torch_digests: of the tensors that torch had to read, by file and name.
    """

    store: Store
    state: Path
    log: Log
    run_id: str
    keep: frozenset[str]
    memory: Memory
    drafts: Drafts
    streams: arrays.Streams = field(default_factory=arrays.Streams)
    torch_lock: threading.Lock = field(default_factory=threading.Lock)
    torch_digests: dict[tuple[Path, Stamp], dict[str, str]] = field(default_factory=dict)

    def manifest_path(self, node: Node) -> str:
        """Return where a node's manifest lies. A string: doit wants thousands of them."""
        return f"{self.state}/manifests/{node.target}/{node.stage}/{node.order.layer}.json"

    def packed_path(self, target: str) -> Path:
        """Return where the manifest of a target's packing lies."""
        return self.state / "manifests" / target / "pack.json"

    def run(self, plan: Plan, node: Node, why: str) -> Manifest:
        """Bring a node's manifest up to date, and return it.

        Raises:
            BuildError: it cannot be made.
        """
        path = Path(self.manifest_path(node))
        with self.logged(node.name, why) as record:
            manifest, record["outcome"] = self._run(plan, node)
            old = Manifest.at(path)
            if old and (found := reasons.between(old.action, manifest.action)):
                told = [why] if node.stage == "extract" else []  # which file changed
                record["why"] = "; ".join([*told, reasons.joined(found)])
            self.publish(path, manifest)
        return manifest

    def publish(self, path: Path, manifest: Manifest) -> None:
        """Write a manifest where the build tool looks, unless it says the same already."""
        data = manifest.to_bytes()
        try:
            if path.read_bytes() == data:
                return
        except FileNotFoundError:
            pass
        atomic.write(path, data)

    @contextmanager
    def logged(self, task: str, why: str) -> Iterator[dict[str, str]]:
        """Add a line to the build log for what the block does; it sets ``outcome``."""
        record = {"outcome": "failed", "why": why}
        start, tick = time.time(), time.perf_counter()
        meter = self.store.blobs.meter
        read, written = meter.read, meter.written
        try:
            yield record
        except BaseException:
            record["outcome"] = "failed"
            raise
        finally:
            self._log(
                Entry(
                    self.run_id,
                    task,
                    record["outcome"],
                    record["why"],
                    start,
                    time.perf_counter() - tick,
                    meter.read - read,
                    meter.written - written,
                    threading.current_thread().name,
                )
            )

    def _log(self, entry: Entry) -> None:
        try:
            self.log.add(entry)
        except OSError as error:  # no build fails for its log
            print(f"warning: {self.log.path} is not written: {error.strerror}", file=sys.stderr)

    def manifest(self, plan: Plan, node: Node) -> Manifest:
        """Return what a node made; it is made again if its record is lost or damaged."""
        path = Path(self.manifest_path(node))
        told = (node.stage, node.order.version, node.params)
        try:
            manifest = Manifest.from_bytes(path.read_bytes())
            action = manifest.action
            if (action.stage, action.version, action.params) == told:
                return manifest
            why = "its manifest is of other settings"
        except (FileNotFoundError, ManifestError) as error:
            why = f"its manifest is damaged: {error}"
        return self.run(plan, node, why)

    def needed(self, plan: Plan, node: Node) -> Needed:
        """Return the tensors that a node reads: who made each, and what it is."""
        return node.needed({need: self.manifest(plan, need) for need in node.needs})

    def _run(self, plan: Plan, node: Node) -> tuple[Manifest, str]:
        if node.stage == "extract":
            # What it reads is what it makes: looking means digesting the checkpoint's tensors.
            with self._working(plan, node, node.order.digest):
                manifest = self._look(plan, node, lost=False)
                known = isinstance(self.store.actions.get(manifest.action), Hit)
                if known or not plan.checkpoint.source.available:
                    return manifest, "reused"
                self.store.actions.put(manifest)
                return manifest, "computed"
        needed = self.needed(plan, node)
        action = self.action(node, needed)
        found, outcome = self.find(action, sizes.made(node))
        if isinstance(found, Hit):
            return found.manifest, outcome
        with self._working(plan, node, action.key):
            meanwhile = self.store.actions.get(action)
            if isinstance(meanwhile, Hit):
                return meanwhile.manifest, "reused"
            self.fetch(plan, needed, node.params.get("settings", ()))
            manifest = self._make(plan, node, needed)
            if isinstance(found, Corrupt):
                note = f"{found.path} was corrupt ({found.cause}); it is made again"
                manifest = replace(manifest, notes=(*manifest.notes, note))
            self.store.actions.put(manifest)
        if self.store.sharing:
            self.store.sharing.push(manifest, self.shared(node))
        return manifest, "computed"

    @contextmanager
    def _working(self, plan: Plan, node: Node, key: str) -> Iterator[None]:
        """Hold the memory that a node's action takes, then the action.

        In this order: an action that finds a result lost has its maker run within its own memory,
        and so must never be waited for by who has that maker's action and waits for memory.
        """
        with self.memory.held(self._memory(plan, node)), self.store.actions.running(key):
            yield

    def find(
        self, action: Action, outline: Mapping[str, Tensor] | None = None
    ) -> tuple[Hit | Miss | Corrupt, str]:
        """Look an action up, here and then in the remote; return what came of it for the log.

        Args:
            action: the action.
            outline: what it makes, whatever the digests: a remote's word on that is not taken.
        """
        found = self.store.actions.get(action)
        if not isinstance(found, Hit) and self.store.sharing:
            manifest = self.store.sharing.find(action, outline)
            if manifest is not None:
                return Hit(manifest), "fetched"
        return found, "reused" if isinstance(found, Hit) else "computed"

    def recorded(self, key: str) -> Manifest | None:
        """Return what the action of ``key`` made, if that is on record."""
        found = self.store.actions.read(key)
        if found is None and self.store.sharing:
            found = self.store.sharing.read(key)
        return found

    def shared(self, node: Node) -> Locate | None:
        """Return what locates a node's tensors, or None if their bytes are not kept anywhere."""
        if node.stage == "extract" or not self.keeps(node.stage):
            return None
        return lambda _, tensor: self.store.blobs.locate(tensor.digest, tensor.nbytes)

    def fetch(self, plan: Plan, needed: Needed, names: Iterable[str]) -> None:
        """Have the tensors' blobs in the store, those of a remote all at once."""
        sharing, blobs = self.store.sharing, self.store.blobs
        if not sharing:
            return
        lost = [needed[n] for n in names if not blobs.has(needed[n][1].digest, needed[n][1].nbytes)]
        keys = {maker: self.manifest(plan, maker).action.key for maker, _ in lost}
        sharing.fetch_all([(keys[maker], tensor) for maker, tensor in lost])

    def look(self, plan: Plan, node: Node, *, lost: bool = False) -> Manifest:
        """Return what extract makes of a layer; if a blob is ``lost``, by reading its files."""
        with self.memory.held(self._memory(plan, node)):
            return self._look(plan, node, lost=lost)

    def _look(self, plan: Plan, node: Node, *, lost: bool) -> Manifest:
        tensors = extract.make(self, plan, node, look=lost)
        made = {name: (node, tensor) for name, tensor in tensors.items()}
        return Manifest(self.action(node, made), tensors)

    def _make(self, plan: Plan, node: Node, needed: Needed) -> Manifest:
        with mx.stream(self.streams.get("cpu")):
            tensors, notes = STAGES[node.stage].make(self, plan, node, needed)
        return Manifest(self.action(node, needed), tensors, tuple(notes))

    def action(self, node: Node, inputs: Needed) -> Action:
        """Return a node's action, given what it reads."""
        read = {name: tensor.record for name, (_, tensor) in inputs.items()}
        return Action(node.stage, node.order.version, node.params, read)

    def _memory(self, plan: Plan, node: Node) -> int:
        """Return how many bytes a node's action holds at once."""
        whole = 0
        if node.stage == "extract":
            whole = extract.memory(plan.checkpoint, node.params["tensors"])
        if node.stage == "unshard":
            whole = unshard.memory(plan.checkpoint, node.params["tensors"])
        for need in _not_kept(self, node):
            if need.stage == "unshard":
                tensors = need.params["tensors"]
                whole = max(whole, unshard.memory(plan.checkpoint, tensors, again=True))
        computed = quantize.memory(node.params["device"]) if "device" in node.params else 0
        return whole + max(rows.IN_FLIGHT_BYTES, computed)

    def keeps(self, stage: str) -> bool:
        """Tell whether a stage's results are kept; what is not is made again as it is read."""
        return stage in ALWAYS_KEPT or stage in self.keep

    def kept(self, plan: Plan, needed: Needed, name: str) -> Tensor:
        """Return a tensor that a stage passes on, in the store from now on if it was not."""
        _, tensor = needed[name]
        blobs = self.store.blobs
        if blobs.has(tensor.digest, tensor.nbytes):
            return tensor
        return rows.digest(blobs, self.rows(plan, needed, name), keep=True)

    def rows(self, plan: Plan, needed: Needed, name: str) -> Rows:
        """Return a tensor to read: from the store, or made again from what it was made of.

        Raises:
            BuildError: it is lost for good, e.g. the checkpoint changed under it.
        """
        maker, tensor = needed[name]
        blobs = self.store.blobs
        if not self.keeps(maker.stage) and not blobs.has(tensor.digest, tensor.nbytes):
            again = AGAIN[maker.stage](self, plan, maker, self.needed(plan, maker), name)
            if again is not None:
                return again
        return rows.Stored(blobs, self.locate(plan, needed, name), tensor.dtype, tensor.shape)

    def locate(self, plan: Plan, needed: Needed, name: str) -> list[Part]:
        """Return where the bytes of a tensor lie that is kept, made again if they are lost.

        Raises:
            BuildError: they come out differently.
        """
        maker, tensor = needed[name]
        try:
            return self.store.blobs.locate(tensor.digest, tensor.nbytes)
        except BlobLost as lost:
            self.fetch(plan, needed, [name])
            if not self.store.blobs.has(tensor.digest, tensor.nbytes):
                self.remake(plan, maker, name, tensor, lost)
                if self.store.sharing:  # where it is not there either, or corrupt
                    manifest = self.manifest(plan, maker)
                    self.store.sharing.push(manifest, self.shared(maker))
        return self.store.blobs.locate(tensor.digest, tensor.nbytes)

    def remake(self, plan: Plan, node: Node, name: str, tensor: Tensor, lost: BlobLost) -> None:
        """Run the action again that made a tensor whose blob is gone.

        Raises:
            BuildError: it made something else.
        """
        needed = self.needed(plan, node)
        for key, (maker, passed) in needed.items():
            # Only passed on here: whoever keeps it makes it again.
            if passed == tensor and self.keeps(maker.stage):
                self.remake(plan, maker, key, tensor, lost)
                return
        # Whoever waits here holds actions of later stages alone, which this one never waits for.
        with self._working(plan, node, self.action(node, needed).key):
            if self.store.blobs.has(tensor.digest, tensor.nbytes):  # by another thread
                return
            with self.logged(node.name, f"blob lost: {lost.cause}") as record:
                if node.stage == "extract":
                    again = self._look(plan, node, lost=True)
                else:
                    again = self._make(plan, node, needed)
                record["outcome"] = "computed"
        if again.tensors.get(name) != tensor:
            self.publish(Path(self.manifest_path(node)), again)  # so that the next run sees it
            raise BuildError(
                f"{node.name}: {name} is lost ({lost.cause}) and comes out differently now. "
                "Run doit again: what depends on it is then built anew."
            )

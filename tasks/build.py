"""build: runs one node: looks its action up, or computes it, and publishes what it made.

Leaves first: blobs, then the action cache's entry, then the manifest that the build tool sees,
so that whoever finds a record finds what it speaks of.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from cache import files
from cache.actions import Corrupt, Hit
from cache.blobs import Part
from cache.digest import digest_parts
from cache.errors import BlobLost
from cache.log import Entry, Log
from cache.manifests import Action, Manifest, ManifestError, Tensor
from cache.store import Store
from tasks import architecture, arrays, cast, quantize, rows, unshard
from tasks.checkpoint import TORCH, load_with_torch
from tasks.errors import BuildError, CheckpointError
from tasks.plan import Node, Plan
from tasks.rows import Rows


@dataclass
class Builder:
    """Runs nodes. One for each invocation; safe in threads.

    Attributes:
        store: the cache.
        state: folder of what belongs to this models.toml alone (manifests).
        log: the build log.
        run_id: of this invocation.
    """

    store: Store
    state: Path
    log: Log
    run_id: str
    streams: arrays.Streams = field(default_factory=arrays.Streams)
    _torch_lock: threading.Lock = field(default_factory=threading.Lock)
    _torch_file: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def manifest_path(self, node: Node) -> str:
        """Return where a node's manifest lies. A string: doit wants thousands of them."""
        return f"{self.state}/manifests/{node.target}/{node.stage}/{node.layer}.json"

    def run(self, plan: Plan, node: Node, why: str) -> None:
        """Bring a node's manifest up to date.

        Raises:
            BuildError: it cannot be made.
        """
        with self.logged(node.name, why) as record:
            if node.stage == "extract":
                manifest, record["outcome"] = self._extract(plan, node)
            else:
                manifest, record["outcome"] = self._run(plan, node)
            self.publish(Path(self.manifest_path(node)), manifest)

    def publish(self, path: Path, manifest: Manifest) -> None:
        """Write a manifest where the build tool looks, unless it says the same already."""
        data = manifest.to_bytes()
        try:
            if path.read_bytes() == data:
                return
        except FileNotFoundError:
            pass
        files.write(path, data)

    @contextmanager
    def logged(self, task: str, why: str) -> Iterator[dict[str, str]]:
        """Add a line to the build log for what the block does; it sets ``outcome``."""
        record = {"outcome": "failed"}
        start, tick = time.time(), time.perf_counter()
        meter = self.store.blobs.meter
        read, written = meter.read, meter.written
        try:
            yield record
        finally:
            self.log.add(
                Entry(
                    self.run_id,
                    task,
                    record["outcome"],
                    why,
                    start,
                    time.perf_counter() - tick,
                    meter.read - read,
                    meter.written - written,
                    threading.current_thread().name,
                )
            )

    def needed(self, node: Node) -> dict[str, tuple[Node, Tensor]]:
        """Return the tensors that a node reads: who made each, and what it is."""
        found = {}
        for need in node.needs:
            path = Path(self.manifest_path(need))
            try:
                manifest = Manifest.from_bytes(path.read_bytes())
            except (FileNotFoundError, ManifestError) as error:
                raise BuildError(f"{path}: {error}. Run doit again.") from error
            found.update({name: (need, tensor) for name, tensor in manifest.tensors.items()})
        return found

    def _run(self, plan: Plan, node: Node) -> tuple[Manifest, str]:
        needed = self.needed(node)
        inputs = {name: tensor.digest for name, (_, tensor) in needed.items()}
        if node.stage == "unshard":  # a layer may need only some of what a neighbour holds
            used = {i for _, _, keys, _ in node.params["tensors"].values() for i in keys}
            inputs = {name: value for name, value in inputs.items() if name in used}
        action = Action(node.stage, node.version, node.params, inputs)
        with self.store.actions.running(action.key):
            found = self.store.actions.get(action)
            if isinstance(found, Hit):
                return found.manifest, "reused"
            manifest = self._compute(plan, node, action, needed)
            self.store.actions.put(manifest)
        if isinstance(found, Corrupt):
            note = f"{found.path} was corrupt ({found.cause}) and is made again"
            manifest = Manifest(manifest.action, manifest.tensors, (*manifest.notes, note))
        return manifest, "computed"

    def _compute(
        self, plan: Plan, node: Node, action: Action, needed: dict[str, tuple[Node, Tensor]]
    ) -> Manifest:
        stages = {"unshard": self._unshard, "cast": self._cast, "quantize": self._quantize}
        with mx.stream(self.streams.get("cpu")):
            tensors, notes = stages[node.stage](plan, node, needed)
        return Manifest(action, tensors, tuple(notes))

    def rows(self, plan: Plan, maker: Node, name: str, tensor: Tensor) -> Rows:
        """Return a tensor to read: from the store, or made again from what it was made of.

        Raises:
            BuildError: it is lost for good, e.g. the checkpoint changed under it.
        """
        blobs = self.store.blobs
        if maker.stage == "unshard" and not blobs.has(tensor.digest, tensor.nbytes):
            # Not kept: cast keeps what it makes of it, and it is cheap to make again.
            _, _, inputs, steps = maker.params["tensors"][name]
            if not unshard.sanitized(steps):
                needed = self.needed(maker)
                return rows.apply([self.rows(plan, *_source(needed, key)) for key in inputs], steps)
        return rows.Stored(
            blobs, self.locate(plan, maker, name, tensor), tensor.dtype, tensor.shape
        )

    def locate(self, plan: Plan, maker: Node, name: str, tensor: Tensor) -> list[Part]:
        """Return where the bytes of a tensor lie that is kept, made again if they are lost.

        Raises:
            BuildError: they come out differently.
        """
        try:
            return self.store.blobs.locate(tensor.digest, tensor.nbytes)
        except BlobLost as lost:
            self.remake(plan, maker, name, tensor, lost)
        return self.store.blobs.locate(tensor.digest, tensor.nbytes)

    def remake(self, plan: Plan, node: Node, name: str, tensor: Tensor, lost: BlobLost) -> None:
        """Run the action again that made a tensor whose blob is gone.

        Raises:
            BuildError: it made something else.
        """
        if node.stage == "extract":
            again, _ = self._extract(plan, node, look=True)
        else:
            needed = self.needed(node)
            for key, (maker, passed) in needed.items():
                # Only passed on here: whoever made it makes it again. Not so what unshard made,
                # which is kept from cast on.
                if passed == tensor and maker.stage != "unshard":
                    self.remake(plan, maker, key, tensor, lost)
                    return
            old = Manifest.from_bytes(Path(self.manifest_path(node)).read_bytes())
            with self.logged(node.name, f"blob lost: {lost.cause}") as record:
                again = self._compute(plan, node, old.action, needed)
                record["outcome"] = "computed"
        if again.tensors.get(name) != tensor:
            raise BuildError(
                f"{node.name}: {name} is lost ({lost.cause}) and comes out differently now. "
                "Run doit again: what depends on it is then built anew."
            )

    # The stages. Each returns the tensors it made and notes for people.

    def _extract(self, plan: Plan, node: Node, look: bool = False) -> tuple[Manifest, str]:
        """Digest a layer's stored tensors where they lie; copy only what torch must read."""
        blobs = self.store.blobs
        known = None if look else self.store.memos.get("extracts", node.look)
        tensors: dict[str, Tensor] = {}
        for index, (key, (dtype, shape)) in enumerate(node.params["tensors"].items()):
            path, stored = plan.stored(key)
            if known and blobs.has(known[index], stored.nbytes):
                tensors[key] = Tensor(dtype, tuple(shape), known[index])
                continue
            try:
                if stored.offset == TORCH:
                    with blobs.writing() as writer:
                        writer.write(self._extract_with_torch(path, stored.name))
                    found = writer.digest
                else:
                    stamp = plan.checkpoint.stamps[stored.file]
                    part = Part(str(path), stored.offset, stored.nbytes, stamp)
                    found = digest_parts(blobs.chunks([part]))
                    if files.Stamp.of(path) != stamp:
                        raise CheckpointError(
                            f"{path} changed while it was read. Run doit again when it is whole."
                        )
                    blobs.refer(found, [part])
            except (OSError, BlobLost) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            tensors[key] = Tensor(dtype, tuple(shape), found)
        inputs = {key: tensor.digest for key, tensor in tensors.items()}
        manifest = Manifest(Action("extract", node.version, node.params, inputs), tensors)
        if not known or list(inputs.values()) != known:
            self.store.memos.put("extracts", node.look, list(inputs.values()))
        if isinstance(self.store.actions.get(manifest.action), Hit):
            return manifest, "reused"
        self.store.actions.put(manifest)
        return manifest, "computed"

    def _extract_with_torch(self, path: Path, name: str) -> memoryview:
        import torch

        with self._torch_lock:
            if path not in self._torch_file:
                self._torch_file.clear()  # one file's tensors at a time fit in memory
                self._torch_file[path] = load_with_torch(path)
            tensor = self._torch_file[path][name]
        return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

    def _unshard(
        self, plan: Plan, node: Node, needed: dict[str, tuple[Node, Tensor]]
    ) -> tuple[dict[str, Tensor], list[str]]:
        blobs = self.store.blobs
        made: dict[str, Tensor] = {}
        for name, (dtype, shape, inputs, steps) in node.params["tensors"].items():
            if unshard.sanitized(steps):
                continue  # all at once, below
            sources = [needed[key] for key in inputs]
            first = sources[0][1].digest
            if steps and steps[0][0] == "same":
                if any(tensor.digest != first for _, tensor in sources):
                    raise CheckpointError(
                        f"{plan.checkpoint.folder}: shards disagree on {name}, which each holds "
                        "whole. They are not of one checkpoint."
                    )
                sources, steps = sources[:1], steps[1:]
            if not steps:
                made[name] = Tensor(dtype, tuple(shape), first)
            else:
                stored = [self.rows(plan, *_source(needed, key)) for key in inputs]
                whole = rows.apply(stored, steps)
                found = digest_parts(arrays.view(block) for block in rows.blocks(whole))
                made[name] = Tensor(dtype, tuple(shape), found)
                if isinstance(whole, rows.Stored):  # just the inputs, end to end
                    blobs.refer(found, whole.parts)
        made |= self._sanitize(plan, node, needed)
        return {name: made[name] for name in node.params["tensors"]}, []

    def _sanitize(
        self, plan: Plan, node: Node, needed: dict[str, tuple[Node, Tensor]]
    ) -> dict[str, Tensor]:
        """Have mlx-lm make what is no plain tensor of the checkpoint."""
        told = {
            name: (dtype, shape, inputs)
            for name, (dtype, shape, inputs, steps) in node.params["tensors"].items()
            if unshard.sanitized(steps)
        }
        if not told:
            return {}
        inputs = {}
        for key in dict.fromkeys(i for _, _, keys in told.values() for i in keys):
            inputs[key] = self.locate(plan, *_source(needed, key))
        made = {}
        with self.store.blobs.scratch() as folder:
            outputs = {name: folder / str(number) for number, name in enumerate(told)}
            architecture.compute(plan.checkpoint, inputs, outputs)
            for name, (dtype, shape, _) in told.items():
                made[name] = Tensor(dtype, tuple(shape), self.store.blobs.adopt(outputs[name]))
        return made

    def _cast(
        self, plan: Plan, node: Node, needed: dict[str, tuple[Node, Tensor]]
    ) -> tuple[dict[str, Tensor], list[str]]:
        made: dict[str, Tensor] = {}
        for name, (_, tensor) in needed.items():
            dtype = node.params["dtypes"].get(name, tensor.dtype)
            # What the checkpoint or the store holds stays where it is. What unshard only
            # digested is kept from here on, so that later stages need no checkpoint.
            if dtype == tensor.dtype and self.store.blobs.has(tensor.digest, tensor.nbytes):
                made[name] = tensor
                continue
            source = self.rows(plan, *_source(needed, name))
            with self.store.blobs.writing() as writer:
                for block in rows.blocks(source):
                    writer.write(arrays.view(cast.cast(block, dtype=dtype)))
            made[name] = Tensor(dtype, tensor.shape, writer.digest)
        return made, []

    def _quantize(
        self, plan: Plan, node: Node, needed: dict[str, tuple[Node, Tensor]]
    ) -> tuple[dict[str, Tensor], list[str]]:
        made: dict[str, Tensor] = {}
        notes = []
        for name, (_, tensor) in needed.items():
            if name not in node.params["settings"]:
                made[name] = tensor
                continue
            setting = quantize.Setting(*node.params["settings"][name])
            source = self.rows(plan, *_source(needed, name))
            parts, finite = self._quantize_rows(source, setting, node.params["device"])
            if not finite:
                notes.append(f"{name} holds NaN or infinity, which no quantized weight can show")
            prefix = name.removesuffix("weight")
            made |= {prefix + part: tensor for part, tensor in parts.items()}
        return made, notes

    def _quantize_rows(
        self, source: Rows, setting: quantize.Setting, backend: str
    ) -> tuple[dict[str, Tensor], bool]:
        """Quantize a weight; return its parts, and whether all of it was finite."""
        stream = self.streams.get("cpu" if backend == "cpu" else "gpu")
        names = quantize.PARTS[: 3 if setting.mode == "affine" else 2]
        finite = True
        shapes: dict[str, tuple[str, int]] = {}
        with ExitStack() as stack:
            writers = [stack.enter_context(self.store.blobs.writing()) for _ in names]
            for block in rows.blocks(source):
                odd = quantize.not_finite(block, dtype=source.dtype)
                packed = quantize.quantize(block, **setting._asdict(), stream=stream)
                mx.eval(odd, packed)
                finite = finite and not odd.item()
                for name, writer, array in zip(names, writers, packed, strict=True):
                    writer.write(arrays.view(array))
                    shapes[name] = (arrays.dtype_name(array), array.shape[-1])
        return {
            name: Tensor(shapes[name][0], (*source.shape[:-1], shapes[name][1]), writer.digest)
            for name, writer in zip(names, writers, strict=True)
        }, finite


def _source(needed: dict[str, tuple[Node, Tensor]], name: str) -> tuple[Node, str, Tensor]:
    maker, tensor = needed[name]
    return maker, name, tensor

"""early: a target's weight files are begun while its layers are still made.

Packing reads, digests, and copies what does not lie in its place: where a GPU quantizes, that takes
up to half as long as all layers do, and can be done behind them. It keeps two cores busy, so that
where there are no more nothing is gained, and the layers lose.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from cache.blobs import Part
from cache.errors import BlobLost, CacheError
from cache.records.manifests import Manifest, Tensor
from tasks.core.errors import BuildError
from tasks.execution.builder import Builder
from tasks.execution.filling import fill, place
from tasks.execution.filling.fill import Filling, PackedFolder
from tasks.execution.resources import cores
from tasks.planning import bundle, sizes
from tasks.planning.bundle import Bundle
from tasks.planning.node import total
from tasks.planning.plan import Plan

BUSY_CORES = 2  # by packing: one thread reads and digests, one writes behind it


class Stopped(Exception):
    """What is being written is not wanted any more."""


class PackInProgress:
    """What packing would write beside build/TARGET, written by a thread as layers become ready.

    Nobody hears of its errors: packing does anew what it did not end, and meets them itself. So it
    holds no lock of the store between tasks: what is collected meanwhile is found to be lost.
    """

    def __init__(self, builder: Builder, plan: Plan, *, with_blake3: bool) -> None:
        """Begin.

        Args:
            builder: has the store.
            plan: the target.
            with_blake3: whether the BLAKE3 of the files is wanted.
        """
        self.target = plan.target.name
        self._new = place.beside(place.folder_of(builder.workspace, self.target))
        self._blobs = builder.store.blobs
        self._tensors: dict[str, Tensor] = {}
        self._changed = threading.Condition()
        self._over = False
        self._result: tuple[Bundle, PackedFolder, dict[str, list[int]] | None] | None = None

        def write() -> None:
            specs = {name: Tensor(*spec, "") for name, spec in bundle.specs(plan).items()}
            expected = Bundle.of(plan, specs, builder.store.memos)
            passes = builder.passes(plan)
            need = expected.nbytes
            if not passes:  # else room for it is reserved, layer by layer
                need += sizes.total_traffic(plan, builder.kept(plan)).written
            if builder.begin_draft(plan):  # most of the files is what layers write
                in_place = (bundle.in_place(node, passes=passes) for node in plan.last)
                need -= sum(total(specs.values()) for specs in in_place)
            fill.make_empty(self._new, need)  # no layer is to fail for this
            filling = Filling(plan, expected, self._new, self._blobs, builder.drafts, with_blake3)
            written: list[Bundle] = []

            def small() -> dict[str, bytes]:
                written.append(Bundle.of(plan, self._tensors, builder.store.memos))
                return written[0].small

            filled = fill.fill(filling, self._find, small)
            self._result = written[0], filled, place.stamps(str(self._new), list(filled.files))

        def run() -> None:
            try:
                write()
            except (Stopped, BuildError, CacheError, OSError):
                shutil.rmtree(self._new, ignore_errors=True)

        self._thread = threading.Thread(target=run, name="early", daemon=True)
        self._thread.start()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a layer has become. What came first stays: it may be written already."""
        with self._changed:
            self._tensors = {**tensors, **self._tensors}
            self._changed.notify_all()

    def finish(self, wanted: Bundle) -> PackedFolder | None:
        """Return what was written once it is all there, or None if it is not ``wanted``."""
        tensors = {name: tensor for shard in wanted.weights.values() for name, tensor in shard}
        if self._tensors.items() <= tensors.items():
            self.add(tensors)  # of layers that did not run, too
            self._thread.join()
            if self._result:
                written, filled, stamps = self._result
                intact = place.intact_files(str(self._new), stamps)
                as_wanted = written.specs_digest == wanted.specs_digest
                if as_wanted and written.small == wanted.small and intact:
                    return filled
        self.stop()
        return None

    def abandon(self) -> None:
        """Have it stop before long; wait for nothing."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Stop, and remove what was written; what packing took over is elsewhere by now."""
        self.abandon()
        self._thread.join()
        shutil.rmtree(self._new, ignore_errors=True)

    def _find(self, name: str) -> tuple[str, Sequence[Part]]:
        with self._changed:
            self._changed.wait_for(lambda: self._over or name in self._tensors)
            if self._over:
                raise Stopped
            tensor = self._tensors[name]
        try:
            return tensor.digest, self._blobs.locate(tensor.digest, tensor.nbytes)
        except BlobLost:  # or never here, where a remote has it
            self.abandon()  # the other files too
            raise


class BackgroundPacker:
    """Begins to pack one target at a time, the first of which a layer is made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: PackInProgress | None = None
        self._over = cores() <= BUSY_CORES

    def add_layer(
        self, builder: Builder, plan: Plan, manifest: Manifest, *, with_blake3: bool
    ) -> None:
        """Take note of what the last stage made of a layer of a target that will be packed."""
        with self._lock:
            if self._begun is None and not self._over:
                self._begun = PackInProgress(builder, plan, with_blake3=with_blake3)
            if self._begun and self._begun.target == plan.target.name:
                self._begun.add(manifest.tensors)

    @contextmanager
    def taken(self, target: str) -> Iterator[PackInProgress | None]:
        """Give what was begun of a target, if it was; it ends with the block."""
        with self._lock:
            begun = self._begun if self._begun and self._begun.target == target else None
        try:
            yield begun
        finally:
            if begun:
                begun.stop()
                with self._lock:
                    self._begun = None

    def abandon(self) -> None:
        """Have all stop before long. Tasks may still be at work, so that no file is touched."""
        with self._lock:
            self._over = True
            if self._begun:
                self._begun.abandon()

    def stop(self) -> None:
        """Stop, when all tasks have ended, what none of them took."""
        if self._begun:
            self._begun.stop()

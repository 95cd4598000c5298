"""draft: a target's weight files in the cache, into which layers write their tensors in place.

So no byte is written twice: packing adds what is missing, and links the files to build/.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from cache.blobs import Blobs, Part, Place, Writer
from cache.records.manifests import Tensor
from tasks.layouts import weight_file
from tasks.layouts.registry import LAYOUTS
from tasks.layouts.weight_file import Find
from tasks.planning import bundle
from tasks.planning.node import Node, total
from tasks.planning.plan import Plan


class WeightFileDraft:
    """The weight files of one target, while its layers are made.

    Attributes:
        specs_digest: of what the files hold, see ``bundle.specs_digest``.
        paths: where they lie, by their names.
    """

    def __init__(self, blobs: Blobs, plan: Plan) -> None:
        """Begin them.

        Raises:
            NoRoom: the disk cannot take them.
        """
        specs = bundle.specs(plan)
        split = bundle.split(plan, specs)
        self._blobs = blobs
        self._places: dict[str, Place] = {}
        self._digests: dict[str, str] = {}  # of what is written, by name
        self._elsewhere: set[str] = set()  # names of tensors that another file has, too
        self.specs_digest = bundle.specs_digest(split)
        containers = self._blobs.new_containers(len(split), total(specs.values()))
        self.paths = dict(zip(split, containers, strict=True))
        weight_format = LAYOUTS[plan.target.layout].weight_format
        for file, shard in split.items():
            for tensor, offset in weight_file.offsets(shard, weight_format).items():
                self._places[tensor] = Place(self.paths[file], offset, specs[tensor].nbytes)

    @contextmanager
    def writing(self, name: str) -> Iterator[Writer]:
        """Give a writer that writes a tensor in its place.

        Raises:
            NoRoom: the disk is full.
        """
        with self._blobs.writing_at(self._places[name]) as writer:
            yield writer
        self._digests[name] = writer.digest

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(self._places[name].length for name in tuple(self._digests))

    def finding(self, find: Find) -> Find:
        """Return what finds tensors here, if they were written here, and else as ``find`` does."""

        def find_here(name: str) -> tuple[str, Sequence[Part]]:
            digest, parts = find(name)
            if self._digests.get(name) != digest:
                return digest, parts
            here = [self._places[name].part]
            if parts != here:
                self._elsewhere.add(name)
            return digest, here

        return find_here

    def note_whole(self, files: Mapping[str, Tensor]) -> None:
        """Record that the files are whole.

        Tensors that the cache has in another file as well are found here from now on: what is
        wanted together lies together, and the older file can go.

        Args:
            files: as tensors of bytes, by name.
        """
        for file, tensor in files.items():
            self._blobs.note_whole(self.paths[file], tensor.digest, tensor.nbytes)
        for name in self._elsewhere:
            self._blobs.refer(self._digests[name], [self._places[name].part])


class Drafts:
    """The drafts of the targets that a run packs."""

    def __init__(self, blobs: Blobs, packs: Callable[[str], bool]) -> None:
        """Begin with none.

        Args:
            blobs: the cache's.
            packs: tells whether the run means to pack a target.
        """
        self._blobs = blobs
        self._packs = packs
        self._lock = threading.Lock()
        self._drafts: dict[str, WeightFileDraft | None] = {}

    def begin(self, plan: Plan, is_made: Callable[[Node], bool]) -> WeightFileDraft | None:
        """Return a target's draft, begun unless it is already.

        There is none where the target is not packed, or most of it is on record here: a whole file
        would be kept for a few of its tensors.

        Args:
            plan: the target.
            is_made: tells whether a node is made in this run.

        Raises:
            NoRoom: the disk cannot take it.
        """
        target = plan.target.name
        if not self._packs(target):
            return None
        with self._lock:
            if target not in self._drafts:
                in_place = bundle.writes_in_place(plan, is_made)
                self._drafts[target] = WeightFileDraft(self._blobs, plan) if in_place else None
            return self._there(target)

    def of(self, target: str) -> WeightFileDraft | None:
        """Return the draft of a target, if it was begun."""
        with self._lock:
            return self._there(target)

    def _there(self, target: str) -> WeightFileDraft | None:
        draft = self._drafts.get(target)
        if draft and not all(path.exists() for path in draft.paths.values()):  # collected
            draft = self._drafts[target] = None
        return draft

    def end(self, target: str) -> None:
        """Let nothing more be written into the draft of a target."""
        with self._lock:
            self._drafts[target] = None

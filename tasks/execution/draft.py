"""draft: a target's weight files in the cache, in which what is quantized is written in its place.

So no byte of it is written twice: packing adds what is missing, and links the files to build/.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cache.blobs import Part, Place, Writer
from cache.records.actions import Hit
from cache.records.manifests import Manifest, Tensor
from tasks.layouts import LAYOUTS, weight_file
from tasks.planning import bundle, sizes
from tasks.planning.bundle import is_new
from tasks.stages import extract

if TYPE_CHECKING:
    from tasks.execution.builder import Builder
    from tasks.layouts.weight_file import Find
    from tasks.planning.plan import Node, Plan


class Draft:
    """The weight files of one target, its layers being made.

    Attributes:
        shapes: the digest of what the files hold, see ``pack.shapes``.
        paths: where they lie, by their names.
    """

    def __init__(self, builder: Builder, plan: Plan) -> None:
        """Begin them.

        Raises:
            NoRoom: the disk cannot take them.
        """
        made = {name: tensor for name, (_, tensor) in sizes.outline(plan).items()}
        split = bundle.split(plan, made)
        self._blobs = builder.store.blobs
        self._places: dict[str, Place] = {}
        self._digests: dict[str, str] = {}  # of what is written, by name
        self._elsewhere: set[str] = set()  # names of what the cache has in another file as well
        self.shapes = bundle.shapes(split)
        packs = self._blobs.new_containers(len(split), sizes.total(made.values()))
        self.paths = dict(zip(split, packs, strict=True))
        weight_format = LAYOUTS[plan.target.layout].weight_format
        for file, shard in split.items():
            for tensor, offset in weight_file.offsets(shard, weight_format).items():
                self._places[tensor] = Place(self.paths[file], offset, made[tensor].nbytes)

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

        def found(name: str) -> tuple[str, Sequence[Part]]:
            digest, parts = find(name)
            if self._digests.get(name) != digest:
                return digest, parts
            here = [self._places[name].part]
            if parts != here:
                self._elsewhere.add(name)
            return digest, here

        return found

    def note_whole(self, made: Mapping[str, Tensor]) -> None:
        """Take note that the files are whole, as tensors of bytes by their names.

        What the cache has in another file as well is known to lie here from now on: what is wanted
        together lies together, and an older file can go.
        """
        for file, tensor in made.items():
            self._blobs.note_whole(self.paths[file], tensor.digest, tensor.nbytes)
        for name in self._elsewhere:
            self._blobs.refer(self._digests[name], [self._places[name].part])


class Drafts:
    """The drafts of the targets that a run packs."""

    def __init__(self, packs: Callable[[str], bool]) -> None:
        """Begin with none.

        Args:
            packs: tells whether the run means to pack a target.
        """
        self._packs = packs
        self._lock = threading.Lock()
        self._drafts: dict[str, Draft | None] = {}

    def begin(self, builder: Builder, plan: Plan) -> Draft | None:
        """Return a target's draft, begun unless it is already.

        There is none where the target is not packed, or most of it is on record here: a file would
        stay for the sake of a few of its tensors. See ``is_new``, too.

        Raises:
            NoRoom: the disk cannot take it.
        """
        target = plan.target.name
        if not self._packs(target):
            return None
        with self._lock:
            if target not in self._drafts:
                known: dict[Node, Manifest | None] = {}
                new = is_new(plan, lambda node: not _recorded(builder, plan, node, known))
                self._drafts[target] = Draft(builder, plan) if new else None
            return self._there(target)

    def of(self, target: str) -> Draft | None:
        """Return the draft of a target, if it was begun."""
        with self._lock:
            return self._there(target)

    def _there(self, target: str) -> Draft | None:
        draft = self._drafts.get(target)
        if draft and not all(path.exists() for path in draft.paths.values()):  # collected
            draft = self._drafts[target] = None
        return draft

    @contextmanager
    def ending(self, target: str) -> Iterator[None]:
        """Have a target's draft, if there is one, end with the block."""
        try:
            yield
        finally:
            self.end(target)

    def end(self, target: str) -> None:
        """Have no more written into the draft of a target."""
        with self._lock:
            self._drafts[target] = None


def _recorded(
    builder: Builder, plan: Plan, node: Node, known: dict[Node, Manifest | None]
) -> Manifest | None:
    """Return what is on record here of a node, of the checkpoint as it is; ``known``: of others."""
    if node in known:
        return known[node]
    known[node] = None
    if node.stage == "extract":
        tensors = extract.known(builder, plan, node)
        if tensors is not None:
            made = {name: (node, tensor) for name, tensor in tensors.items()}
            known[node] = Manifest(builder.action(node, made), tensors)
        return known[node]
    found = {need: _recorded(builder, plan, need, known) for need in node.needs}
    if read := {need: manifest for need, manifest in found.items() if manifest}:
        action = builder.action(node, node.needed(read)) if len(read) == len(found) else None
        if action and isinstance(hit := builder.store.actions.get(action), Hit):
            known[node] = hit.manifest
    return known[node]

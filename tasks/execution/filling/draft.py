"""draft: a target's weight files in the cache, into which layers write their tensors in place.

So no byte is written twice: packing adds what is missing, and links the files to build/.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from cache.blobs import Blobs, Part, Place, Writer
from cache.errors import BlobLost
from cache.files import atomic
from cache.records.manifests import Tensor
from cache.records.sealed import Damaged, seal, unseal
from tasks.layouts import weight_file
from tasks.layouts.registry import LAYOUTS
from tasks.layouts.weight_file import Find
from tasks.planning import bundle
from tasks.planning.node import Node, total
from tasks.planning.plan import Plan


class Begun(Struct, frozen=True):
    """The weight files that a run has begun.

    Attributes:
        specs: digest of what they hold.
        files: the containers' names, by the files'.
    """

    specs: str
    files: dict[str, str]


class WeightFileDraft:
    """The weight files of one target, while its layers are made.

    Attributes:
        specs_digest: of what the files hold, see ``bundle.specs_digest``.
        paths: where they lie, by their names.
        goes_on: whether an earlier run began them.
    """

    def __init__(self, blobs: Blobs, plan: Plan, begun: Begun | None = None) -> None:
        """Begin them, or go on with those that an earlier run has ``begun``.

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
        self.goes_on = begun is not None and begun.specs == self.specs_digest
        if begun and self.goes_on:
            self.paths = {file: blobs.container(name) for file, name in begun.files.items()}
        else:
            containers = self._blobs.new_containers(len(split), total(specs.values()))
            self.paths = dict(zip(split, containers, strict=True))
        weight_format = LAYOUTS[plan.target.layout].weight_format
        for file, shard in split.items():
            for tensor, offset in weight_file.offsets(shard, weight_format).items():
                self._places[tensor] = Place(self.paths[file], offset, specs[tensor].nbytes)

    def place(self, name: str) -> Place:
        """Return where a tensor belongs."""
        return self._places[name]

    @contextmanager
    def writing(self, name: str) -> Iterator[Writer]:
        """Give a writer that writes a tensor in its place.

        Raises:
            NoRoom: the disk is full.
        """
        with self._blobs.writing_at(self._places[name]) as writer:
            yield writer
        self._digests[name] = writer.digest

    def nbytes(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Return the bytes of those of the tensors that lie in their places."""
        written = sum(self._places[name].length for name in tuple(self._digests))
        if not self.goes_on:
            return written
        earlier = (name for name, tensor in tensors if self._was_written(name, tensor))
        return written + sum(self._places[name].length for name in earlier)

    def note_written(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take note of those of the tensors that lie in their places by now."""
        new = {name: tensor.digest for name, tensor in tensors if self._was_written(name, tensor)}
        self._digests |= new

    def _was_written(self, name: str, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in its place that was not written by ``writing``."""
        if name in self._digests:
            return False
        try:
            parts = self._blobs.locate(tensor.digest, tensor.nbytes)
        except BlobLost:
            return False
        return parts == [self._places[name].part]

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

    def __init__(self, blobs: Blobs, packs: Callable[[str], bool], records: Path) -> None:
        """Begin with none.

        Args:
            blobs: the cache's.
            packs: tells whether the run means to pack a target.
            records: the folder that says which of them a run has begun, that another one can go on
                with: those of targets whose checkpoint passes, since the disk may have no room for
                more than one.
        """
        self._blobs = blobs
        self.packs = packs
        self._records = records
        self._lock = threading.Lock()
        self._drafts: dict[str, WeightFileDraft | None] = {}

    def begin(
        self, plan: Plan, is_made: Callable[[Node], bool], *, passes: bool
    ) -> WeightFileDraft | None:
        """Return a target's draft, begun unless it is already.

        There is none where the target is not packed, or most of it is on record here: a whole file
        would be kept for a few of its tensors.

        Args:
            plan: the target.
            is_made: tells whether a node is made in this run.
            passes: whether its checkpoint does.

        Raises:
            NoRoom: the disk cannot take it.
        """
        target = plan.target.name
        if not self.packs(target):
            return None
        with self._lock:
            if target not in self._drafts:
                in_place = bundle.writes_in_place(plan, is_made, passes=passes)
                self._drafts[target] = self._begun(plan, passes=passes) if in_place else None
            return self._there(target)

    def _begun(self, plan: Plan, *, passes: bool) -> WeightFileDraft:
        if not passes:
            return WeightFileDraft(self._blobs, plan)
        target = plan.target.name
        draft = WeightFileDraft(self._blobs, plan, self._read(target))
        begun = Begun(draft.specs_digest, {file: path.name for file, path in draft.paths.items()})
        atomic.write(self._record(target), seal(target, msgspec.structs.asdict(begun)))
        return draft

    def left_of(self, plan: Plan) -> int:
        """Return the bytes of the disk that a target's files take that a run has begun."""
        begun = self._read(plan.target.name)
        specs = bundle.specs_digest(bundle.split(plan, bundle.specs(plan)))
        if begun is None or begun.specs != specs:
            return 0
        paths = map(self._blobs.container, begun.files.values())
        return sum(512 * path.stat().st_blocks for path in paths)

    def _read(self, target: str) -> Begun | None:
        """Return what an earlier run has begun of a target, if it is still there."""
        try:
            begun = unseal(target, self._record(target).read_bytes(), Begun)
        except (FileNotFoundError, Damaged):
            return None
        return begun if all(map(self._blobs.has_container, begun.files.values())) else None

    def _record(self, target: str) -> Path:
        return self._records / f"{target}.json"

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
        """Let nothing more be written into the draft of a target, by this run or another."""
        with self._lock:
            self._drafts[target] = None
            self._record(target).unlink(missing_ok=True)

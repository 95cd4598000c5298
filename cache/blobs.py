"""blobs: bytes under their digest.

A blob is a file of its own, or a *reference*: runs of bytes in files that the store does not
own (a tensor in a checkpoint), that other blobs own (experts stacked one after another), or that
hold many blobs (*containers*), so that nothing is copied that already lies on the disk.

```
blobs/ab/cdef…        the bytes
blobs/ab/cdef….parts  or where they lie: [[path, offset, length, size, mtime_ns, inode], …], sealed
                      under abcdef…, the path relative to blobs/ if it is below
blobs/packs/…         many blobs, each where it belongs in a weight file
```
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate, groupby, repeat
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple, cast

import msgspec
import xxhash

from cache.digest import CHUNK_BYTES, digest_file, digest_parts
from cache.errors import BlobLost, FileChanged, naming
from cache.files import atomic, space
from cache.files.begun import Begun
from cache.files.stamp import Stamp
from cache.records.sealed import Damaged, Unsealed, seal, unseal

CONTAINERS = "packs"  # its name on disk
MOST_REMEMBERED = 4096  # references
_Parts = list[
    list[str | int]
]  # path, offset, length, and the file's stamp if it is not the store's


class Part(NamedTuple):
    """One run of bytes in a file.

    Attributes:
        path: absolute path of the file.
        offset: first byte.
        length: bytes.
        stamp: the file's, when the run was digested; None for a file of the store's, in which no
            byte changes once it is written.
    """

    path: str
    offset: int
    length: int
    stamp: Stamp | None

    def check(self, descriptor: int) -> None:
        """Make sure, after reading, that what was read is what was found.

        Raises:
            FileChanged: the file was written to.
        """
        if self.stamp and Stamp.of(descriptor).is_changed(self.stamp):
            raise FileChanged(self.path)


class Meter(threading.local):
    """Bytes this thread has read and written through the store."""

    read = 0
    written = 0


class Place(NamedTuple):
    """Where a blob belongs in a container.

    Attributes:
        container: the file's path.
        offset: first byte.
        length: bytes.
    """

    container: Path
    offset: int
    length: int

    @property
    def part(self) -> Part:
        """The blob, once it is written."""
        return Part(str(self.container), self.offset, self.length, None)


class Writer:
    """Takes a blob's bytes, in order; without a file it only digests them."""

    def __init__(self, file: IO[bytes] | None, offset: int = 0) -> None:
        self._file = file
        self._offset = offset
        self._state = xxhash.xxh3_128()
        self.length = 0

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        self._state.update(data)
        if self._file:
            atomic.write_all(self._file, data, self._offset + self.length)
        self.length += data.nbytes

    @property
    def digest(self) -> str:
        """The digest of what was written so far."""
        return self._state.hexdigest()


class Blobs:
    """The blobs under ``root``; if ``read_only``, what is found or used is not noted down."""

    def __init__(self, root: Path, *, read_only: bool = False) -> None:
        self.root = root
        self._read_only = read_only
        self._dropping = threading.Lock()
        self._begun = Begun(root / CONTAINERS)
        # References as they were read last, which is believed as long as they have these stamps.
        self._references: dict[str, tuple[Stamp, list[Part]]] = {}
        self.meter = Meter()

    def path(self, digest: str) -> Path:
        """Return where the bytes of ``digest`` lie if the store owns them."""
        return Path(self._file(digest))

    def _file(self, digest: str) -> str:
        """As ``path``, a text: a build asks some hundred times, and a Path takes its time."""
        return f"{self.root}/{digest[:2]}/{digest[2:]}"

    def locate(self, digest: str, length: int) -> list[Part]:
        """Return the runs of bytes that make up ``digest``, in order.

        Args:
            digest: the blob.
            length: its size in bytes. A file of another size was cut short and is no blob.

        Raises:
            BlobLost: it is nowhere, or the file it was a part of has changed.
        """
        path = self._file(digest)
        try:
            stamp = Stamp.of(path)
        except FileNotFoundError:
            return self._locate_reference(digest, length)
        if stamp.size == length:
            self._touch(path, stamp)
            return [Part(path, 0, length, None)]
        if self.reference_path(digest).exists():
            return self._locate_reference(digest, length)
        raise BlobLost(digest, f"{path} has {stamp.size} bytes, expected {length}")

    def reference(self, path: Path) -> list[Part]:
        """Read a reference, as it was written.

        Raises:
            FileNotFoundError: there is none.
            Damaged: it is not what was written.
        """
        return self._read_reference(path.parent.name + path.stem, path)[0]

    def _read_reference(self, digest: str, path: Path | str) -> tuple[list[Part], bool]:
        """Return a reference's parts, and whether it is sealed: older versions sealed none."""
        with open(path, "rb", buffering=0) as file:
            data = file.read()
        try:
            return self._parts(unseal(digest, data, _Parts)), True
        except Unsealed:
            try:
                return self._parts(msgspec.json.decode(data, type=_Parts)), False
            except (msgspec.DecodeError, RecursionError) as error:
                raise Damaged(f"it is no reference: {error}") from error

    def _parts(self, record: _Parts) -> list[Part]:
        parts = []
        for run in record:
            path, *numbers = run or [0]
            whole = all(isinstance(number, int) and number >= 0 for number in numbers)
            if not isinstance(path, str) or "\0" in path or not whole or len(numbers) not in (2, 5):
                raise Damaged("it names what no file can have")
            offset, length, *stamp = cast("list[int]", numbers)
            where = os.path.join(self.root, path)
            parts.append(Part(where, offset, length, Stamp(*stamp) if stamp else None))
        return parts

    def drop_if_wrong(self, digest: str) -> None:
        """Read a blob again, and forget where it lies if it is not what its name says."""
        # One thread at a time: another may find the same, and this one make it again meanwhile.
        with self._dropping:
            path = self.path(digest)
            if path.exists():
                if digest_file(path) != digest:
                    path.unlink()
                return
            path = self.reference_path(digest)
            with suppress(FileNotFoundError, Damaged, FileChanged):  # `locate` notices these
                if digest_parts(self.chunks(self.reference(path))) != digest:
                    path.unlink()

    def has(self, digest: str, length: int) -> bool:
        """Tell whether ``locate`` finds the blob."""
        try:
            self.locate(digest, length)
        except BlobLost:
            return False
        return True

    @contextmanager
    def writing(self, length: int = 0) -> Iterator[Writer]:
        """Give a writer whose bytes become a blob when the block ends well.

        Args:
            length: how many bytes it will be, if known.

        Raises:
            NoRoom: the disk is full.
        """
        with atomic.temporary(self.root, length) as new:
            writer = Writer(new.file)
            yield writer
            self.meter.written += writer.length
            if not self.has(writer.digest, writer.length):
                new.rename(self.path(writer.digest))

    def write_together(
        self,
        wanted: Mapping[str, int],
        pieces: Iterable[memoryview],
        places: Mapping[str, Place] = MappingProxyType({}),
    ) -> list[str]:
        """Write blobs that come one after another, those that are not here.

        What is here already is not written again: no byte of a blob ever changes, whatever comes.

        Args:
            wanted: the sizes in bytes of all that come, by digest, in order.
            pieces: their bytes. None of them is a blob before the last has come.
            places: where each belongs; unless all that is not here has one of its size, it lies
                one after another in a container of its own.

        Returns:
            The digests of those that did not come: other bytes did in their place.

        Raises:
            FileNotFoundError: there is no such container.
            NoRoom: the disk is full.
        """
        lost = {digest: size for digest, size in wanted.items() if not self.has(digest, size)}
        there = {each: place for each in lost if (place := places.get(each))}
        own = None
        # By what is known here: of a blob's size, too, who sends it may say anything.
        if {each: place.length for each, place in there.items()} != lost:
            (own,) = self.new_containers(1, sum(lost.values()))
            starts = accumulate(lost.values(), initial=0)
            there = {
                each: Place(own, start, size)
                for (each, size), start in zip(lost.items(), starts, strict=False)
            }
        try:
            wrong = self._write_together(wanted, pieces, there)
        except BaseException:
            self._drop(own)
            raise
        self.meter.written += sum(lost.values())
        new = {d: p for d, p in there.items() if d not in wrong and not self.has(d, p.length)}
        for container in {place.container for place in new.values()}:
            self._begun.keep(container)
        for digest, place in new.items():
            self.refer(digest, [place.part])
        if not new:
            self._drop(own)
        return wrong

    def _write_together(
        self, wanted: Mapping[str, int], pieces: Iterable[memoryview], places: Mapping[str, Place]
    ) -> list[str]:
        """Write what has a place; return the digests of those of which other bytes came."""
        with ExitStack() as stack:
            need = sum(place.length for place in places.values())
            stack.enter_context(space.enospc_as_no_room(self.root, need))
            files = {
                path: stack.enter_context(path.open("r+b", buffering=0))
                for path in {place.container for place in places.values()}
            }
            writers = [
                Writer(files[place.container], place.offset) if place else Writer(None)
                for place in map(places.get, wanted)
            ]
            _share_out(pieces, writers, [*wanted.values()])
        return [d for d, writer in zip(wanted, writers, strict=True) if writer.digest != d]

    def _drop(self, container: Path | None) -> None:
        if container:
            container.unlink(missing_ok=True)
            self._begun.keep(container)

    @contextmanager
    def writing_at(self, place: Place) -> Iterator[Writer]:
        """Give a writer whose bytes become a blob where they lie, if the block ends well.

        Raises:
            FileNotFoundError: there is no such container.
            NoRoom: the disk is full.
        """
        with (
            space.enospc_as_no_room(self.root, place.length),
            place.container.open("r+b", buffering=0) as file,
        ):
            writer = Writer(file, place.offset)
            yield writer
        self.meter.written += writer.length
        if not self.has(writer.digest, writer.length):
            self._begun.keep(place.container)
            self.refer(writer.digest, [place.part])

    def new_containers(self, count: int, need: int) -> list[Path]:
        """Return the paths of files for many blobs, empty: gone with this process if none comes.

        Args:
            count: how many.
            need: bytes of all blobs together.

        Raises:
            NoRoom: the disk cannot take them.
        """
        folder = self.root / CONTAINERS
        folder.mkdir(parents=True, exist_ok=True)
        space.require_free(folder, need)
        paths = [folder / uuid.uuid4().hex for _ in range(count)]
        for path in paths:
            self._begun.begin(path)
        return paths

    def container(self, name: str) -> Path:
        """Return the path of a container."""
        return self.root / CONTAINERS / name

    def has_container(self, name: str) -> bool:
        """Tell whether there is such a container."""
        return re.fullmatch("[0-9a-f]{32}", name) is not None and self.container(name).is_file()

    def note_whole(self, container: Path, digest: str, length: int) -> None:
        """Note that a whole container is a blob; nothing is written into it any more."""
        self._begun.keep(container)
        self.refer(digest, [Part(str(container), 0, length, None)])

    def whole_container(self, digest: str, length: int) -> Path | None:
        """Return the container that is, as a whole, the blob ``digest``, if there is one."""
        try:
            (part, *more) = self.locate(digest, length)
            path = Path(part.path)
            whole = not more and path.parent == self.root / CONTAINERS
            return path if whole and path.stat().st_size == length else None
        except (BlobLost, FileNotFoundError):
            return None

    @contextmanager
    def scratch(self, need: int) -> Iterator[Path]:
        """Give a folder beside the blobs for files that may become blobs; it goes afterwards.

        Args:
            need: bytes that will be written there.

        Raises:
            NoRoom: there is less free.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        space.require_free(self.root, need)
        with tempfile.TemporaryDirectory(prefix=atomic.own_prefix(), dir=self.root) as folder:
            yield Path(folder)

    def adopt(self, path: Path) -> str:
        """Make a file of the scratch folder a blob, and return its digest."""
        length = path.stat().st_size
        digest = digest_file(path)
        self.path(digest).parent.mkdir(parents=True, exist_ok=True)
        path.replace(self.path(digest))
        self.meter.written += length
        return digest

    def refer(self, digest: str, parts: Sequence[Part]) -> None:
        """Keep where ``digest`` lies, unless the store holds the bytes themselves.

        Of several places in the same files, not of the store, the first is kept: checkpoints have
        many tensors of the same bytes, and to replace a file takes longer than to read it.
        """
        if self._read_only:
            return
        length = sum(part.length for part in parts)
        try:
            is_here = os.stat(self._file(digest)).st_size == length
        except FileNotFoundError:
            is_here = False
        if not is_here and not self._refers(digest, parts):
            record = [[self._relative(p.path), p.offset, p.length, *(p.stamp or ())] for p in parts]
            self._references.pop(digest, None)
            atomic.write(self.reference_path(digest), seal(digest, record))

    def _refers(self, digest: str, parts: Sequence[Part]) -> bool:
        """Tell whether a reference to as many bytes of the same files is there; it is used then."""
        if not all(part.stamp for part in parts):
            return False
        reference = self._reference_file(digest)
        try:
            old, sealed = self._read_reference(digest, reference)
            same = sealed and _extent(old) == _extent(parts)
            if same:
                self._touch(reference, Stamp.of(reference))
            return same
        except (FileNotFoundError, Damaged):
            return False

    def read_into(self, parts: Sequence[Part], buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of ``parts``, one after another.

        Raises:
            FileChanged: a file is not, or no longer, the one that the part was found in.
        """
        start = 0
        for (path, stamp), run in groupby(parts, key=lambda part: (part.path, part.stamp)):
            with naming(path), _opened(path, stamp) as file:
                for part in run:
                    self.fill(file.fileno(), part, buffer[start : start + part.length])
                    start += part.length
                part.check(file.fileno())
        self.meter.read += start

    @staticmethod
    def fill(descriptor: int, part: Part, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of ``part``, whose file is open.

        Raises:
            FileChanged: the file is too short.
        """
        done = 0
        while done < part.length:  # one call reads 2 GiB at most
            count = os.preadv(descriptor, [buffer[done:]], part.offset + done)
            if not count:
                raise FileChanged(part.path)
            done += count

    def chunks(
        self, parts: Sequence[Part], buffers: Iterator[memoryview] | None = None
    ) -> Iterator[memoryview]:
        """Yield the bytes of ``parts`` in pieces.

        Args:
            parts: the runs of bytes.
            buffers: what to read them into, ``CHUNK_BYTES`` each. By default always the same one,
                so that each piece is valid until the next is asked for.
        """
        if buffers is None:
            longest = max((part.length for part in parts), default=0)
            buffers = repeat(memoryview(bytearray(min(CHUNK_BYTES, longest))))
        for part in parts:
            with naming(part.path), _opened(part.path, part.stamp) as file:
                for start in range(0, part.length, CHUNK_BYTES):
                    length = min(CHUNK_BYTES, part.length - start)
                    piece = part._replace(offset=part.offset + start, length=length)
                    buffer = next(buffers)
                    self.fill(file.fileno(), piece, buffer[:length])
                    piece.check(file.fileno())
                    self.meter.read += length
                    yield buffer[:length]

    def digest_each(self, parts: Iterable[Part]) -> Iterator[str]:
        """Yield the digest of each run of bytes; a file is opened once for those that follow.

        Raises:
            FileChanged: a file is not, or no longer, the one that the part was found in.
        """
        buffer = memoryview(bytearray(0))
        for (path, stamp), run in groupby(parts, key=lambda part: (part.path, part.stamp)):
            with naming(path), _opened(path, stamp) as file:
                for part in run:
                    size = min(CHUNK_BYTES, part.length)
                    buffer = buffer if len(buffer) >= size else memoryview(bytearray(size))
                    yield digest_parts(self._read_chunks(file.fileno(), part, buffer))

    def _read_chunks(self, descriptor: int, part: Part, buffer: memoryview) -> Iterator[memoryview]:
        for start in range(0, part.length, CHUNK_BYTES):
            length = min(CHUNK_BYTES, part.length - start)
            piece = part._replace(offset=part.offset + start, length=length)
            self.fill(descriptor, piece, buffer[:length])
            part.check(descriptor)
            self.meter.read += length
            yield buffer[:length]

    def reference_path(self, digest: str) -> Path:
        """Return where it is written where the bytes of ``digest`` lie."""
        return Path(self._reference_file(digest))

    def _reference_file(self, digest: str) -> str:
        return f"{self._file(digest)}.parts"

    def _locate_reference(self, digest: str, length: int) -> list[Part]:
        reference = self._reference_file(digest)
        try:
            written = Stamp.of(reference)
            parts, sealed = self._remembered(digest, reference, written)
        except FileNotFoundError:
            raise BlobLost(digest, "not in the store") from None
        except Damaged as error:
            raise BlobLost(digest, f"{reference} is corrupt ({error})") from error
        if sum(part.length for part in parts) != length:
            raise BlobLost(digest, f"{reference} has not {length} bytes")
        stamps: dict[str, Stamp] = {}
        for path in dict.fromkeys(part.path for part in parts):
            try:
                stamps[path] = Stamp.of(path)
            except OSError as error:
                raise BlobLost(digest, f"{path}: {error.strerror}") from error
        now = [p._replace(stamp=p.stamp and stamps[p.path]) for p in parts]
        short = any(p.offset + p.length > stamps[p.path].size for p in now)
        if now != parts or short or not (sealed or self._read_only):
            # A copied or touched file may still hold the same bytes, so look before giving up; and
            # what an older version wrote is looked at once, and sealed.
            if short or digest != digest_parts(self.chunks(now)):
                raise BlobLost(digest, f"{', '.join(stamps)} changed since it was read")
            self.refer(digest, now)
        else:
            self._touch(reference, written)
        return now

    def _remembered(self, digest: str, path: str, written: Stamp) -> tuple[list[Part], bool]:
        """As ``_read_reference``: a mixture of experts asks for the same thousands again and again.

        Args:
            digest: the blob.
            path: the reference.
            written: its stamp, from before it is read.
        """
        known = self._references.get(digest)
        if known and known[0] == written:
            return known[1], True
        parts, sealed = self._read_reference(digest, path)
        if sealed:
            if len(self._references) >= MOST_REMEMBERED:
                self._references.clear()
            self._references[digest] = written, parts
        return parts, sealed

    def _relative(self, path: str) -> str:
        """Return a path as references name it: relative if it is the store's, which may move."""
        return path.removeprefix(f"{self.root}{os.sep}")

    def _touch(self, path: str, stamp: Stamp) -> None:
        if not self._read_only:
            atomic.touch(path, stamp.mtime_ns)


def _opened(path: str, stamp: Stamp | None) -> IO[bytes]:
    """Open a file to read it.

    Raises:
        FileChanged: it was the store's, and another process has dropped it since it was found.
    """
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError as error:
        if stamp is None:
            raise FileChanged(path) from error
        raise


def _share_out(
    pieces: Iterable[memoryview], writers: Sequence[Writer], sizes: Sequence[int]
) -> None:
    """Give each writer as many bytes as it takes, in order."""
    left = deque(zip(writers, sizes, strict=True))
    for piece in pieces:
        while piece.nbytes:
            writer, size = left[0]
            part = piece[: size - writer.length]
            writer.write(part)
            piece = piece[part.nbytes :]
            if writer.length == size:
                left.popleft()


def _extent(parts: Sequence[Part]) -> tuple[int, set[tuple[str, Stamp | None]]]:
    """Return how many bytes there are together, and of which files, as they were then."""
    return sum(part.length for part in parts), {(part.path, part.stamp) for part in parts}

"""remote: a store that several machines share, read through and written behind.

```
blobs/ab/cdef…              bytes under their BLAKE3
records/KIND/ab/cdef….json  records (see ``signing``) under a key
```
Whoever can write there can write anything, so nothing is used before it is checked: a blob
against its name, a record against its signature, where a signing key is set. A remote is never
needed: one that does not work is reported once, and is then as good as empty.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from cache.errors import Mismatch, NotFetched, Refused
from cache.remote import content
from cache.remote.faults import Absent, Fault, NoRanges, WrongSize
from cache.remote.retrying import GivenUp, Retrying
from cache.remote.signing import check_signature, sign
from cache.remote.transport import PARALLEL, PIECE_BYTES, Transport

if TYPE_CHECKING:
    from typing_extensions import Buffer

READERS = 6  # requests for pieces under way at once, of all blobs together
WRITERS = 2  # blobs being pushed at once, each in PARALLEL pieces
MAX_RECORD_BYTES = 16 << 20  # of 100,000 tensors

_T = TypeVar("_T")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        objects: blobs and records.
        bytes: theirs.
        seconds: that ``finish`` waited for.
    """

    objects: int
    bytes: int
    seconds: float


class Remote:
    """The remote store at a URL. Safe in threads; opened when it is first used.

    Args:
        url: ``s3://bucket/prefix``, ``gs://…``, ``az://…``, ``https://host/path``, ``http://…`` or
            ``file:///path``.
        warn: takes what people should know: one line when the remote, or writing to it, is given
            up, and one when a record is refused.
        read_only: nothing is ever written.
        secret: signs records, and those without its signature are refused.
        timeout: seconds for which a server may send nothing.
        patience: seconds for which a request that failed is repeated.

    Raises:
        BadRemote: the URL can never work.
    """

    def __init__(
        self,
        url: str,
        *,
        warn: Callable[[str], None],
        read_only: bool = False,
        secret: bytes | None = None,
        timeout: float = 30,
        patience: float = 30,
    ) -> None:
        self._requests = Retrying(
            url, warn, read_only=read_only, timeout=timeout, patience=patience
        )
        self.name = self._requests.name
        self._warn = warn
        self._secret = secret
        self._lock = threading.Lock()
        self._refused = False
        self._damaged = 0
        self._fetched_bytes = self._pushed_objects = self._pushed_bytes = 0
        self._readers = ThreadPoolExecutor(READERS, "remote-read")
        self._writers = ThreadPoolExecutor(WRITERS, "remote-write")
        self._jobs: list[Future[None]] = []

    @property
    def readable(self) -> bool:
        """Whether anything can be had from it."""
        return self._requests.readable

    @property
    def writable(self) -> bool:
        """Whether anything can be put there."""
        return self._requests.writable

    @property
    def fetched_bytes(self) -> int:
        """Bytes of blobs and records had from it so far."""
        return self._fetched_bytes

    def record(self, kind: str, key: str) -> Any | None:
        """Return the record of ``kind`` under ``key``, or None if there is none to be used."""
        path = _record_path(kind, key)
        try:
            data = self._requests.attempt(f"get {path}", lambda it: it.get(path, MAX_RECORD_BYTES))
            self._count(fetched=len(data))
            return check_signature(kind, key, data, self._secret)
        except (Absent, GivenUp):
            return None
        except WrongSize:
            self.refuse(Refused(f"{kind}/{key}", f"it has more than {MAX_RECORD_BYTES:,} bytes"))
        except Refused as error:
            self.refuse(error)
        return None

    def refuse(self, error: Refused) -> None:
        """Report a record that is not used; the first of them."""
        with self._lock:
            first, self._refused = not self._refused, True
        if first:
            check = "the signing key that is set here, and " if self._secret else ""
            self._warn(
                f"remote {self.name}: {error}. It is not used, and what it is of is made here; "
                f"others like it are passed over without another word. Check {check}who can "
                "write there."
            )

    def report_damage(self, error: Mismatch) -> None:
        """Report bytes that are not used: the first of them, and by ``close`` how many there were.

        Args:
            error: what is wrong with them.
        """
        with self._lock:
            self._damaged += 1
            first = self._damaged == 1
        if first:
            what = "put there anew" if self.writable else "stays as it is there (read-only)"
            self._warn(
                f"remote {self.name}: damaged: {error}. It is not used: what is wanted of it is "
                f"made here, if that can be, and {what}; others like it are counted."
            )

    def put_record(self, kind: str, key: str, record: Any, *, ask_first: bool = False) -> None:
        """Put a record (JSON), after the blobs that it names: whoever finds it relies on them.

        Args:
            kind: its kind.
            key: its key.
            record: the record.
            ask_first: ask whether the very same is there.
        """
        if not self.writable:
            return
        path = _record_path(kind, key)
        data = sign(kind, key, record, self._secret)
        if ask_first:
            with suppress(Absent, WrongSize, GivenUp):
                there = self._requests.attempt(f"get {path}", lambda it: it.get(path, len(data)))
                self._count(fetched=len(there))
                if there == data:
                    return
        try:
            self._requests.attempt(f"put {path}", lambda it: it.put(path, data), writes=True)
        except GivenUp:
            return
        self._count(objects=1, pushed=len(data))

    def has(self, blake3: str, length: int) -> bool:
        """Tell whether there is a blob of that name and length."""
        path = _blob_path(blake3)
        try:
            return self._requests.attempt(f"look for {path}", lambda it: it.size(path)) == length
        except GivenUp:
            return False

    def fetch(self, blake3: str, length: int) -> Iterator[memoryview]:
        """Yield the bytes of a blob, in pieces.

        They are checked as a whole: what was yielded may be used when the iterator ends, and not
        if it raises. ``PARALLEL`` pieces of ``PIECE_BYTES`` are held, beside the one yielded.

        Raises:
            NotFetched: it is not there, or the remote is given up.
            Mismatch: what lies under its name is something else.
        """
        state = content.hasher()
        count = 0
        for piece in self._pieces(blake3, length):
            state.update(piece)
            count += piece.nbytes
            self._count(fetched=piece.nbytes)
            if count > length:
                break
            yield piece
        content.check(blake3, length, count, state)

    def push(
        self, blake3: str, length: int, chunks: Iterable[Buffer], *, replace: bool = False
    ) -> bool:
        """Upload a blob, unless it is there, and return whether that was done.

        Args:
            blake3: its name.
            length: bytes.
            chunks: its bytes; iterated again if an upload has to be repeated.
            replace: also if a blob of that name and length is there, since it is corrupt.

        Raises:
            Mismatch: ``chunks`` are not the blob's bytes. Nothing was put.
        """
        if not self.writable or (not replace and self.has(blake3, length)):
            return False
        path = _blob_path(blake3)

        def upload(it: Transport) -> None:
            verified = content.verified(blake3, length, chunks)
            if length <= PIECE_BYTES:
                it.put(path, b"".join(verified))
            else:
                it.stream(path, length, verified)

        try:
            self._requests.attempt(f"put {path}", upload, writes=True)
        except GivenUp:
            return False
        self._count(objects=1, pushed=length)
        return True

    def later(self, job: Callable[[], object]) -> Future[None] | None:
        """Have ``job``, which pushes something, run by and by in another thread.

        Jobs begin in the order in which they come. None: nothing is written.
        """
        if not self.writable:
            return None
        self._jobs.append(self._writers.submit(self._run, job))
        return self._jobs[-1]

    def finish(self) -> Pushed:
        """Wait for all that is to be done later, and return what was pushed since the opening.

        A job's own error comes out here, when the others are done.
        """
        begin = time.monotonic()
        jobs, self._jobs = self._jobs, []
        wait(jobs)
        errors = [error for job in jobs if not job.cancelled() and (error := job.exception())]
        if errors:
            raise errors[0]
        return Pushed(self._pushed_objects, self._pushed_bytes, time.monotonic() - begin)

    def close(self) -> None:
        """Stop: what is queued is dropped, what is under way ends at its next request."""
        with self._lock:
            damaged, self._damaged = self._damaged, 0
        if damaged > 1:
            self._warn(f"remote {self.name}: {damaged:,} blobs in all are damaged there, not used")
        self._requests.stop()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._writers.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Callable[[], object]) -> None:
        if self.writable:
            job()

    def _pieces(self, blake3: str, length: int) -> Iterator[memoryview]:
        """Yield a blob's bytes, not checked.

        Raises:
            NotFetched: as ``fetch``.
            Mismatch: it has another length.
        """
        path = _blob_path(blake3)
        try:
            if length == 0:
                return
            if self._requests.attempt("open it", lambda it: it.ranges, asks=False):
                try:
                    yield from self._in_ranges(path, blake3, length)
                except NoRanges:  # it said so before anything was yielded
                    yield from self._whole(path)
            else:
                yield from self._whole(path)
        except WrongSize:
            raise Mismatch(blake3, f"it has fewer than {length:,} bytes there") from None
        except Absent:
            raise NotFetched(blake3, f"it is not in {self.name}") from None
        except GivenUp:
            raise NotFetched(blake3, f"{self.name} is given up") from None

    def _in_ranges(self, path: str, blake3: str, length: int) -> Iterator[memoryview]:
        """Yield a blob's bytes, fetched a few pieces ahead."""
        starts = iter(range(0, length, PIECE_BYTES))
        ahead: deque[Future[tuple[memoryview, int]]] = deque()

        def request(start: int) -> None:
            stop = min(start + PIECE_BYTES, length)
            ahead.append(self._read(path, lambda it: it.piece(path, start, stop)))

        try:
            for start in islice(starts, PARALLEL):
                request(start)
            while ahead:
                piece, size = ahead.popleft().result()
                if size != length:
                    raise Mismatch(blake3, f"it has {size:,} bytes there, expected {length:,}")
                yield piece
                del piece  # let go of it before the next is asked for
                if (following := next(starts, None)) is not None:
                    request(following)
        finally:
            for call in ahead:
                call.cancel()

    def _whole(self, path: str) -> Iterator[memoryview]:
        """Yield an object's bytes from a server that sends whole objects only, one piece ahead."""
        stream = _Stream(path)
        ahead = self._read(path, stream.next)
        while (piece := ahead.result()) is not None:
            ahead = self._read(path, stream.next)
            yield piece

    def _read(self, path: str, call: Callable[[Transport], _T]) -> Future[_T]:
        try:
            return self._readers.submit(self._requests.attempt, f"get {path}", call)
        except RuntimeError as error:  # closed
            raise GivenUp from error

    def _count(self, *, fetched: int = 0, objects: int = 0, pushed: int = 0) -> None:
        with self._lock:
            self._fetched_bytes += fetched
            self._pushed_objects += objects
            self._pushed_bytes += pushed


class _Stream:
    """An object read from its beginning; after a fault, from there again, past what was had."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._had = 0
        self._skip = 0
        self._pieces: Iterator[memoryview] | None = None

    def next(self, it: Transport) -> memoryview | None:
        """Return the next piece, or None at the end."""
        if self._pieces is None:
            self._pieces, self._skip = it.whole(self._path), self._had
        try:
            for piece in self._pieces:
                rest = piece[self._skip :]
                self._skip -= piece.nbytes - rest.nbytes
                self._had += rest.nbytes
                if rest:
                    return rest
        except Fault:
            self._pieces = None
            raise
        return None


def _blob_path(blake3: str) -> str:
    return f"blobs/{blake3[:2]}/{blake3[2:]}"


def _record_path(kind: str, key: str) -> str:
    return f"records/{kind}/{key[:2]}/{key[2:]}.json"

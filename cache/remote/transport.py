"""transport: objects under a URL, by obstore; what goes wrong is one of ``faults``.

Nothing here repeats a request, except that obstore repeats the parts of a multipart upload,
which nobody else can. A server may be silent for ``timeout`` seconds, and for ``FIRST_SECONDS``
until it has answered once; what it sends must come at ``LEAST_RATE``. So none holds a build up for
long, and a slow line has its time. No more is read than was asked for.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cache.remote import faults
from cache.remote.credentials import aws_profile, aws_unsigned
from cache.remote.faults import Absent, Fault, NoRanges, WrongSize

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

PIECE_BYTES = 12 << 20  # S3 takes 10,000 parts: blobs of 120 GB
FILE_CHUNK = 1 << 20  # bytes of a file that are read at once, which never is slow to come
PARALLEL = 3  # pieces of one blob under way at once
CONNECT_SECONDS = 5
FIRST_SECONDS = 2  # a server that never answered is not waited for longer
LEAST_RATE = 16 << 10  # bytes a second, of what one request is waited for longer than ``timeout``
PART_SECONDS = 3  # for which a part of a multipart upload is repeated


class Transport:
    """Objects in a bucket or folder. All methods are safe in threads.

    Besides what is named, every method raises:
        Fault: the request failed.

    Attributes:
        ranges: the server has them, as far as it is known.
        answered: the server was reached.
    """

    ranges = True
    answered = False

    def __init__(self, url: str, *, timeout: float, create: bool) -> None:
        from obstore.exceptions import BaseError  # 0.1 s and 30 MB: only where a remote is used

        self._errors = (BaseError, OSError, ValueError, NotImplementedError)
        self._scheme = urlsplit(url).scheme
        self._timeout = timeout
        try:
            self._first_store = self._open(url, min(timeout, FIRST_SECONDS), create=create)
            self._reading_store = self._open(url, timeout, create=create)
            # Nothing is sent back while a piece is on its way.
            self._writing_store = self._open(url, 2 * timeout, create=create)
            self._parts_store = self._open(url, 2 * timeout, create=create, blobs=True)
        except self._errors as error:
            raise faults.of_error(error, self._scheme, self._silence) from error

    @property
    def _silence(self) -> float:
        """Seconds for which the server may be silent while it is read."""
        return self._timeout if self.answered else min(self._timeout, FIRST_SECONDS)

    @property
    def _store(self) -> ObjectStore:
        return self._reading_store if self.answered else self._first_store

    def _open(self, url: str, silence: float, *, create: bool, blobs: bool = False) -> ObjectStore:
        """Open the store; a server may be silent for ``silence`` seconds.

        Of ``blobs``, whose bytes their names vouch for, parts are put, which obstore repeats.
        """
        from obstore.store import from_url

        if self._scheme == "file":
            return from_url(url, mkdir=create)
        client: ClientConfig = {
            "allow_http": True,  # of an endpoint that is spelled http://
            "timeout": timedelta(days=1),
            "read_timeout": timedelta(seconds=silence),
            "connect_timeout": timedelta(seconds=min(silence, CONNECT_SECONDS)),
        }
        retry: RetryConfig = {
            "max_retries": 10 if blobs else 0,
            "retry_timeout": timedelta(seconds=PART_SECONDS),
        }
        return self._open_remote(url, client, retry, blobs=blobs)

    def _open_remote(
        self, url: str, client: ClientConfig, retry: RetryConfig, *, blobs: bool
    ) -> ObjectStore:
        from obstore.store import from_url

        config: Any = aws_profile() if self._scheme == "s3" else {}
        if self._scheme == "s3" and aws_unsigned(config, blobs=blobs):
            config["unsigned_payload"] = True
        return from_url(url, config=config, client_options=client, retry_config=retry)

    def get(self, path: str, limit: int) -> bytes:
        """Return a small object.

        Raises:
            Absent: it is not there.
            WrongSize: it has more than ``limit`` bytes.
        """
        import obstore

        try:
            result = obstore.get(self._store, path)
            if result.meta["size"] > limit:
                raise WrongSize
            return bytes(self._received(result, result.meta["size"]))
        except self._errors as error:
            raise self._outcome(error) from error

    def piece(self, path: str, start: int, stop: int) -> tuple[memoryview, int]:
        """Return a range of an object's bytes, and how many the whole object has.

        Raises:
            Absent: the object is not there.
            WrongSize: it has no byte ``start``.
            NoRanges: the server has no ranges; ``whole`` reads the object.
        """
        import obstore

        try:
            result = obstore.get(self._store, path, options={"range": (start, stop)})
            size = result.meta["size"]
            return self._received(result, max(0, min(stop, size) - start)), size
        except self._errors as error:
            raise self._outcome(error) from error

    def whole(self, path: str) -> Iterator[memoryview]:
        """Yield an object's bytes, where the server has no ranges.

        Raises:
            Absent: it is not there.
        """
        import obstore

        try:
            piece = bytearray()
            for chunk in self._chunks(obstore.get(self._store, path)):
                piece += chunk
                if len(piece) >= PIECE_BYTES:
                    yield memoryview(piece)
                    piece = bytearray()
            if piece:
                yield memoryview(piece)
        except self._errors as error:
            raise self._outcome(error) from error

    def _received(self, result: GetResult, most: int) -> memoryview:
        """Return what a server sends, and of more than is wanted nothing."""
        # Not of the heap, of which each thread keeps what was let go of: 170 MB, not 50.
        data = memoryview(mmap.mmap(-1, most)) if most else memoryview(bytearray())
        count = 0
        for chunk in self._chunks(result):
            length = min(len(chunk), most - count)
            data[count : count + length] = chunk[:length]
            count += length
            if count == most:
                break
        return data[:count]

    def _chunks(self, result: GetResult) -> Iterator[memoryview]:
        """Yield what a server sends as it comes.

        Raises:
            Fault: it comes too slowly.
        """
        chunks = iter(result.stream(min_chunk_size=FILE_CHUNK if self._scheme == "file" else 1))
        waited, count = 0.0, 0
        while True:
            begin = time.monotonic()
            chunk = next(chunks, None)
            waited += time.monotonic() - begin
            if chunk is None:
                return
            count += len(chunk)
            if waited > self._timeout and count < LEAST_RATE * waited:
                raise faults.of_connection("Timeout", "", self._silence)
            yield memoryview(chunk)

    def size(self, path: str) -> int | None:
        """Return how many bytes an object has, or None if it is not there."""
        import obstore

        try:
            return int(obstore.head(self._store, path)["size"])
        except FileNotFoundError:
            return None
        except self._errors as error:
            fault = self._outcome(error)
        if isinstance(fault, Fault) and fault.answered and not fault.transient:
            self._reason(path)  # an answer to HEAD has no body to say why
        raise fault

    def _reason(self, path: str) -> None:
        try:
            self.piece(path, 0, 1)
        except (Absent, WrongSize, NoRanges):
            return

    def put(self, path: str, data: bytes) -> None:
        """Make an object of at most ``PIECE_BYTES``, or replace it."""
        import obstore

        try:
            store = self._writing_store if self.answered else self._first_store
            obstore.put(store, path, data, use_multipart=False)
        except self._errors as error:
            raise self._written(error) from error

    def stream(self, path: str, length: int, chunks: Iterator[memoryview]) -> None:
        """Make a blob of any size, or replace it; it is there when it is whole.

        Args:
            path: its name, which vouches for its bytes.
            length: bytes.
            chunks: the bytes. What this iterator raises comes out here, and nothing is made.
        """
        import obstore

        raised: list[BaseException] = []
        try:
            obstore.put(
                self._parts_store,
                path,
                noting(chunks, raised),
                use_multipart=True,
                chunk_size=PIECE_BYTES,
                max_concurrency=PARALLEL,
            )
        except self._errors as error:
            if raised:
                raise raised[0] from None
            raise self._written(error) from error

    def _written(self, error: BaseException) -> BaseException:
        """Return what a failed write means: what is not there is the bucket, not the object."""
        outcome = self._outcome(error)
        if not isinstance(outcome, Absent):
            return outcome
        return Fault(
            "it has no such bucket, container or folder",
            "Make it, or write its right name.",
            transient=False,
            answered=True,
        )

    def _outcome(self, error: BaseException) -> BaseException:
        """Return what obstore's ``error`` means."""
        from obstore.exceptions import NotSupportedError

        text = str(error)
        if isinstance(error, FileNotFoundError):
            return Absent()
        if isinstance(error, NotSupportedError) or "NotPartial" in text:
            self.ranges = False
            return NoRanges()
        if "InvalidRange" in text or "status code: 416" in text:
            return WrongSize()
        return faults.of_error(error, self._scheme, self._silence)


def noting(chunks: Iterator[memoryview], raised: list[BaseException]) -> Iterator[memoryview]:
    """Yield ``chunks``; what they raise is also put into ``raised``, as it may come out changed."""
    try:
        yield from chunks
    except Exception as error:
        raised.append(error)
        raise

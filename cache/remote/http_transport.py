"""http_transport: plain HTTP and WebDAV servers, read by obstore and written by httpx2.

No library does both. obstore's HTTPStore holds a whole object in memory to PUT it (a blob may have
10 GB), and makes no parents of the URL's own path; fsspec's HTTP file system cannot write. webdav4
makes the same four requests (MKCOL, PUT, MOVE, DELETE), one line each here, but nothing else that
is in this module: which servers can MOVE, what to do where two meet, and what an error means.
"""

from __future__ import annotations

import random
import socket
import ssl
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from cache.remote import faults
from cache.remote.credentials import basic_auth, basic_header
from cache.remote.faults import BODY_CHARS, TRANSIENT, Fault
from cache.remote.transport import FIRST_SECONDS, LEAST_RATE, Transport, noting

if TYPE_CHECKING:
    import httpx2
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_SEND_BYTES = 1 << 16
_MOVES = 5  # tries


class HttpTransport(Transport):
    """A plain HTTP or WebDAV server."""

    def __init__(self, url: str, *, timeout: float, create: bool) -> None:
        self._auth = basic_auth(url)
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        self._url = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self._made: set[str] = set()
        super().__init__(self._url, timeout=timeout, create=create)

    def _open_remote(
        self, url: str, client: ClientConfig, retry: RetryConfig, *, blobs: bool
    ) -> ObjectStore:
        from obstore.store import HTTPStore

        if self._auth:
            client["default_headers"] = {"authorization": basic_header(self._auth)}
        return HTTPStore.from_url(url, client_options=client, retry_config=retry)

    @cached_property
    def _client(self) -> httpx2.Client:
        import httpx2

        # What goes on and on is not worth a new connection: nothing is decoded or kept of it.
        headers = {"accept-encoding": "identity"}
        if self._auth:
            headers["authorization"] = basic_header(self._auth)
        client = httpx2.Client(headers=headers, follow_redirects=False)
        weakref.finalize(self, client.close)  # not before: a request may be under way
        return client

    def put(self, path: str, data: bytes) -> None:
        """Make an object, or replace it."""
        self.stream(path, len(data), iter([memoryview(data)]))

    def stream(self, path: str, length: int, chunks: Iterator[memoryview]) -> None:
        """Make an object, or replace it.

        Where the server can MOVE, it is there when it is whole, and two that make it at once do
        not meet. Elsewhere that is the server's matter.
        """
        # First, since a server may answer a large body without reading it, and close.
        self._make_parents(path)
        if not self._moves:
            return self._put(path, length, chunks)
        temporary = f"{path}.{uuid4().hex}"
        try:
            self._put(temporary, length, chunks)
            self._move(temporary, path)
        except BaseException:
            with suppress(Fault):
                self._request("DELETE", f"{self._url}/{temporary}")
            raise
        return None

    def _move(self, temporary: str, path: str) -> None:
        target = {"Destination": f"{self._url}/{path}", "Overwrite": "T"}
        for tries_left in reversed(range(_MOVES)):
            answer = self._request("MOVE", f"{self._url}/{temporary}", headers=target)
            if answer.ok:
                return
            if not tries_left:
                self._expect_ok(answer)
            # Servers that remove what is there first refuse it where two do so at once.
            time.sleep(random.uniform(0.01, 0.1))

    @cached_property
    def _moves(self) -> bool:
        """Whether it can MOVE: it says that it is WebDAV, or does not find what is not there."""
        if "DAV" in self._request("OPTIONS", self._url).headers:
            return True
        nothing = f"{self._url}/{uuid4().hex}"
        target = {"Destination": f"{nothing}-moved"}
        return self._request("MOVE", nothing, headers=target).status == 404

    def _put(self, path: str, length: int, chunks: Iterator[memoryview]) -> None:
        raised: list[BaseException] = []
        body = self._body(noting(chunks, raised))
        sized = {"content-length": str(length)}  # else it would come in chunks, of no known length
        try:
            answer = self._request("PUT", f"{self._url}/{path}", content=body, headers=sized)
            self._expect_ok(answer)
        except Fault:
            if raised:
                raise raised[0] from None
            raise

    def _body(self, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
        """Yield a body in pieces.

        Raises:
            Fault: they are taken too slowly.
        """
        waited, count = 0.0, 0
        for chunk in chunks:
            for start in range(0, chunk.nbytes, _SEND_BYTES):
                begin = time.monotonic()
                piece = chunk[start : start + _SEND_BYTES]
                yield piece
                waited += time.monotonic() - begin
                count += piece.nbytes
                if waited > self._seconds and count < LEAST_RATE * waited:
                    raise faults.of_connection("Timeout", "", self._silence)

    def _expect_ok(self, answer: _Answer) -> None:
        if not answer.ok:  # a redirect of a PUT is not followed
            raise faults.of_status(answer.status, answer.said, self._scheme)

    def _make_parents(self, path: str) -> None:
        """Make the folders above ``path``. Servers without folders say no, which is no harm."""
        base = urlsplit(self._url)
        folders = [*base.path.strip("/").split("/"), *path.split("/")[:-1]]
        for count in range(1, len(folders) + 1):
            folder = "/".join(folders[:count])
            if folder and folder not in self._made:
                place = urlunsplit((base.scheme, base.netloc, f"/{folder}/", "", ""))
                answer = self._request("MKCOL", place)
                if answer.status in TRANSIENT:
                    raise faults.of_status(answer.status, "", self._scheme)
                self._made.add(folder)

    def _request(self, method: str, url: str, **options: Any) -> _Answer:
        begin = time.monotonic()
        said = b""
        with (
            self._faults(),
            self._client.stream(method, url, timeout=self._seconds, **options) as response,
        ):
            for chunk in response.iter_raw():
                said += chunk
                if len(said) >= BODY_CHARS or time.monotonic() - begin > self._seconds:
                    break
            text = said[:BODY_CHARS].decode(errors="replace")
            return _Answer(response.status_code, response.headers, text)

    @property
    def _seconds(self) -> float:
        """For which the server may be silent; while it is sent something, it has twice as long."""
        return 2 * self._timeout if self.answered else min(self._timeout, FIRST_SECONDS)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            kind, text = "Interrupted", ""
            causes = [*_causes(error)]
            if isinstance(error, httpx2.TimeoutException):
                kind = "Timeout"
            elif any(isinstance(cause, ssl.SSLError) for cause in causes):
                text = "certificate"
            elif isinstance(error, httpx2.ConnectError):
                kind = "Connect"
                if any(isinstance(cause, socket.gaierror) for cause in causes):
                    text = "dns error"
                elif any(isinstance(cause, ConnectionRefusedError) for cause in causes):
                    text = 'message: "Connection refused"'
            raise faults.of_connection(kind, text, self._silence) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class _Answer(NamedTuple):
    """What a server answers.

    Attributes:
        status: its status.
        headers: its headers.
        said: the beginning of its body.
    """

    status: int
    headers: Mapping[str, str]
    said: str

    @property
    def ok(self) -> bool:
        """Whether it did what was asked."""
        return 200 <= self.status < 300

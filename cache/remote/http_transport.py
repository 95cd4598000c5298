"""http_transport: plain HTTP and WebDAV servers, read by obstore and written by requests.

No library does both. obstore's HTTPStore holds a whole object in memory to PUT it (a blob may have
10 GB), and makes no parents of the URL's own path; fsspec's HTTP file system cannot write. webdav4
makes the same four requests (MKCOL, PUT, MOVE, DELETE), one line each here, but nothing else that
is in this module: which servers can MOVE, what to do where two meet, and what an error means.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from cache.remote.credentials import basic_auth, basic_header
from cache.remote.transport import (
    BODY_CHARS,
    FIRST_SECONDS,
    TRANSIENT,
    Fault,
    Transport,
    noting,
)

if TYPE_CHECKING:
    import requests
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_SEND_BYTES = 1 << 20
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

    def _open_remote(self, url: str, client: ClientConfig, retry: RetryConfig) -> ObjectStore:
        from obstore.store import HTTPStore

        if self._auth:
            client["default_headers"] = {"authorization": basic_header(self._auth)}
        return HTTPStore.from_url(url, client_options=client, retry_config=retry)

    @cached_property
    def _session(self) -> requests.Session:
        import requests

        session = requests.Session()
        session.auth = self._auth
        return session

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
        for again in reversed(range(_MOVES)):
            answer = self._request("MOVE", f"{self._url}/{temporary}", headers=target)
            if answer.ok:
                return
            if not again:
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
        body = _Body(length, noting(chunks, raised)) if length else b"".join(chunks)
        try:
            self._expect_ok(self._request("PUT", f"{self._url}/{path}", data=body))
        except Fault:
            if raised:
                raise raised[0] from None
            raise

    def _expect_ok(self, answer: _Answer) -> None:
        if not answer.ok:  # a redirect of a PUT is not followed
            raise self.of_status(answer.status, answer.said)

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
                    raise self.of_status(answer.status, "")
                self._made.add(folder)

    def _request(self, method: str, url: str, **options: Any) -> _Answer:
        seconds = 2 * self._timeout if self.answered else min(self._timeout, FIRST_SECONDS)
        begin = time.monotonic()
        said = b""
        with (
            self._faults(),
            self._session.request(
                method, url, timeout=seconds, allow_redirects=False, stream=True, **options
            ) as response,
        ):
            for chunk in response.iter_content(BODY_CHARS):
                said += chunk
                # What goes on and on is not worth a new connection.
                if len(said) >= BODY_CHARS or time.monotonic() - begin > seconds:
                    break
            text = said[:BODY_CHARS].decode(errors="replace")
            return _Answer(response.status_code, response.headers, text)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        from requests.exceptions import ConnectTimeout, RequestException, SSLError, Timeout

        try:
            yield
        except RequestException as error:
            text = str(error)
            if isinstance(error, Timeout) or "timed out" in text:
                kind = "Timeout"
            else:
                kind = "Connect" if "NewConnectionError" in text else "Interrupted"
            if isinstance(error, SSLError):
                text = "certificate"
            elif "NameResolutionError" in text:
                text = "dns error"
            elif "Connection refused" in text:
                text = 'message: "Connection refused"'
            fault = self.of_connection(kind, text)
            fault.answered &= not isinstance(error, ConnectTimeout)
            raise fault from error


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


class _Body:
    """A request's body: its length, and its bytes in pieces that a slow line sends in time."""

    def __init__(self, length: int, chunks: Iterator[memoryview]) -> None:
        self._length = length
        self._chunks = chunks

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[memoryview]:
        for chunk in self._chunks:
            for start in range(0, chunk.nbytes, _SEND_BYTES):
                yield chunk[start : start + _SEND_BYTES]

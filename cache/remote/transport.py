"""transport: objects under a URL, by obstore, and what can go wrong in one vocabulary.

Nothing here repeats a request, except that obstore repeats the parts of a multipart upload,
which nobody else can. Every request moves ``PIECE_BYTES`` at most, so that one timeout fits all.
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from cache.errors import BadRemote
from cache.remote.credentials import PASSWORD, USER, aws_profile, basic_auth, basic_header

if TYPE_CHECKING:
    import requests
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

PIECE_BYTES = 8 << 20  # S3 takes 10,000 parts: blobs of 80 GB
PARALLEL = 4  # pieces of one blob under way at once
CONNECT_SECONDS = 5
PART_SECONDS = 3  # for which a part of a multipart upload is repeated
_SEND_BYTES = 1 << 20
_BODY_CHARS = 1 << 16
_MOVES = 5  # tries

SCHEMES = ("s3", "gs", "az", "https", "http", "file")
_CREDENTIALS = {
    "s3": "the AWS_* variables or the profile in ~/.aws (it needs s3:GetObject; s3:ListBucket, or "
    "S3 does not say that an object is not there; s3:PutObject to write)",
    "gs": "the GOOGLE_* variables or gcloud's default credentials",
    "az": "the AZURE_* variables",
    "https": f"{USER} and {PASSWORD}, or ~/.netrc",
    "http": f"{USER} and {PASSWORD}, or ~/.netrc",
    "file": "the folder's owner and mode",
}
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class Absent(Exception):
    """There is no such object."""


class WrongSize(Exception):
    """The object has another size than what is looked for can have."""


class NoRanges(Exception):
    """The server answers with whole objects only."""


class Fault(Exception):
    """A request that failed.

    Attributes:
        cause: what happened, for people; never with a credential in it.
        mend: what to do.
        transient: the same request may succeed soon.
        answered: the server was reached.
    """

    def __init__(self, cause: str, mend: str, *, transient: bool, answered: bool) -> None:
        super().__init__(cause)
        self.cause = cause
        self.mend = mend
        self.transient = transient
        self.answered = answered


def check(url: str) -> None:
    """Make sure that ``url`` can be a remote's.

    Raises:
        BadRemote: it cannot.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it raises here if it is no number
    except ValueError as error:
        raise BadRemote(
            f"{shown(url)}: not a URL. Write it as SCHEME://HOST:PORT/PATH, and a password's "
            "special characters as %XX."
        ) from error
    if parts.scheme not in SCHEMES:
        raise BadRemote(
            f"{shown(url)}: no remote has the scheme {parts.scheme!r}. Valid are "
            "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, https://host/path, "
            "http://host/path and file:///path."
        )
    if parts.scheme == "file" and (parts.netloc or len(parts.path) < 2):
        raise BadRemote(f"{shown(url)}: write file:///path, with the folder's absolute path.")
    if parts.scheme != "file" and not parts.hostname:
        raise BadRemote(f"{shown(url)}: there is no bucket or host after {parts.scheme}://.")
    if parts.query or parts.fragment:
        raise BadRemote(f"{shown(url)}: a remote's URL has no ? and no #. Leave them out.")


def shown(url: str) -> str:
    """Return ``url`` as people may see it: without user, password and query."""
    scheme, separator, rest = url.partition("://")
    rest = re.sub(r"^.*:.*@", "", rest, flags=re.DOTALL)  # a password may hold what ends a host
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def connect(url: str, *, timeout: float, create: bool) -> Transport:
    """Return the transport for ``url``. Nothing is asked of a server yet.

    Args:
        url: one that ``check`` has passed.
        timeout: seconds that one request may take.
        create: a local folder that is not there is made.

    Raises:
        Fault: the credentials, or a local folder, cannot be read.
    """
    kind = HttpTransport if url.startswith("http") else Transport
    return kind(url, timeout=timeout, create=create)


class Transport:
    """Objects in a bucket or folder. All methods are safe in threads.

    Besides what is named, every method raises:
        Fault: the request failed.

    Attributes:
        ranges: the server has them, as far as it is known.
    """

    ranges = True

    def __init__(self, url: str, *, timeout: float, create: bool) -> None:
        from obstore.exceptions import BaseError  # 0.1 s and 30 MB: only where a remote is used

        self._errors = (BaseError, OSError, ValueError, NotImplementedError)
        self._scheme = urlsplit(url).scheme
        self._timeout = timeout
        try:
            self._store = self._open(url, create=create)
            self._parts_store = self._open(url, create=create, repeats=True)
            self._whole_store = self._open(url, create=create, endless=True)
        except self._errors as error:
            raise self._fault(error) from error

    def _open(
        self, url: str, *, create: bool, repeats: bool = False, endless: bool = False
    ) -> ObjectStore:
        from obstore.store import from_url

        if self._scheme == "file":
            return from_url(url, mkdir=create)
        seconds = timedelta(seconds=self._timeout)
        client: ClientConfig = {
            "allow_http": True,  # of an endpoint that is spelled http://
            "timeout": timedelta(days=1) if endless else seconds,
            "read_timeout": seconds,
            "connect_timeout": timedelta(seconds=min(self._timeout, CONNECT_SECONDS)),
        }
        retry: RetryConfig = {
            "max_retries": 10 if repeats else 0,
            "retry_timeout": timedelta(seconds=PART_SECONDS),
        }
        return self._open_remote(url, client, retry)

    def _open_remote(self, url: str, client: ClientConfig, retry: RetryConfig) -> ObjectStore:
        from obstore.store import from_url

        config: Any = aws_profile() if self._scheme == "s3" else {}
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
            return bytes(result.bytes())
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
            return memoryview(result.bytes()), result.meta["size"]
        except self._errors as error:
            raise self._outcome(error) from error

    def whole(self, path: str) -> Iterator[memoryview]:
        """Yield an object's bytes, where the server has no ranges.

        Raises:
            Absent: it is not there.
        """
        import obstore

        try:
            for data in obstore.get(self._whole_store, path).stream(PIECE_BYTES):
                yield memoryview(data)
        except self._errors as error:
            raise self._outcome(error) from error

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
            obstore.put(self._store, path, data, use_multipart=False)
        except self._errors as error:
            raise self._written(error) from error

    def stream(self, path: str, length: int, chunks: Iterator[memoryview]) -> None:
        """Make an object of any size, or replace it; it is there when it is whole.

        Args:
            path: its name.
            length: bytes.
            chunks: the bytes. What this iterator raises comes out here, and nothing is made.
        """
        import obstore

        raised: list[BaseException] = []
        try:
            obstore.put(
                self._parts_store,
                path,
                _noting(chunks, raised),
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
        return self._fault(error)

    def _fault(self, error: BaseException) -> Fault:
        """Return the fault that obstore's ``error`` tells of, in its text alone.

        The text itself is never shown: a URL in it may be signed.
        """
        text = str(error)
        if "169.254." in text or "TokenRequest" in text:
            return self._refused("no credentials were found that it takes", answered=False)
        status = re.search(r"status code: (\d{3})[^:]*:? ?(.*)", text, re.DOTALL)
        if status:
            return self.of_status(int(status[1]), status[2][:_BODY_CHARS])
        if "Received redirect without LOCATION" in text:
            return Fault(
                "it answered that the bucket is in another region",
                "Set AWS_REGION to the bucket's.",
                transient=False,
                answered=True,
            )
        system = re.search(r"(?:os error|\bcode:) (\d+)", text)
        if self._scheme == "file":
            return self._of_errno(int(system[1]) if system else 0)
        kind = re.search(r"kind: (Connect|Timeout|Interrupted|Request|Decode|Unknown)", text)
        if kind:
            return self._of_connection(kind[1], text)
        return Fault(
            f"it cannot be opened or read ({type(error).__name__})",
            f"Check its address, and the credentials: {_CREDENTIALS[self._scheme]}.",
            transient=False,
            answered=False,
        )

    def _of_connection(self, kind: str, text: str) -> Fault:
        said = re.findall(r'message: "([\w \-]+)"', text)
        name = "its name is not known" if "dns error" in text else ""
        tls = "its certificate is not trusted" if "certificate" in text else ""
        if kind == "Timeout":
            cause = f"it took more than {self._timeout:g} s to answer"
        else:
            cause = name or tls or (said[-1].lower() if said else "the connection broke")
        mend = "Check its address, that the server is up, and the network."
        return Fault(cause, mend, transient=not tls, answered=kind in ("Interrupted", "Decode"))

    def _of_errno(self, number: int) -> Fault:
        said = errno.errorcode.get(number, "unknown error")
        if number in _FULL:
            return _full(f"the disk is full ({said})")
        if number in _FORBIDDEN:
            return self._refused(f"it is not allowed ({said})", answered=True)
        if number == errno.ENOENT:
            return Fault(
                "there is no such folder",
                "Make it, or mount what it is on.",
                transient=False,
                answered=False,
            )
        if number in (errno.EEXIST, errno.ENOTDIR):
            return Fault(
                f"a file is where a folder must be ({said})",
                "Name a folder.",
                transient=False,
                answered=False,
            )
        mend = "Check the file system that it is on."
        return Fault(f"it failed ({said})", mend, transient=True, answered=True)

    def of_status(self, status: int, body: str) -> Fault:
        """Return the fault that an HTTP answer tells of."""
        code = re.search(r"<Code>(\w+)</Code>", body)
        phrase = code[1] if code else _PHRASES.get(status)
        said = f"it answered {status} ({phrase})" if phrase else f"it answered {status}"
        if code and code[1] == "RequestTimeTooSkewed":
            return _skewed(said, body)
        if status in (401, 403, 407):
            return self._refused(said, answered=True)
        if status == 507:
            return _full(said)
        mend = "Try again when the server is well."
        if status in (405, 501):
            mend = "The server takes no uploads. Have it allow PUT, or use it read-only."
        elif status == 413:
            mend = "Raise the size of a body that the server takes (nginx: client_max_body_size)."
        elif status not in _TRANSIENT:
            mend = "Check its address."
        return Fault(said, mend, transient=status in _TRANSIENT, answered=True)

    def _refused(self, cause: str, *, answered: bool) -> Fault:
        mend = f"Check the credentials: {_CREDENTIALS[self._scheme]}."
        return Fault(cause, mend, transient=False, answered=answered)


class HttpTransport(Transport):
    """A plain HTTP or WebDAV server.

    obstore would hold a whole blob in memory to PUT it, and makes no parents of the URL's own
    path, so writing is done with requests.
    """

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
                self._request("DELETE", f"{self._url}/{temporary}").close()
            raise
        return None

    def _move(self, temporary: str, path: str) -> None:
        target = {"Destination": f"{self._url}/{path}", "Overwrite": "T"}
        for again in reversed(range(_MOVES)):
            with self._request("MOVE", f"{self._url}/{temporary}", headers=target) as response:
                if 200 <= response.status_code < 300:
                    return
                if not again:
                    self._expect_ok(response)
            # Servers that remove what is there first refuse it where two do so at once.
            time.sleep(random.uniform(0.01, 0.1))

    @cached_property
    def _moves(self) -> bool:
        """Whether it can MOVE: it says that it is WebDAV, or does not find what is not there."""
        with self._request("OPTIONS", self._url) as response:
            if "DAV" in response.headers:
                return True
        nothing = f"{self._url}/{uuid4().hex}"
        target = {"Destination": f"{nothing}-moved"}
        with self._request("MOVE", nothing, headers=target) as response:
            return response.status_code == 404

    def _put(self, path: str, length: int, chunks: Iterator[memoryview]) -> None:
        raised: list[BaseException] = []
        body = _Body(length, _noting(chunks, raised)) if length else b"".join(chunks)
        try:
            with self._request("PUT", f"{self._url}/{path}", data=body) as response:
                self._expect_ok(response)
        except Fault:
            if raised:
                raise raised[0] from None
            raise

    def _expect_ok(self, response: requests.Response) -> None:
        if not 200 <= response.status_code < 300:  # a redirect of a PUT is not followed
            raise self.of_status(response.status_code, response.text[:_BODY_CHARS])

    def _make_parents(self, path: str) -> None:
        """Make the folders above ``path``. Servers without folders say no, which is no harm."""
        base = urlsplit(self._url)
        folders = [*base.path.strip("/").split("/"), *path.split("/")[:-1]]
        for count in range(1, len(folders) + 1):
            folder = "/".join(folders[:count])
            if folder and folder not in self._made:
                place = urlunsplit((base.scheme, base.netloc, f"/{folder}/", "", ""))
                with self._request("MKCOL", place) as response:
                    if response.status_code in _TRANSIENT:
                        raise self.of_status(response.status_code, "")
                self._made.add(folder)

    def _request(self, method: str, url: str, **options: Any) -> requests.Response:
        with self._faults():
            return self._session.request(
                method, url, timeout=self._timeout, allow_redirects=method == "GET", **options
            )

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
            fault = self._of_connection(kind, text)
            fault.answered &= not isinstance(error, ConnectTimeout)
            raise fault from error


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


def _noting(chunks: Iterator[memoryview], raised: list[BaseException]) -> Iterator[memoryview]:
    """Yield ``chunks``; what they raise is also put into ``raised``, as it may come out changed."""
    try:
        yield from chunks
    except Exception as error:
        raised.append(error)
        raise


def _full(cause: str) -> Fault:
    return Fault(cause, "Make room there.", transient=False, answered=True)


def _skewed(cause: str, body: str) -> Fault:
    here, there = (
        found[1] if (found := re.search(rf"<{tag}>([\w:.+\- ]+)</{tag}>", body)) else "unknown"
        for tag in ("RequestTime", "ServerTime")
    )
    return Fault(
        f"{cause}: this machine's clock says {here}, the server's {there}",
        "Set this machine's clock: signed requests are taken for some minutes only.",
        transient=False,
        answered=True,
    )

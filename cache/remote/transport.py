"""transport: objects under a URL, by obstore, and what can go wrong in one vocabulary.

Nothing here repeats a request, except that obstore repeats the parts of a multipart upload,
which nobody else can. A server may be silent for ``timeout`` seconds, and for ``FIRST_SECONDS``
until it has answered once; what it sends must come at ``LEAST_RATE``. So none holds a build up for
long, and a slow line has its time. No more is read than was asked for.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cache.errors import BadRemote
from cache.remote.credentials import PASSWORD, REMOTE, USER, aws_profile, withheld

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

PIECE_BYTES = 8 << 20  # S3 takes 10,000 parts: blobs of 80 GB
PARALLEL = 4  # pieces of one blob under way at once
CONNECT_SECONDS = 5
FIRST_SECONDS = 2  # a server that never answered is not waited for longer
LEAST_RATE = 16 << 10  # bytes a second, of what one request is waited for longer than ``timeout``
PART_SECONDS = 3  # for which a part of a multipart upload is repeated
BODY_CHARS = 1 << 16

SCHEMES = ("s3", "gs", "az", "https", "http", "file")
_CREDENTIALS = {
    "s3": "the AWS_* variables or the profile in ~/.aws (it needs s3:GetObject; s3:ListBucket, or "
    "S3 does not say that an object is not there; s3:PutObject to write)",
    "gs": "the GOOGLE_* variables or gcloud's default credentials",
    "az": "the AZURE_* variables",
    "https": f"{USER} and {PASSWORD}, with {REMOTE} as the server's, or ~/.netrc",
    "http": f"{USER} and {PASSWORD}, with {REMOTE} as the server's, or ~/.netrc",
    "file": "the folder's owner and mode",
}
_FOR_ANOTHER = (
    "is set, and not sent there: a password in the environment goes to the server that "
    f"{REMOTE} names. If it is for this one, set {REMOTE}, too, or use ~/.netrc."
)
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
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
        waited: seconds for which nothing came, or too little.
    """

    def __init__(
        self, cause: str, mend: str, *, transient: bool, answered: bool, waited: float = 0
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.mend = mend
        self.transient = transient
        self.answered = answered
        self.waited = waited


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


def risks(url: str, *, signed: bool, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return what people should know who use a remote on another machine.

    Args:
        url: the remote's.
        signed: whether its records have to be signed.
        environ: may name the endpoint of an S3 server, and a user's password.
    """
    if url.startswith("s3:"):
        url = environ.get("AWS_ENDPOINT_URL") or url
    parts = urlsplit(url)
    unsent = parts.scheme in ("http", "https") and parts.username is None and withheld(url, environ)
    risks = [f"{USER} {_FOR_ANOTHER}"] if unsent else []
    if parts.scheme == "file" or re.fullmatch(r"localhost|127\.[0-9.]+|::1", parts.hostname or ""):
        return risks
    if parts.scheme == "http":
        risks.append(
            "all that is sent there, passwords too, can be read and changed on its way. Use "
            "https:// if the server has it."
        )
    if not signed:
        risks.append(
            "its records are not signed: who can write there can have you build anything that "
            "models.lock does not know better. Set MLX_MAKE_SIGNING_KEY wherever it is used."
        )
    return risks


def shown(url: str) -> str:
    """Return ``url`` as people may see it: without user, password and query."""
    scheme, separator, rest = url.partition("://")
    rest = re.sub(r"^.*:.*@", "", rest, flags=re.DOTALL)  # a password may hold what ends a host
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


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
            self._parts_store = self._open(url, 2 * timeout, create=create, repeats=True)
        except self._errors as error:
            raise self._fault(error) from error

    @property
    def _store(self) -> ObjectStore:
        return self._reading_store if self.answered else self._first_store

    def _open(
        self, url: str, silence: float, *, create: bool, repeats: bool = False
    ) -> ObjectStore:
        """Open the store; a server may be silent for ``silence`` seconds."""
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
        if self._scheme == "file":  # no server: its size is what it says
            return memoryview(result.bytes())
        data = memoryview(bytearray(most))
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
        chunks = iter(result.stream(min_chunk_size=1))
        waited, count = 0.0, 0
        while True:
            begin = time.monotonic()
            chunk = next(chunks, None)
            waited += time.monotonic() - begin
            if chunk is None:
                return
            count += len(chunk)
            if waited > self._timeout and count < LEAST_RATE * waited:
                raise self.of_connection("Timeout", "")
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
            return self.of_status(int(status[1]), status[2][:BODY_CHARS])
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
            return self.of_connection(kind[1], text)
        return Fault(
            f"it cannot be opened or read ({type(error).__name__})",
            f"Check its address, and the credentials: {_CREDENTIALS[self._scheme]}.",
            transient=False,
            answered=False,
        )

    def of_connection(self, kind: str, text: str) -> Fault:
        """Return the fault of a connection that failed in the way that obstore calls ``kind``."""
        said = re.findall(r'message: "([\w \-]+)"', text)
        name = "its name is not known" if "dns error" in text else ""
        tls = "its certificate is not trusted" if "certificate" in text else ""
        waited = 0.0
        if kind == "Timeout":
            waited = limit = self._timeout if self.answered else min(self._timeout, FIRST_SECONDS)
            cause = f"it took more than {limit:g} s to answer, or sent too slowly"
        else:
            cause = name or tls or (said[-1].lower() if said else "the connection broke")
        mend = "Check its address, that the server is up, and the network."
        answered = kind in ("Interrupted", "Decode")
        return Fault(cause, mend, transient=not tls, answered=answered, waited=waited)

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
        code = re.search(r"<Code>(\w{1,64})</Code>", body)
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
        elif status not in TRANSIENT:
            mend = "Check its address."
        return Fault(said, mend, transient=status in TRANSIENT, answered=True)

    def _refused(self, cause: str, *, answered: bool) -> Fault:
        mend = f"Check the credentials: {_CREDENTIALS[self._scheme]}."
        return Fault(cause, mend, transient=False, answered=answered)


def noting(chunks: Iterator[memoryview], raised: list[BaseException]) -> Iterator[memoryview]:
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
        match[1]
        if (match := re.search(rf"<{tag}>([\w:.+\- ]{{1,64}})</{tag}>", body))
        else "unknown"
        for tag in ("RequestTime", "ServerTime")
    )
    return Fault(
        f"{cause}: this machine's clock says {here}, the server's {there}",
        "Set this machine's clock: signed requests are taken for some minutes only.",
        transient=False,
        answered=True,
    )

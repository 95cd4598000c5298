"""hub_ranges: the bytes of a hub's files, by ranges, each answer held against the request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import msgspec
from msgspec import Struct, field

from tasks.checkpoints.hub_client import HubFile
from tasks.checkpoints.hub_errors import errors_of_reading
from tasks.checkpoints.hub_requests import (
    NO_ANSWER,
    NUMBER,
    CutShort,
    NeverReached,
    Patience,
    is_expired,
    origin,
    page,
    request_headers,
    silence_seconds,
)
from tasks.checkpoints.hub_session import BATCH, READ_BY_PIECES, session
from tasks.checkpoints.hub_xet import Xet
from tasks.core.errors import CheckpointError

if TYPE_CHECKING:
    import httpx2

REDIRECTS = 5
PAST_BYTES = 32 << 20  # of what is left of an answer, from which on it is read past the client
PIECE_BYTES = 256 << 10
LOCATED = 100  # files in a request, the most that git-lfs itself asks for


class Ranges(Struct, frozen=True, dict=True):
    """The bytes of a repository's files at a commit. Safe in threads.

    Attributes:
        repository: ``ORG/NAME``.
        commit: the commit.
        files: what the hub says of them.
    """

    repository: str
    commit: str
    files: Mapping[str, HubFile]
    _addresses: dict[str, str] = field(default_factory=dict)  # signed ones, while they hold
    _reached: set[Any] = field(default_factory=set)  # origins that have answered

    @cached_property
    def _xet(self) -> Xet:
        return Xet(self.repository, self.commit)

    def read(self, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        """Yield bytes of a file. A connection that is cut or stalls goes on where it ended.

        Raises:
            CheckpointError: there are no such bytes, or what comes is other than promised.
            HubUnreachable: the hub does not answer, or is not to be asked.
        """
        size = self.files[name].size
        if start + nbytes > size:
            raise CheckpointError(
                f"{name} of {self.repository} has {size:,} bytes at {self.commit}, and no byte "
                f"{start + nbytes:,}: its header is of another file."
            )
        at, end, patience = start, start + nbytes, Patience()
        for data in self._xet.read(name, start, end):
            if len(data) > end - at:
                break
            at += len(data)
            yield data
        with errors_of_reading(self.repository, self.commit, name):
            while at < end:
                with patience, self._opened(name, at, end) as response:
                    for data in patience.watch(_body(response)):
                        if len(data) > end - at:
                            raise self._other(name, f"more than the {end - at:,} bytes asked for")
                        at += len(data)
                        yield data
                    if at < end:
                        raise CutShort(f"the answer ended {end - at:,} bytes early")

    def locate(self, names: Iterable[str]) -> None:
        """Have the hub say where large files lie, many in one request, as git-lfs has it.

        Files that it says nothing of are asked for one by one, as they are read.
        """
        import httpx2

        files = [(self.files[name], name) for name in names if name not in self._addresses]
        large = {file.digest[7:]: (file, n) for file, n in files if file.digest[:7] == "sha256:"}
        url = f"{page(self.repository)}.git{BATCH}"
        for first in range(0, len(large), LOCATED):
            batch = list(large.items())[first : first + LOCATED]
            request = {
                "operation": "download",
                "transfers": ["basic"],
                "hash_algo": "sha256",
                "objects": [{"oid": oid, "size": file.size} for oid, (file, _) in batch],
            }
            try:
                response = session().post(
                    url, json=request, headers=request_headers(), timeout=silence_seconds()
                )
                answer = msgspec.json.decode(response.content, type=_Located)
            except (httpx2.HTTPError, OSError, RuntimeError, CutShort, *NO_ANSWER):
                return
            for item in answer.objects:
                if item.oid in large and (place := item.actions.get("download")) and place.is_plain:
                    self._addresses[large[item.oid][1]] = place.href

    @contextmanager
    def _opened(self, name: str, start: int, end: int) -> Iterator[httpx2.Response]:
        """Request a range, from where the hub said last that the file lies.

        Raises:
            CheckpointError: the answer is none to what was asked.
            httpx2.HTTPError: there is none.
        """
        from huggingface_hub import hf_hub_url

        place = hf_hub_url(self.repository, name, revision=self.commit)
        address = self._addresses.get(name, place)
        for _ in range(REDIRECTS):
            with self._asked(name, address, place, (start, end)) as response:
                if not response.has_redirect_location:
                    if is_expired(response):
                        self._addresses.pop(name, None)
                    elif origin(address) != origin(place):
                        self._addresses[name] = address
                    self._check(name, response, start, end)
                    yield response
                    return
                self._check_etag(name, response)
                address = urljoin(address, response.headers["location"])
        raise CheckpointError(f"{name} of {self.repository} is redirected over {REDIRECTS} times.")

    @contextmanager
    def _asked(
        self, name: str, address: str, place: str, span: tuple[int, int]
    ) -> Iterator[httpx2.Response]:
        """Request a range of what is at an address.

        Raises:
            NeverReached: it is of another host than the hub's, and there is none, or none for us.
            httpx2.HTTPError: there is no answer.
        """
        import httpx2

        host = origin(address)
        try:
            with _stream(address, place, *span) as response:
                self._reached.add(host)
                yield response
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            if host in self._reached or host == origin(place):
                raise
            self._addresses.pop(name, None)  # the hub may give another
            raise NeverReached(f"{host[0]}://{host[1]}:{host[2]}") from error

    def _check(self, name: str, response: httpx2.Response, start: int, end: int) -> None:
        """Refuse an answer to a range that is none."""
        from huggingface_hub.utils import hf_raise_for_status

        hf_raise_for_status(response)
        size = self.files[name].size
        span = f"{start}-{end - 1}/{size}"
        if response.status_code == 206:
            span = response.headers.get("content-range", "").removeprefix("bytes ")
        elif (start, end) != (0, size):
            raise self._other(name, "the whole file, where a range was asked for")
        match = re.fullmatch(rf"({NUMBER})-({NUMBER})/({NUMBER}|\*)", span)
        if not match or int(match[1]) != start or int(match[2]) >= end:
            raise self._other(name, f"range {span[:60]!r}, where {start}-{end - 1} was asked for")
        if match[3] not in ("*", str(size)):
            raise self._other(name, f"a file of {int(match[3]):,} bytes, which has {size:,}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._other(name, f"bytes encoded as {response.headers['content-encoding']}")
        length = response.headers.get("content-length", "")
        if re.fullmatch(NUMBER, length) and int(length) > end - start:
            raise self._other(name, f"{int(length):,} bytes, where {end - start:,} were asked for")

    def _check_etag(self, name: str, response: httpx2.Response) -> None:
        """Refuse a redirect to other bytes than the hub said are the file's."""
        etag = response.headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        expected = self.files[name].digest.removeprefix("sha256:")
        if etag and len(etag) == len(expected) == 64 and etag != expected:
            raise self._other(name, f"a file of sha256 {etag}, which has {expected}")

    def _other(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{name} of {self.repository} at {self.commit}: the server gives {what}. If there is a "
            "proxy or a mirror between, it is at fault; try again without it (HF_ENDPOINT)."
        )


class _Action(Struct, frozen=True):
    href: str
    header: dict[str, str] = {}

    @property
    def is_plain(self) -> bool:
        """Whether the address is all that is needed."""
        try:
            scheme, host, _ = origin(self.href)
        except ValueError:
            return False
        return not self.header and scheme in ("https", "http") and bool(host)


class _Object(Struct, frozen=True):
    oid: str
    actions: dict[str, _Action] = {}


class _Located(Struct, frozen=True):
    """What a hub answers of where large files lie (git-lfs, docs/api/batch.md)."""

    objects: list[_Object]


@contextmanager
def _stream(address: str, place: str, start: int, end: int) -> Iterator[httpx2.Response]:
    """Request a range of what is at an address; who asks is for the hub alone to know."""
    headers = request_headers(None if origin(address) == origin(place) else False)
    headers |= {"Range": f"bytes={start}-{end - 1}"}
    marks = {READ_BY_PIECES: True}
    with session().stream(
        "GET", address, headers=headers, follow_redirects=False, timeout=silence_seconds(),
        extensions=marks,
    ) as response:  # fmt: skip
        yield response


def _body(response: httpx2.Response) -> Iterator[bytes]:
    """Yield the bytes of an answer as they come; of a large one, past the client.

    The client copies all, four times, in pieces of 64 KiB, while no other thread of Python's runs:
    a build would wait for it. The connection is of no use for another request afterwards.

    Raises:
        httpx2.TransportError: the connection is cut, or silent for too long.
    """
    import httpcore2
    import httpx2

    pieces = response.iter_raw()
    yield (first := next(pieces, b""))  # with what the client has read already
    length = response.headers.get("content-length", "")
    left = int(length) - len(first) if re.fullmatch(NUMBER, length) else 0
    stream = response.extensions.get("network_stream")
    is_plain = response.http_version == "HTTP/1.1" and "transfer-encoding" not in response.headers
    if stream is None or not is_plain or left < PAST_BYTES:
        yield from pieces
        return
    try:
        while left and (piece := stream.read(min(PIECE_BYTES, left), silence_seconds())):
            left -= len(piece)
            yield piece
    except httpcore2.TimeoutException as error:
        raise httpx2.ReadTimeout(str(error), request=response.request) from error
    except httpcore2.NetworkError as error:
        raise httpx2.ReadError(str(error), request=response.request) from error

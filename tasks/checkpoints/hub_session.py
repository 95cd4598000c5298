"""hub_session: the HTTP client of the hub's own client, of whose answers none goes on for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cache.errors import printable
from tasks.checkpoints.hub_requests import Patience
from tasks.checkpoints.small_files import MAX_SMALL_BYTES

if TYPE_CHECKING:
    import httpx2

MAX_PARSED_BYTES = 32 << 20  # of an answer: one that lists 100,000 files has a half of it
MAX_LISTED = 200_000  # files and folders of a repository, over all pages
BATCH = "/info/lfs/objects/batch"
_setting_up = threading.Lock()
READ_BY_PIECES = "read by pieces"  # marks a request whose answer the reader bounds


def session() -> httpx2.Client:
    """Return the client, which has its answers unpacked and bounded from then on.

    A server can send anything for ever, and gigabytes as some kilobytes. So has each one that takes
    its place: where no connection is had, all threads get another.
    """
    from huggingface_hub.utils import get_session

    with _setting_up:
        session = get_session()
        if _bound not in session.event_hooks["response"]:
            _set_up(session)
            session = get_session()
    return session


def _set_up(session: httpx2.Client) -> None:
    """Have all clients from now on be like this one, with answers that are bounded."""
    import httpx2
    from huggingface_hub import set_client_factory

    hooks = session.event_hooks
    bounded: dict[str, Any] = {
        "request": [*hooks["request"], _ask_for_plain_bytes],
        "response": [*hooks["response"], _bound],
    }
    follows, timeout = session.follow_redirects, session.timeout
    set_client_factory(
        lambda: httpx2.Client(event_hooks=bounded, follow_redirects=follows, timeout=timeout)
    )


def _ask_for_plain_bytes(request: httpx2.Request) -> None:
    request.headers["Accept-Encoding"] = "identity"


def _bound(response: httpx2.Response) -> None:
    """Have the reading of an answer end.

    Raises:
        ValueError: it is packed, which nobody asked for.
    """
    import httpx2

    if response.request.method == "HEAD" or READ_BY_PIECES in response.request.extensions:
        return
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise ValueError(f"bytes encoded as {printable(encoding)}, which were not asked for")
    path, stream = response.url.path, response.stream
    is_parsed = response.is_error or "/api/" in path or path.endswith(BATCH)
    limit = MAX_PARSED_BYTES if is_parsed else MAX_SMALL_BYTES
    assert isinstance(stream, httpx2.SyncByteStream)

    response.stream = _bounded(stream, limit)


def _bounded(stream: httpx2.SyncByteStream, limit: int) -> httpx2.SyncByteStream:
    import httpx2

    class Bounded(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield from _until(limit, stream)

        def close(self) -> None:
            stream.close()

    return Bounded()


def _until(limit: int, stream: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what comes, unless it comes in drips, or is more than it may be.

    Raises:
        CutShort: it comes in drips.
        ValueError: it is more.
    """
    came = 0
    for piece in Patience().watch(iter(stream)):
        came += len(piece)
        if came > limit:
            raise ValueError(f"over {limit:,} bytes")
        yield piece

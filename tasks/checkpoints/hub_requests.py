"""hub_requests: how a model hub is asked, and again where what failed passes."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx2

TRIES = 6  # without progress between
UNREACHED_TRIES = 2  # of a host that was never reached
PROGRESS_BYTES = 64 << 10
PROGRESS_SECONDS = 30.0  # of waiting for so many bytes, before another connection is tried
FIRST_WAIT_SECONDS, MOST_WAIT_SECONDS = 0.5, 30.0
MOST_PATIENCE_SECONDS = 600.0  # of what Retry-After asks for
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
EXPIRED = frozenset({400, 401, 403, 404, 410})  # of a signed address: the hub gives another
NUMBER = "[0-9]{1,18}"  # of a header: what 64 bits hold
# What the client comes to where an answer is not of the kind that it reads.
NO_ANSWER = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
)  # fmt: skip

_T = TypeVar("_T")


def endpoint() -> str:
    """Return the address of the hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def page(repository: str) -> str:
    """Return the address of a repository's page."""
    return f"{endpoint()}/{repository}"


def request_headers(token: Literal[False] | None = None) -> dict[str, str]:
    """Return the headers of a request; ``False``: without the token, to any other host."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(token=token, **program())


def silence_seconds() -> float:
    """Return the seconds after which a silent connection is given up."""
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT


def program() -> dict[str, Any]:
    """Return what the hub's client says of the program that uses it."""
    from importlib.metadata import version

    return {"library_name": "mlx-make", "library_version": version("mlx-make")}


def origin(address: str) -> tuple[str, str | None, int | None]:
    """Return the scheme, host and port that an address is of."""
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class CutShort(Exception):
    """An answer that ended before all of it was there."""


class NeverReached(Exception):
    """A host that the hub sends us to, and that was not reached yet."""


class Patience:
    """Swallows failures that pass, and waits after each; not too often without any progress."""

    def __init__(self, tries: int = TRIES) -> None:
        self._most = tries
        self._tries = 0
        self._bytes = 0
        self._seconds = 0.0

    def watch(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield what comes, as long as it does not come in drips.

        Raises:
            CutShort: it does.
        """
        while True:
            begin = time.monotonic()  # what is done with it meanwhile may take long
            piece = next(pieces, b"")
            self._seconds += time.monotonic() - begin
            came = self._bytes + len(piece)
            if came >= PROGRESS_BYTES:
                self._tries, self._bytes, self._seconds = 0, 0, 0.0
            elif self._seconds > PROGRESS_SECONDS:
                raise CutShort(f"no more than {came:,} bytes came in {self._seconds:.0f} s")
            else:
                self._bytes = came
            if not piece:
                return
            yield piece

    def __enter__(self) -> Patience:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        delay = _passing(error)
        if delay is None:
            return False
        self._tries += 1
        self._seconds = 0.0
        most = UNREACHED_TRIES if isinstance(error, NeverReached) else self._most
        if self._tries >= most or delay > MOST_PATIENCE_SECONDS:
            return False
        wait = min(FIRST_WAIT_SECONDS * 2 ** (self._tries - 1), MOST_WAIT_SECONDS)
        time.sleep(max(delay, wait * random.uniform(0.75, 1.25)))
        return True


def patiently(ask: Callable[[], _T], tries: int = TRIES) -> _T:
    """Return what ``ask`` returns, after failures that pass."""
    patience = Patience(tries)
    while True:
        with patience:
            return ask()


def _passing(error: BaseException | None) -> float | None:
    """Return the seconds that a failure that passes asks to wait; None of any other."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        if is_expired(error.response):
            return 0.0
        transient = error.response.status_code in TRANSIENT
        return retry_after(error.response) if transient else None
    passes = isinstance(error, (CutShort, NeverReached, httpx2.TransportError)) or is_closed(error)
    return 0.0 if passes else None


def is_closed(error: BaseException | None) -> bool:
    """Tell whether the client was closed, as its own retries do for all threads at once."""
    return isinstance(error, RuntimeError) and "has been closed" in str(error)


def is_expired(response: httpx2.Response) -> bool:
    """Tell whether a host that the hub sent us to refuses the address that it gave."""
    elsewhere = origin(str(response.request.url)) != origin(endpoint())
    return elsewhere and response.status_code in EXPIRED


def retry_after(response: httpx2.Response) -> float:
    """Return the seconds after which a server wants to be asked again."""
    from email.utils import parsedate_to_datetime

    from huggingface_hub.utils import parse_ratelimit_headers

    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(NUMBER, text):
        return float(text)
    with suppress(*NO_ANSWER):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    with suppress(*NO_ANSWER):
        limit = parse_ratelimit_headers(response.headers)
        return float(limit.reset_in_seconds) if limit and not limit.remaining else 0.0
    return 0.0

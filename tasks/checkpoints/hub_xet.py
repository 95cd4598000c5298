"""hub_xet: ranges of a hub's files that are stored in Xet, as hf_xet fetches them.

That package says of itself that it is not meant to be used directly: all that is used of it is
here. Whatever it does not give, HTTP ranges do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

from tasks.checkpoints.hub_requests import (
    NO_ANSWER,
    endpoint,
    origin,
    request_headers,
    silence_seconds,
)

LEAST_BYTES = 8 << 20  # of a range: below that, what is asked before takes longer
AT_ONCE = 4  # ranges, each by several connections, and some 16 MB of each in memory
# By default hf_xet holds up to 6 GB, fetches no less than 256 MB at once, and goes on asking who
# does not answer for minutes.
SETTINGS = {
    "reconstruction.min_reconstruction_fetch_size": "16mb",
    "reconstruction.max_reconstruction_fetch_size": "16mb",
    "reconstruction.download_buffer_size": "128mb",
    "reconstruction.download_buffer_perfile_size": "1mb",
    "reconstruction.download_buffer_limit": "128mb",
    "reconstruction.min_prefetch_buffer": "16mb",
    "client.retry_max_attempts": 2,
    "client.retry_base_delay": "500ms",
    "client.retry_max_duration": "10s",
    "client.connect_timeout": "10s",
    "telemetry.enabled": False,
}
_turns = threading.BoundedSemaphore(AT_ONCE)


class Xet:
    """The files of a repository at a commit that are stored in Xet. Safe in threads.

    Args:
        repository: ``ORG/NAME``.
        commit: the commit.
    """

    def __init__(self, repository: str, commit: str) -> None:
        self._repository, self._commit = repository, commit
        self._lock = threading.Lock()
        self._files: dict[str, Any] = {}  # None, one is not stored there
        self._group: Any = None
        self._is_of_use = True

    def read(self, name: str, start: int, end: int) -> Iterator[bytes]:
        """Yield bytes of a file as far as they come: none of one that is not stored in Xet."""
        import httpx2

        if end - start < LEAST_BYTES or not self._is_of_use or not _is_here():
            return
        try:
            with self._lock:
                file, group = self._opened(name)
            if file is None:
                return
            with _turns:
                stream = group.download_stream(file, start=start, end=end)
                try:
                    for piece in stream:
                        start += len(piece)
                        yield piece
                finally:
                    stream.cancel()
            if start != end:  # where it fails, it may end without a word
                self._is_of_use = False
        except (OSError, RuntimeError, httpx2.HTTPError, *NO_ANSWER):
            self._is_of_use = False  # who is asked by HTTP then says what is wrong

    def _opened(self, name: str) -> tuple[Any, Any]:
        """Return what hf_xet calls a file, if it is stored there, and who fetches it."""
        from hf_xet import XetFileInfo
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        if name in self._files:
            return self._files[name], self._group
        headers = request_headers()
        found = get_hf_file_metadata(
            hf_hub_url(self._repository, name, revision=self._commit),
            headers=headers,
            timeout=silence_seconds(),
        )
        data = found.xet_file_data
        if data is None or origin(data.refresh_route) != origin(endpoint()):  # it gets the token
            self._files[name] = None
            return None, None
        if self._group is None:
            self._group = _session().new_download_stream_group(
                token_refresh_url=data.refresh_route,
                token_refresh_headers=headers,
                custom_headers=request_headers(False),
            )
        self._files[name] = XetFileInfo(data.file_hash, found.size)
        return self._files[name], self._group


def _is_here() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


@cache
def _session() -> Any:
    from hf_xet import XetConfig, XetSession

    silence = {"client.read_timeout": f"{1000 * silence_seconds():.0f}ms"}
    return XetSession(XetConfig().with_config(SETTINGS | silence))

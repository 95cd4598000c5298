"""connect: chooses the transport for a URL."""

from __future__ import annotations

from cache.remote.http_transport import HttpTransport
from cache.remote.transport import Transport


def connect(url: str, *, timeout: float, create: bool) -> Transport:
    """Return the transport for ``url``. Nothing is asked of a server yet.

    Args:
        url: one that ``check`` has passed.
        timeout: seconds for which a server may send nothing.
        create: a local folder that is not there is made.

    Raises:
        Fault: the credentials, or a local folder, cannot be read.
    """
    kind = HttpTransport if url.startswith("http") else Transport
    return kind(url, timeout=timeout, create=create)

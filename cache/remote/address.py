"""address: the URL of a remote: whether it can be one, what people risk by it, how it is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from cache.errors import BadRemote
from cache.remote.credentials import REMOTE, USER, withheld

SCHEMES = ("s3", "gs", "az", "https", "http", "file")
_FOR_ANOTHER = (
    "is set, and not sent there: a password in the environment goes to the server that "
    f"{REMOTE} names. If it is for this one, set {REMOTE}, too, or use ~/.netrc."
)


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

"""credentials: where a remote's come from: the environment and the usual files.

What obstore finds by itself (``AWS_*``, ``GOOGLE_*``, ``AZURE_*``, an instance's own role) is
left to it. Nothing here is ever shown.
"""

from __future__ import annotations

import base64
import configparser
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

REMOTE = "MLX_MAKE_CACHE_REMOTE"
USER = "MLX_MAKE_REMOTE_USER"
PASSWORD = "MLX_MAKE_REMOTE_PASSWORD"

_AWS_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_AWS_SETTINGS = {
    "region": ("region", ("AWS_REGION", "AWS_DEFAULT_REGION")),
    "endpoint_url": ("endpoint", ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")),
}
# Each of these says that credentials come from elsewhere than a profile.
_AWS_ELSEWHERE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)


def aws_unsigned(
    profile: Mapping[str, str], environ: Mapping[str, str] = os.environ, *, blobs: bool
) -> bool:
    """Tell whether what is put need not be hashed for its signature.

    SHA-256 takes as long as all else of an upload. TLS guards what is on its way; of blobs, whoever
    fetches them holds every byte against the BLAKE3 that they are named by. Over http the signature
    is all that guards anything else. ``AWS_UNSIGNED_PAYLOAD`` says otherwise.

    Args:
        profile: as ``aws_profile`` returns it.
        environ: the environment.
        blobs: whether only blobs are put.
    """
    if "AWS_UNSIGNED_PAYLOAD" in environ:
        return environ["AWS_UNSIGNED_PAYLOAD"].lower() in ("1", "true", "yes", "on")
    if blobs:
        return True
    said = [profile.get("endpoint"), *map(environ.get, _AWS_SETTINGS["endpoint_url"][1])]
    return not any(endpoint and not endpoint.startswith("https:") for endpoint in said)


def aws_profile(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return what the profile in ``~/.aws`` says and the environment does not, for obstore.

    Only keys that stand in the files: for SSO and roles, ``aws configure export-credentials
    --format env`` puts them into the environment.
    """
    profile = environ.get("AWS_PROFILE", "default")
    keys = _section(environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), profile)
    section = profile if profile == "default" else f"profile {profile}"
    settings = _section(environ.get("AWS_CONFIG_FILE", "~/.aws/config"), section)
    options = {
        name: settings[key]
        for key, (name, variables) in _AWS_SETTINGS.items()
        if key in settings and not any(environ.get(variable) for variable in variables)
    }
    if not any(environ.get(variable) for variable in _AWS_ELSEWHERE):
        both = {**settings, **keys}
        options |= {name: both[key] for key, name in _AWS_KEYS.items() if key in both}
    return options


def _section(path: str, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(Path(path).expanduser(), encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):  # also theirs to complain about: aws does
        return {}
    return dict(parser[name]) if parser.has_section(name) else {}


def basic_auth(url: str, environ: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Return user and password for an HTTP server: the URL's, the environment's, ``~/.netrc``'s.

    Args:
        url: the remote's.
        environ: ``MLX_MAKE_REMOTE_USER`` and ``MLX_MAKE_REMOTE_PASSWORD``, for the server that
            ``MLX_MAKE_CACHE_REMOTE`` beside them names; ``NETRC`` names another file than
            ``~/.netrc``.
    """
    parts = urlsplit(url)
    if parts.username is not None:
        return unquote(parts.username), unquote(parts.password or "")
    if environ.get(USER) and not withheld(url, environ):
        return environ[USER], environ.get(PASSWORD, "")
    try:
        file = netrc.netrc(Path(environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return None
    login = file.authenticators(parts.hostname or "")
    return (login[0], login[2] or "") if login else None


def withheld(url: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether the environment has a password that is not for this HTTP server.

    Who clones a project has its models.toml name a server; a password of theirs is none of its.
    """
    return bool(environ.get(USER)) and _server(url) != _server(environ.get(REMOTE, ""))


def _server(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    try:
        return parts.scheme, parts.hostname, parts.port or {"https": 443}.get(parts.scheme, 80)
    except ValueError:  # the port is none
        return parts.scheme, None, None


def basic_header(auth: tuple[str, str]) -> str:
    """Return ``auth`` as the value of an Authorization header."""
    return "Basic " + base64.b64encode(":".join(auth).encode()).decode("ascii")

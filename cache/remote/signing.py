"""signing: records signed for a place that others can write to.

A signed record is canonical JSON, ``{"record": …, "signature": …}``. The signature is
HMAC-SHA256 over the record's kind and key and the record itself, so that an entry cannot be put
under another key. It says that somebody who holds the secret wrote the record; what the record
names by BLAKE3 digest is thereby vouched for too.
"""

from __future__ import annotations

import hmac
import json
from typing import Any

from cache.digest import canonical
from cache.errors import Refused

MOST_NESTED = 1_000_000  # lists and tables in a record, which take far more memory than bytes
_BEFORE, _BETWEEN, _AFTER = b'{"record":', b',"signature":"', b'"}'
_PURPOSE = "mlx-make record 1"  # a secret shared with another use yields no signature of ours


def sign(kind: str, key: str, record: Any, secret: bytes | None) -> bytes:
    """Return the bytes to keep under ``kind`` and ``key``, signed if there is a ``secret``.

    An empty secret is none: a CI service hands an unset one over as an empty string.
    """
    data = canonical(record)
    if not secret:
        return _BEFORE + data + b"}"
    return _BEFORE + data + _BETWEEN + _signature(kind, key, data, secret).encode() + _AFTER


def check_signature(kind: str, key: str, data: bytes, secret: bytes | None) -> Any:
    """Return the record in ``data``, found under ``kind`` and ``key``.

    With a secret nothing is parsed before its signature is found to be right. Without one it is not
    looked at.

    Raises:
        Refused: the bytes are no such record, or, with a secret, not signed with it.
    """
    name = f"{kind}/{key}"
    if secret:
        record, signature = _split(name, data)
        expected = _signature(kind, key, record, secret).encode()
        if not hmac.compare_digest(signature, expected):
            raise Refused(name, "its signature is not of the signing key that is set here")
    if data.count(b"[") + data.count(b"{") > MOST_NESTED:
        raise Refused(name, f"it holds more than {MOST_NESTED:,} lists and tables")
    try:
        return json.loads(data)["record"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(name, f"it is not a sealed record ({type(error).__name__})") from error


def _split(name: str, data: bytes) -> tuple[bytes, bytes]:
    """Return the bytes of a signed record and of its signature, as ``sign`` puts them together."""
    record, separator, signature = data.rpartition(_BETWEEN)
    if not data.startswith(_BEFORE):
        raise Refused(name, "it is not a sealed record")
    if not separator or not signature.endswith(_AFTER):
        raise Refused(name, "it is not signed")
    return record[len(_BEFORE) :], signature[: -len(_AFTER)]


def _signature(kind: str, key: str, record: bytes, secret: bytes) -> str:
    """Return the HMAC of ``[PURPOSE, KIND, KEY, RECORD]`` as canonical JSON."""
    head = canonical([_PURPOSE, kind, key])[:-1]
    return hmac.new(secret, head + b"," + record + b"]", "sha256").hexdigest()

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

_PURPOSE = "mlx-make record 1"  # a secret shared with another use yields no signature of ours


def sign(kind: str, key: str, record: Any, secret: bytes | None) -> bytes:
    """Return the bytes to keep under ``kind`` and ``key``, signed if there is a ``secret``.

    An empty secret is none: a CI service hands an unset one over as an empty string.
    """
    signed = {"record": record}
    if secret:
        signed["signature"] = _signature(kind, key, record, secret)
    return canonical(signed)


def check_signature(kind: str, key: str, data: bytes, secret: bytes | None) -> Any:
    """Return the record in ``data``, found under ``kind`` and ``key``.

    Without a secret a signature is not looked at.

    Raises:
        Refused: the bytes are no such record, or, with a secret, not signed with it.
    """
    name = f"{kind}/{key}"
    try:
        signed = json.loads(data)
        record = signed["record"]
        expected = _signature(kind, key, record, secret) if secret else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(name, f"it is not a sealed record ({type(error).__name__})") from error
    if expected is None:
        return record
    signature = signed.get("signature")
    if not isinstance(signature, str):
        raise Refused(name, "it is not signed")
    if not hmac.compare_digest(signature.encode("utf-8", "surrogatepass"), expected.encode()):
        raise Refused(name, "its signature is not of the signing key that is set here")
    return record


def _signature(kind: str, key: str, record: Any, secret: bytes) -> str:
    return hmac.new(secret, canonical([_PURPOSE, kind, key, record]), "sha256").hexdigest()

"""sealed: JSON that can tell whether it is what was written, and what it is the answer to.

```json
{"seal":"DIGEST","key":"KEY","value":…}
```
The seal is the digest of all bytes behind it, the key included: neither a flipped bit nor a record
that was put under another name is taken for the record that is asked for. It is no signature:
whoever can write to the folder can write a whole record.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from functools import cache
from typing import Any, Generic, TypeVar

import msgspec

from cache.digest import digest
from cache.errors import CacheError

_T = TypeVar("_T")
_HEAD = b'{"seal":"'
_BODY = len(_HEAD) + 32 + len(b'",')


class Damaged(CacheError):
    """Bytes that are not the record that is asked for. The message is the cause."""


class Unsealed(Damaged):
    """Bytes that were never sealed: those of an older version, or nobody's."""


class _Record(msgspec.Struct, Generic[_T], frozen=True, forbid_unknown_fields=True):
    seal: str
    key: str
    value: _T


def seal(key: str, value: Any) -> bytes:
    """Return the bytes to keep of ``value`` (JSON) under ``key``."""
    body = json.dumps({"key": key, "value": value}, separators=(",", ":")).encode()[1:]
    return b'%s%s",%s' % (_HEAD, digest(body).encode(), body)


def unseal(key: str, data: bytes, kind: type[_T]) -> _T:
    """Return the value in ``data``, found under ``key``.

    Args:
        key: what is asked for.
        data: the bytes.
        kind: the value's type, as msgspec takes it.

    Raises:
        Unsealed: it was never sealed.
        Damaged: it is not what was written, or another record, or of another type.
    """
    if not data.startswith(_HEAD):
        raise Unsealed("it is not sealed")
    body = memoryview(data)[_BODY:]
    if data[:_BODY] != b'%s%s",' % (_HEAD, digest(body).encode()):
        raise Damaged("its bytes are not those that were written")
    try:
        record = _decode(data, _type(kind))  # type: ignore[arg-type]  # types are hashable
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Damaged(f"it holds something else: {error}") from error
    if record.key != key:
        raise Damaged(f"it is the record of {record.key}")
    value: _T = record.value
    return value


def _decode(data: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError:  # msgspec knows neither halves of surrogate pairs nor NaN
        return msgspec.convert(json.loads(data), decoder.type)


@cache
def _type(kind: Hashable) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(_Record[kind])  # type: ignore[valid-type]

"""What can happen to a file's bytes: bits flip, digits change, runs go, come twice or move."""

import random
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw bytes that ``data`` could become; never ``data`` itself."""
    seed = draw(st.integers(0, 2**32 - 1))
    return mutated(data, random.Random(seed))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return bytes that ``data`` could become; never ``data`` itself."""
    while (other := chance.choice(_WAYS)(data, chance)) == data:
        pass
    return other


def _flip(data: bytes, chance: random.Random) -> bytes:
    flipped = bytearray(data or b"\0")
    flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def _digit(data: bytes, chance: random.Random) -> bytes:
    at = [index for index, byte in enumerate(data) if byte in b"0123456789abcdef"]
    if not at:
        return _flip(data, chance)
    index = chance.choice(at)
    return data[:index] + chance.choice(b"0123456789abcdef").to_bytes(1, "big") + data[index + 1 :]


def _run(data: bytes, chance: random.Random) -> tuple[int, int]:
    start, end = sorted(chance.randrange(len(data) + 1) for _ in "12")
    return start, min(end, start + chance.choice((1, 8, 100, len(data))))


def _cut(data: bytes, chance: random.Random) -> bytes:
    start, end = _run(data, chance)
    return data[:start] + data[end:]


def _twice(data: bytes, chance: random.Random) -> bytes:
    start, end = _run(data, chance)
    return data[:end] + data[start:]


def _replace(data: bytes, chance: random.Random) -> bytes:
    start, end = _run(data, chance)
    return data[:start] + chance.choice(_TOKENS) + data[end:]


def _token(data: bytes, chance: random.Random) -> bytes:
    """Put something else in place of a whole JSON token, so that it is JSON still."""
    import re

    spans = [match.span() for match in re.finditer(rb'"[^"]*"|-?\d+(\.\d+)?|true|false|null', data)]
    if not spans:
        return _replace(data, chance)
    start, end = chance.choice(spans)
    return data[:start] + chance.choice(_TOKENS) + data[end:]


def _value(data: bytes, chance: random.Random) -> bytes:
    """Put something else in place of a value of JSON, or of one of its tables' keys."""
    import json

    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return _token(data, chance)
    places = [*_places(record)]
    if not places:
        return _token(data, chance)
    table, key = chance.choice(places)
    way = chance.random()
    if way < 0.8:
        table[key] = chance.choice(_VALUES)
    elif way < 0.9:
        del table[key]
    else:
        other, there = chance.choice(places)
        table[key] = json.loads(json.dumps(other[there]))
    return json.dumps(record).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each table and list with each of its keys."""
    if isinstance(value, dict | list):
        for key, each in [*(value.items() if isinstance(value, dict) else enumerate(value))]:
            yield value, key
            yield from _places(each)


def _whole(data: bytes, chance: random.Random) -> bytes:
    return chance.choice(_TOKENS)


_TOKENS = (
    b"", b"null", b"true", b"0", b"-1", b"1e999", b"1000000000", b"9" * 30, b'""', b'"x"', b"[]",
    b"{}", b"[[]]", b'"\\ud800"', b'"../../x"', b"\xff\xfe", b"\0", b"[" * 2000, b'{"a":' * 2000,
    b'"' + b"x" * 999,
)  # fmt: skip
# Sizes that are none, or that would be memory; texts that are numbers, paths, or end a line.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 1 << 31, (1 << 32) + 1, 1 << 40, 1 << 63, -(1 << 63),
    10**30, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("nan"), "", "0", "x", "../../x",
    "/dev/zero", "a\nb\x1b[2J", "é\u202e", "int0", "x" * 100_000, [], {}, [[]], [0], [1, 2], [None],
    {"": None}, {"x": {}},
)  # fmt: skip
_WAYS = (
    _flip, _digit, _digit, _cut, _twice, _replace, _token, _token, _token, _whole, _value, _value
)  # fmt: skip

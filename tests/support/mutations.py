"""What can happen to a file's bytes: bits flip, digits change, runs go, come twice or move.

And to the values of JSON and TOML, which are others then: of another type or size, or off by
little; keys are others, come twice, or are in the wrong table.
"""

import copy
import json
import random
import re
import tomllib
from contextlib import suppress
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
    spans = [match.span() for match in re.finditer(rb'"[^"]*"|-?\d+(\.\d+)?|true|false|null', data)]
    if not spans:
        return _replace(data, chance)
    start, end = chance.choice(spans)
    return data[:start] + chance.choice(_TOKENS) + data[end:]


def _value(data: bytes, chance: random.Random) -> bytes:
    """Change up to three values of JSON or TOML, or keys of its tables, and write it anew."""
    for read, write in ((_from_json, _to_json), (_from_toml, to_toml)):
        try:
            record = {"": read(data)}
        except (ValueError, RecursionError):
            continue
        with suppress(RecursionError, TypeError):  # it is too deep, or what TOML has not
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                _change(record, chance)
            return write(record.get("")).encode(errors="surrogatepass")
    return _token(data, chance)


def _change(record: Any, chance: random.Random) -> None:
    record.setdefault("", None)
    places = _places(record)[1:] or [(record, "")]
    table, key = chance.choice(places)
    value, named = table[key], isinstance(table, dict)
    way = chance.choice(("other", "other", "near", "near", "gone", "copied", "key", "twice", "in"))
    if way == "other":
        table[key] = copy.copy(chance.choice(_VALUES))
    elif way == "near":
        table[key] = _near(value, chance)
    elif way == "gone":
        del table[key]
    elif way == "in":  # a list or a table, or many, each in the next
        for _ in range(chance.choice((1, 1, 2, 300))):
            value = [value] if chance.random() < 0.5 else {key: value}
        table[key] = value
    elif named and way == "key":
        table[chance.choice([*_WORDS, *(str(name) for _, name in places)])] = table.pop(key)
    elif named and way == "twice":  # a key that comes again, with another value
        table[_Again(key)] = copy.copy(chance.choice((*_VALUES, _near(value, chance))))
    else:
        other, there = chance.choice(places)
        table[key] = copy.deepcopy(other[there])


def _near(value: Any, chance: random.Random) -> Any:
    """Return what could stand for a value, or is off by little."""
    if isinstance(value, bool) or value is None:
        return chance.choice((not value, str(value).lower(), int(value or 0)))
    if isinstance(value, int | float):
        others = (value + 1, value - 1, -value, 2 * value, float(value), str(value), [value])
        return chance.choice(others)
    if isinstance(value, str):
        others = (value.upper(), f"{value} ", f"{value}x", value[:-1], value[::-1], [value])
        return chance.choice((*others, *_WORDS, value * 2))
    if isinstance(value, list):
        return chance.choice(
            (value * 2, value[::-1], value[1:], [*value, *[0] * 3000], [*value, None])
        )
    return chance.choice(([*value], [*value.values()], [value], {**value, "x": 1}))


class _Again(str):
    """A key that a table may have although it has it."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _from_json(data: bytes) -> Any:
    return json.loads(data)


def _to_json(record: Any) -> str:
    return json.dumps(record)


def _from_toml(data: bytes) -> Any:
    return tomllib.loads(data.decode())


def to_toml(record: Any) -> str:
    """Return TOML, a line for each key of the tables of the first two levels.

    Raises:
        TypeError: it is no table.
    """
    if not isinstance(record, dict):
        raise TypeError("TOML is a table")
    lines: list[str] = []
    for first, table in record.items():
        rows = table.items() if isinstance(table, dict) and table else [(None, table)]
        for key, value in rows:
            name = _toml(first) if key is None else f"{_toml(first)}.{_toml(key)}"
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    if value is None:  # TOML has none; and JSON no date
        return "1979-05-27"
    return json.dumps(value, ensure_ascii=False)


def _places(record: Any) -> list[tuple[Any, Any]]:
    """Return each table and list with each of its keys."""
    places: list[tuple[Any, Any]] = []
    left = [record]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            keys = [*value] if isinstance(value, dict) else range(len(value))
            places += ((value, key) for key in keys)
            left += (value[key] for key in keys)
    return places


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
    "/dev/zero", -1.5, [-1], "NaN", "1e999",
    "a\nb\x1b[2J", "é\u202e", "int0", "x" * 100_000, [], {}, [0], [1, 2], [None],
    {"": None}, {"x": {}},
)  # fmt: skip
# Keys and values that are known somewhere.
_WORDS = (
    "bits", "group_size", "mode", "method", "match", "rules", "quantize", "dtype", "source",
    "models", "affine", "mxfp4", "nvfp4", "gptq", "awq", "keep", "auto", "float16", "float32",
    "bfloat16", "cpu", "gpu", "mlx-lm", "mlx-vlm", "transformers", "all", "none", "*", "**",
    "{target}", "0GB", "1kB", "999999999999TB", "hf:org/model", ".", "/", "~", "model", "llama",
    "model_type", "qwen2", "quantization", "vocab_size", "num_hidden_layers", "version",
    "value", "seal", "tensors", "adapter", "candidates", "card", "cluster", "context",
    "dequantize", "device", "exact", "files", "fit", "imatrix", "layout", "loader", "matrix",
    "max_shard_size", "memory", "min_bits", "publish", "recipe", "remote", "skip", "target_bpw",
    "text", "top_logits", "variants",
)  # fmt: skip
_WAYS = (
    _flip, _digit, _digit, _cut, _twice, _replace, _token, _token, _token, _whole,
    *[_value] * 10,
)  # fmt: skip

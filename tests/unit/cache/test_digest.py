"""Canonical bytes, and the digests of them, for any record."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache.digest import canonical, digest, digest_list, digest_record, plain
from support.strategies import records

# On a busy machine any example may seem slow.
calm = settings(deadline=None)


def turned(record: Any) -> Any:
    """The same with each table's keys the other way round."""
    if isinstance(record, dict):
        return {key: turned(record[key]) for key in reversed(record)}
    if isinstance(record, list):
        return [turned(value) for value in record]
    return record


@calm
@given(record=records)
def test_canonical_bytes_know_no_order_of_keys(record: Any) -> None:
    data = canonical(record)
    assert canonical(turned(record)) == data
    assert json.loads(data) == record
    assert b"\n" not in data
    assert digest_record(turned(record)) == digest(data)


WHOLE = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(st.characters())


@calm
@given(record=st.recursive(WHOLE, lambda r: st.lists(r) | st.dictionaries(st.text(), r)))
@example(record={"\ud800": '\x00\x1f\x7f"\\/\u2028'})
def test_plain_bytes_are_the_canonical_ones(record: Any) -> None:
    assert plain(record) == canonical(record)


@calm
@given(items=st.lists(records))
def test_items_have_the_digest_of_their_list(items: list[Any]) -> None:
    assert digest_list(iter(items)) == digest_record(items)


@calm
@given(one=records, other=records)
def test_canonical_bytes_tell_records_apart(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (json.dumps(one) == json.dumps(other)) or (
        one == other  # but for the order of keys, and 0.0 and -0.0
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_json_cannot_say_has_no_canonical_bytes(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": [number]})


def test_a_golden_digest() -> None:
    """Other digests are another cache: everything is built anew."""
    assert digest(b"") == "99aa06d3014798d86001c324468d497f"
    record = {"b": [1, None, "ä"], "a": {"c": 0.5}}
    assert canonical(record) == '{"a":{"c":0.5},"b":[1,null,"ä"]}'.encode()

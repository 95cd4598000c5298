"""Manifests come back as they were; what is none, or is damaged, is told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.digest import canonical, digest, digest_record
from cache.records.manifests import SCHEMA, Action, Manifest, ManifestError, Tensor
from support.strategies import records

# On a busy machine any example may seem slow.
calm = settings(deadline=None)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
digests = st.binary(max_size=3).map(digest)
tensors = st.builds(
    Tensor,
    st.sampled_from(["float16", "bfloat16", "uint32"]),
    st.lists(st.integers(0, 10**6), max_size=4).map(tuple),
    digests,
)
manifests = st.builds(
    Manifest,
    st.builds(Action, names, st.integers(0, 99), records, st.dictionaries(names, digests)),
    st.dictionaries(names, tensors, max_size=4),
    st.lists(names, max_size=2).map(tuple),
)


@calm
@given(manifest=manifests)
def test_manifests_come_back(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert list(again.tensors) == list(manifest.tensors)  # in the layer's own order
    assert again.to_bytes() == data
    assert again.result == manifest.result
    assert again.action.key == manifest.action.key


def read(data: bytes) -> Manifest | None:
    """None for what is no manifest; any other exception is a failure."""
    try:
        return Manifest.from_bytes(data)
    except ManifestError:
        return None


@calm
@given(manifest=manifests, data=st.data())
def test_damaged_manifests(manifest: Manifest, data: st.DataObject) -> None:
    """A byte changed, or some cut off or added: it is refused, or says the same of the tensors."""
    whole = manifest.to_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    assert read(whole[:position]) is None
    assert read(whole + b"x") is None
    found = read(whole[:position] + bytes([byte]) + whole[position + 1 :])
    assert found is None or found.tensors == manifest.tensors


@calm
@given(manifest=manifests, data=st.data())
def test_manifests_with_a_value_of_another_kind(manifest: Manifest, data: st.DataObject) -> None:
    """Each key in turn missing, or anything at all; numbers that JSON has not, too."""
    record = json.loads(manifest.to_bytes())
    key = data.draw(st.sampled_from(sorted(record)))
    other = data.draw(records | st.sampled_from([float("nan"), [float("inf")]]))
    less = {name: value for name, value in record.items() if name != key}
    assert read(json.dumps(less).encode()) is None
    found = read(json.dumps({**record, key: other}).encode())
    assert found is None or key in ("action", "notes") or other == record[key]


@calm
@given(data=st.binary(max_size=40) | records.map(lambda record: json.dumps(record).encode()))
def test_what_is_no_manifest(data: bytes) -> None:
    assert read(data) is None


def test_a_manifest_nested_without_end() -> None:
    assert read(b"[" * 100_000) is None


def test_a_manifest_of_numbers_that_json_has_not() -> None:
    tensor = ["a", "float16", [float("nan")], digest(b"")]
    record = json.loads(Manifest(Action("cast", 1, {}, {}), {}).to_bytes())
    assert read(json.dumps({**record, "tensors": [tensor]}).encode()) is None


@pytest.mark.parametrize(
    "tensor",
    [
        ["a", "float16", [1], "../" + "0" * 29],
        ["a", "float16", [1], "../../etc/passwd"],  # a digest becomes part of a path
        ["a", "float16", [1], digest(b"").upper()],
        ["a", "float16", [1], None],
        ["a", "float16", [-1], digest(b"")],
        ["a", "float16", [True], digest(b"")],
        ["a", "float16", 1, digest(b"")],
        ["a", "float17", [1], digest(b"")],
        ["a", ["float16"], [1], digest(b"")],
        ["a", "float16", [1]],
    ],
)
def test_a_manifest_of_what_is_no_tensor(tensor: list[object]) -> None:
    """Whoever can write to a remote can say anything."""
    made = {"a": Tensor("float16", (1,), digest(b""))}
    whole = Manifest(Action("cast", 1, {}, {}), made)
    assert read(whole.to_bytes()) == whole
    record = json.loads(whole.to_bytes()) | {"tensors": [tensor]}
    record["result"] = digest_record([tensor])
    assert read(canonical(record)) is None


def test_a_newer_schema_is_refused() -> None:
    data = Manifest(Action("cast", 1, {}, {}), {}).to_bytes()
    newer = data.replace(b'"schema":%d' % SCHEMA, b'"schema":%d' % (SCHEMA + 1))
    assert newer != data
    with pytest.raises(ManifestError, match=rf"schema {SCHEMA + 1}.* reads {SCHEMA}: update"):
        Manifest.from_bytes(newer)

"""A record that is not what was written, or another's, is never read as the one asked for."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.blobs import Blobs
from cache.errors import BlobLost
from cache.records.manifests import Action, Manifest, ManifestError, Tensor
from cache.records.memos import Memos
from cache.records.sealed import Damaged, Unsealed, seal, unseal
from support.mutations import mutations

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=10,
)


@given(JSON, st.text())
def test_what_is_sealed_comes_back(value: Any, key: str) -> None:
    found: Any = unseal(key, seal(key, value), object)
    assert repr(found) == repr(value)  # NaN is not equal to itself


@given(st.data(), JSON)
def test_what_is_damaged_is_refused(data: st.DataObject, value: Any) -> None:
    whole = seal("kind/key", value)
    damaged = data.draw(mutations(whole))
    with pytest.raises(Damaged):
        unseal("kind/key", damaged, object)


def test_another_record_is_refused() -> None:
    with pytest.raises(Damaged, match="it is the record of b"):
        unseal("a", seal("b", 1), int)


def test_another_type_is_refused() -> None:
    with pytest.raises(Damaged, match="holds something else"):
        unseal("a", seal("a", [1, "2"]), list[int])


def test_what_an_older_version_wrote_is_no_memo(tmp_path: Path) -> None:
    memos = Memos(tmp_path)
    memos.put("kind", ["question"], {"answer": 1})
    assert memos.get("kind", ["question"], dict[str, int]) == {"answer": 1}
    (path,) = tmp_path.glob("kind/*/*.json")
    path.write_bytes(b'{"answer":1}')
    assert memos.get("kind", ["question"], dict[str, int]) is None
    with pytest.raises(Unsealed):
        unseal("a", path.read_bytes(), object)
    memos.put("kind", ["question"], {"answer": 1})
    assert memos.get("kind", ["question"], dict[str, int]) == {"answer": 1}


@pytest.mark.parametrize(
    "junk",
    [b"", b"1", b"{}", b"[[]]", b"[[1,0,1]]", b'[["a",0]]', b'[["a",-1,1]]', b'[["a",0,"1"]]',
     b'[["a",0,1,2]]', b'[["a\\u0000",0,1]]', b"[" * 100_000, b'{"seal":"', b"\xff"],
)  # fmt: skip
def test_what_is_no_reference(junk: bytes, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest = "ab" * 16
    path = tmp_path / "ab" / f"{digest[2:]}.parts"
    path.parent.mkdir()
    path.write_bytes(junk)
    with pytest.raises(Damaged):
        blobs.reference(path)
    with pytest.raises(BlobLost):
        blobs.locate(digest, 1)


@given(st.data())
def test_a_damaged_manifest_is_none(data: st.DataObject) -> None:
    """Whatever of it: its action's parameters and its notes too."""
    action = Action("cast", 1, {"dtypes": {"a": "float16"}}, {"a": ["bfloat16", [2], "0" * 32]})
    manifest = Manifest(
        action, {"a": Tensor("float16", (2,), "1" * 32)}, ('"seal":"","tensors":[',)
    )
    whole = manifest.to_bytes()
    assert Manifest.from_bytes(whole) == manifest
    assert Manifest.from_bytes(manifest.to_bytes(sealed=False)) == manifest
    with pytest.raises(ManifestError):
        Manifest.from_bytes(data.draw(mutations(whole)))

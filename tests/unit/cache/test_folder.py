"""A folder is a cache's by its tag, or by what lies in it; in any other nothing is removed."""

from pathlib import Path

import pytest

from cache import folder
from cache.folder import CONTENT, TAG, NotACache
from cache.lock import Lock
from cache.maintenance import survey
from cache.store import Store

KEY = Path("ab") / f"{'0' * 30}.json"


@pytest.mark.parametrize("there", [None, (), ("lost+found",), ("blobs", "turn", "lock")])
def test_what_becomes_a_cache(there: tuple[str, ...] | None, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    for name in there or ():
        (root / name).mkdir(parents=True)
    folder.check(root)
    assert root.exists() == bool(there)
    folder.claim(root)
    assert (root / TAG).read_bytes() == CONTENT
    folder.claim(root)
    (root / "mine").touch()
    folder.check(root)  # it is tagged


@pytest.mark.parametrize("records", ["actions", "memos/kind"])
def test_a_cache_without_a_tag_is_known_by_its_results(records: str, tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / records / KEY).parent.mkdir(parents=True)
    (tmp_path / records / KEY).touch()
    with Lock(tmp_path).using():
        pass
    assert (tmp_path / TAG).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["models.toml", "actions/note.json", "sources/x", TAG])
def test_what_is_no_cache(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(CONTENT[:43])  # a tag alone is any program's
    (tmp_path / "more").touch()
    for refused in (
        folder.claim,
        folder.check,
        Store.at,
        lambda root: Store.at(root, read_only=True),
    ):
        with pytest.raises(NotACache, match="is no cache: it holds"):
            refused(tmp_path)
    with pytest.raises(NotACache), Lock(tmp_path).using():
        pass
    with pytest.raises(NotACache), Lock(tmp_path).alone(lambda: None):
        pass
    assert not (tmp_path / "turn").exists()


def test_only_its_own_names_are_looked_at(tmp_path: Path) -> None:
    mine = ["corrupt/report.txt", ".tmp-mine", "notes/.tmp-mine", "blobs/readme", "photos/ab/x"]
    own = ["blobs/.tmp-host-1-2", f"corrupt/actions/{KEY}", f"actions/{KEY}"]
    for name in (*mine, *own):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {str(file.path.relative_to(tmp_path)) for file in survey.inventory(tmp_path).files}
    assert found == set(own)

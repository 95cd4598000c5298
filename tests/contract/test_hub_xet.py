"""Files that a hub keeps in Xet are read by hf_xet's own ranges, and by HTTP what it does not give.

The real hf_xet, from a storage of the tests.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import hub_server, inside, projects, xet_server
from support.hub_server import TOKEN, Hub
from support.xet_server import XetStorage
from tasks.checkpoints import hub_ranges, hub_xet
from tasks.checkpoints.hub_client import snapshot

WEIGHTS = random.Random(7).randbytes(3_000_001)
SPANS = ((0, 10), (10, 70_000), (65_536, 131_072), (1_000_003, 1_999_998), (0, 3_000_001))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server.serve(tmp_path / "uploaded") as hub:
        yield hub


@pytest.fixture
def storage(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[XetStorage]:
    monkeypatch.setattr(hub_xet, "LEAST_BYTES", 1000)
    monkeypatch.setitem(hub_xet.SETTINGS, "client.retry_base_delay", "10ms")
    with xet_server.serve(hub.stored) as storage:
        hub.xet_url = storage.url
        with hub.inside(tmp_path / "home"):
            yield storage


def ranges(hub: Hub) -> hub_ranges.Ranges:
    hub.repository("org/model").add({"a/model.safetensors": WEIGHTS, "config.json": b"{}"})
    found = snapshot("org/model", None)
    return hub_ranges.Ranges("org/model", found.commit, found.files)


def read(files: hub_ranges.Ranges, spans: tuple[tuple[int, int], ...] = SPANS) -> None:
    for start, nbytes in spans:
        data = b"".join(files.read("a/model.safetensors", start, nbytes))
        assert data == WEIGHTS[start:][:nbytes]


def by_http(hub: Hub) -> int:
    return sum(request.sent for request in hub.asked(storage=True))


def test_ranges_come_by_xet(hub: Hub, storage: XetStorage) -> None:
    read(ranges(hub))
    assert by_http(hub) == 10  # of less than the least
    assert len(hub.asked(path="xet-read-token")) == 1
    assert len(hub.asked("HEAD")) == 1
    assert storage.requests
    assert not any(TOKEN in (request.authorization or "") for request in storage.requests)


@pytest.mark.parametrize("place", ["/v1/", "/xorb/", "/xorb/{sha256}/2"])
def test_what_xet_does_not_give_comes_by_http(hub: Hub, storage: XetStorage, place: str) -> None:
    files = ranges(hub)
    where = place.format(sha256=files.files["a/model.safetensors"].digest[7:])
    storage.fails = lambda request: where in request.path
    read(files, ((0, 3_000_001),))
    assert storage.requests
    assert 0 < by_http(hub) <= 3_000_001
    storage.fails = lambda request: False
    hub.requests.clear()
    read(files)  # all, since it is not asked again
    assert by_http(hub) == sum(nbytes for _, nbytes in SPANS)


def test_a_storage_that_is_not_there(hub: Hub, storage: XetStorage) -> None:
    hub.xet_url = "http://127.0.0.1:1"
    read(ranges(hub))
    assert not storage.requests


def test_the_token_goes_to_no_other_host(hub: Hub, storage: XetStorage) -> None:
    files = ranges(hub)
    sha256 = files.files["a/model.safetensors"].digest[7:]
    headers = {
        "Location": hub.signed(f"/file/{sha256}"),
        "X-Repo-Commit": files.commit,
        "X-Linked-Etag": f'"{sha256}"',
        "X-Linked-Size": str(len(WEIGHTS)),
        "X-Xet-Hash": sha256,
        "Link": f'<{storage.url}/token>; rel="xet-auth"',
    }
    elsewhere = hub_server.Answer(302, headers=headers)
    hub.fault = lambda request: elsewhere if request.method == "HEAD" else None
    read(files)
    assert not storage.requests


def test_a_build(hub: Hub, storage: XetStorage, tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", "huggingface", **projects.FOUR_BIT)
    inside.doit(project.folder)
    expected = project.built()
    hub.repository("org/model").add_folder(project.checkpoint)
    (tmp_path / "other").mkdir()
    project.configure(source="hf:org/model")
    (tmp_path / "other" / "models.toml").write_bytes((project.folder / "models.toml").read_bytes())
    inside.doit(tmp_path / "other")
    found = projects.contents(tmp_path / "other" / "build" / "model")
    assert {n: d for n, d in found.items() if n != "README.md"} == {
        n: d for n, d in expected.items() if n != "README.md"
    }
    size = sum(path.stat().st_size for path in project.checkpoint.glob("*.safetensors"))
    assert storage.requests
    assert by_http(hub) < size / 2

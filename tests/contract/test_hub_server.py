"""The hub of the tests speaks what huggingface_hub's own client asks, and misbehaves when told."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    errors,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)

from support import hub_server
from support.hub_repositories import Generated, Span

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def hub(tmp_path):
    with hub_server.serve(tmp_path / "storage") as hub, hub.inside(tmp_path / "home"):
        yield hub


@pytest.fixture
def model(hub):
    repository = hub.repository("org/model")
    files = {
        "config.json": b"{}",
        "a/model.safetensors": WEIGHTS,
        "README.md": b"---\ntags: [a]\n---\n",
    }
    repository.add(files)
    return repository


def test_repositories_are_listed_and_their_files_downloaded(hub, model, tmp_path):
    api = HfApi()
    old = model.head
    new = model.add({"config.json": b'{"a": 1}', **{f"more/{i}.txt": b"x" for i in range(5)}})
    hub.page = 3
    info = api.model_info("org/model", files_metadata=True)
    assert (info.sha, info.card_data.tags) == (new, ["a"])
    (large,) = (file for file in info.siblings if file.lfs)
    assert (large.rfilename, large.size) == ("a/model.safetensors", len(WEIGHTS))
    assert large.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    tree = list(api.list_repo_tree("org/model", recursive=True))
    assert sorted(file.rfilename for file in info.siblings) == [
        entry.path for entry in tree if hasattr(entry, "blob_id")
    ]
    assert [ref.target_commit for ref in api.list_repo_refs("org/model").branches] == [new]
    assert [c.commit_id for c in api.list_repo_commits("org/model")][:2] == [new, old]
    assert [p.path for p in api.get_paths_info("org/model", ["a", "config.json"])] == [
        "a",
        "config.json",
    ]
    folder = snapshot_download("org/model", revision=old)
    assert (tmp_path / folder / "a/model.safetensors").read_bytes() == WEIGHTS
    assert (tmp_path / folder / "config.json").read_bytes() == b"{}"
    assert all("authorization" not in asked.headers for asked in hub.asked(storage=True))


def test_files_are_committed(hub, tmp_path):
    api = HfApi()
    api.create_repo("org/new", private=True)
    assert api.create_repo("org/new", exist_ok=True) == f"{hub.url}/org/new"
    files = {"model.safetensors": WEIGHTS, "a.json": b"{}"}
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    add = [
        CommitOperationAdd("model.safetensors", tmp_path / "model.safetensors"),
        CommitOperationAdd("a.json", b"{}"),
    ]
    parent = hub.repositories["org/new"].head
    api.create_commit("org/new", add, commit_message="first", parent_commit=parent)
    found = hub.repositories["org/new"].files
    assert {name: b"".join(found[name].content.read(0, 1 << 20)) for name in files} == files
    assert sum(asked.received for asked in hub.asked("PUT")) == len(WEIGHTS)
    api.create_commit(
        "org/new",
        [
            CommitOperationAdd("copy.safetensors", WEIGHTS),  # is there, and is not sent again
            CommitOperationDelete("a.json"),
        ],
        commit_message="second",
    )
    assert sorted(hub.repositories["org/new"].files) == [
        ".gitattributes",
        "copy.safetensors",
        "model.safetensors",
    ]
    assert len(hub.asked("PUT")) == 1
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(
            "org/new",
            [CommitOperationAdd("a.json", b"[]")],
            commit_message="third",
            parent_commit=parent,
        )
    collection = api.create_collection("Some models", namespace="org")
    again = api.create_collection("Some models", namespace="org", exists_ok=True)
    assert collection.slug == again.slug
    api.add_collection_item(collection.slug, "org/new", "model")
    api.add_collection_item(collection.slug, "org/new", "model", exists_ok=True)
    assert [item.item_id for item in api.get_collection(collection.slug).items] == ["org/new"]


def test_who_may_not_is_refused(hub, model, tmp_path):
    hub.repository("org/secret", private=True)
    gated = hub.repository("org/gated", gated=True)
    gated.add({"config.json": b"{}"})
    hub.accounts["hf_reader"] = hub_server.Account("reader", writes=False)
    nobody, reader = HfApi(token=False), HfApi(token="hf_reader")
    for api in (nobody, reader):
        with pytest.raises(errors.RepositoryNotFoundError):
            api.model_info("org/secret")
        assert api.model_info("org/gated").gated == "manual"
        with pytest.raises(errors.GatedRepoError, match="ask for access"):
            api.hf_hub_download("org/gated", "config.json", local_dir=tmp_path / "gated")
    gated.admitted.add("reader")
    reader.hf_hub_download("org/gated", "config.json", local_dir=tmp_path / "gated")
    with pytest.raises(errors.RepositoryNotFoundError):
        nobody.model_info("org/none")
    with pytest.raises(errors.RevisionNotFoundError):
        nobody.model_info("org/model", revision="none")
    with pytest.raises(errors.EntryNotFoundError):
        nobody.hf_hub_download("org/model", "none")
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        reader.create_repo("org/mine")
    with pytest.raises(errors.HfHubHTTPError, match="no right"):
        reader.create_commit(
            "org/model", [CommitOperationAdd("a", b"a")], commit_message="a", repo_type="model"
        )
    with pytest.raises(errors.HfHubHTTPError, match="token"):
        HfApi(token="hf_wrong").whoami()
    assert HfApi().whoami()["name"] == "somebody"
    with pytest.raises(ValueError, match="base_model"):
        HfApi().create_commit(
            "org/model",
            [CommitOperationAdd("README.md", b"---\nbase_model: /a/folder\n---\n")],
            commit_message="a",
        )


def _get(span=(0, 4096), name="a/model.safetensors"):
    url = hf_hub_url("org/model", name)
    return get_session().get(url, headers={"Range": f"bytes={span[0]}-{span[1] - 1}"}, timeout=5)


def test_it_misbehaves_when_told(hub, model):
    def storage_only(fault):
        hub.fault = lambda asked: fault if asked.storage else None

    assert _get((5, 300)).content == WEIGHTS[5:300]
    assert hub.requests[-1].span == (5, 300)
    assert hub.requests[-1].sent == 295
    hub.fault = lambda asked: hub_server.busy(3)
    assert (_get().status_code, _get().headers["Retry-After"]) == (429, "3")
    for cut in (0, 1000):
        storage_only(hub_server.Cut(cut))
        with pytest.raises(Exception, match=r"(?i)reset|disconnected|closed|broken"):
            _get()
        assert hub.requests[-1].sent == cut
    storage_only(hub_server.Stall(1000, 0.05))
    assert _get().content == WEIGHTS[:4096]
    storage_only(hub_server.Longer(10))
    assert len(_get().content) == 4106
    storage_only(hub_server.Shorter(10))
    assert _get().content == WEIGHTS[:4086]
    storage_only(hub_server.Flipped(7))
    assert [i for i, byte in enumerate(_get().content) if byte != WEIGHTS[i]] == [7]
    storage_only(hub_server.Unranged())
    assert (_get().status_code, _get().content) == (200, WEIGHTS)
    storage_only(hub_server.Expired())
    assert _get().status_code == 403
    storage_only(None)
    signed = get_session().head(
        hf_hub_url("org/model", "a/model.safetensors"), follow_redirects=False
    )
    hub.fault = lambda asked: hub_server.Expired() if asked.storage else None
    assert get_session().get(signed.headers["Location"]).status_code == 403
    storage_only(None)
    assert get_session().get(signed.headers["Location"]).status_code == 403
    assert _get().content == WEIGHTS[:4096]  # by an address of its own
    hub.address_seconds = -1
    assert _get().status_code == 403


def test_generated_bytes_are_served_at_a_rate(hub, model, tmp_path):
    data = bytes(range(256)) * 300
    (tmp_path / "bytes").write_bytes(data)

    def spans(start, nbytes):  # the same bytes over and over
        stop = start + nbytes
        while start < stop:
            at = start % len(data)
            span = Span(file.fileno(), at, min(len(data) - at, stop - start))
            start += span.nbytes
            yield span

    with open(tmp_path / "bytes", "rb") as file:
        model.add({"big.safetensors": Generated(4 << 20, spans)})
        hub.rate = 16 << 20
        path = Path(hf_hub_download("org/model", "big.safetensors"))
        assert _get((76799, 76802), "big.safetensors").content == b"\xff\0\1"
    assert path.read_bytes() == (data * 55)[: 4 << 20]


def test_a_client_in_another_process_finds_it_by_its_variables(hub, model, tmp_path):
    code = """if True:
        from huggingface_hub import HfApi
        print(HfApi().whoami()["name"], HfApi().model_info("org/model").sha)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environ(tmp_path / "other"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["somebody", model.head]

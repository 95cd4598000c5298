"""Reading from the hub: right, or an error that says what to do; the token goes nowhere else."""

import gzip
import hashlib
import json
import logging
import random
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from cache.records.memos import Memos
from support import checkpoints, hub_server, servers
from support.hub_repositories import Repository
from support.hub_server import (
    TOKEN,
    Account,
    Cut,
    Expired,
    Fault,
    Hub,
    Longer,
    Request,
    Shorter,
    Stall,
    Unranged,
    busy,
)
from support.servers import Answer
from tasks.checkpoints import hub as hub_source
from tasks.checkpoints import hub_ranges, hub_requests, hub_session, loaders
from tasks.checkpoints.folder import FolderSource
from tasks.checkpoints.hub import HubSource
from tasks.checkpoints.hub_client import HubFile
from tasks.checkpoints.hub_errors import HubUnreachable
from tasks.checkpoints.hub_requests import page
from tasks.checkpoints.small_files import read_bytes
from tasks.checkpoints.source import LockedCommit, Opening
from tasks.core.errors import CheckpointError
from tasks.layouts.registry import is_read

WEIGHTS = random.Random(7).randbytes(700_001)
UNDER_WAY = 2**17
RANGES = ((0, 10), (10, 200_000), (650_001, 50_000), (200_010, 449_991), (0, 700_001))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(hub_requests, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    with hub_server.serve(tmp_path / "uploaded") as hub, hub.inside(tmp_path / "home"):
        yield hub


@pytest.fixture
def repository(hub: Hub) -> Repository:
    repository = hub.repository("org/model")
    repository.add({"model.safetensors": WEIGHTS, "config.json": b"{}", "sub/a.pth": WEIGHTS[:99]})
    return repository


@pytest.fixture
def open_source(tmp_path: Path) -> Callable[[str], HubSource]:
    def open_source(text: str = "org/model", **keys: object) -> HubSource:
        opening = Opening(is_read, Memos(tmp_path / "memos"), str(tmp_path), **keys)
        return hub_source.open_source(hub_source.locate(text, tmp_path), opening)

    return open_source


def read(source: HubSource) -> None:
    for start, nbytes in RANGES:
        data = b"".join(source.read("model.safetensors", start, nbytes))
        assert data == WEIGHTS[start:][:nbytes]


def once(fault: Fault, place: int, hub: Hub) -> None:
    """Have a fault happen to the request of that number from now on."""
    first = len(hub.requests)
    hub.fault = lambda request: fault if request.count == first + place else None


PASSING = (
    Cut(0), Cut(1), Cut(9), Cut(40_000), Stall(0, 1), Stall(7, 1), Stall(30_000, 1),
    busy(0), busy(0, 503), busy(0, 500), Answer(502, b"<html>", {}), Expired(), Shorter(1),
    Shorter(9),
)  # fmt: skip


@pytest.fixture(params=[False, True], ids=["by the client", "past it"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How most of a large answer is read."""
    if request.param:
        monkeypatch.setattr(hub_ranges, "PAST_BYTES", 1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fault", PASSING, ids=repr)
def test_what_passes(fault: Fault, hub: Hub, repository: Repository, open_source) -> None:
    """It goes on at the byte where it ended, and what was there is not asked for again."""
    places = range(6)
    for place in places:
        source = open_source()
        assert source.revision == repository.head
        once(fault, place, hub)
        read(source)
        assert hub.requests[-1].count >= place
    sent = sum(request.sent for request in hub.asked(storage=True))
    # What was under way as the connection ended comes twice.
    assert sent <= len(places) * (sum(nbytes for _, nbytes in RANGES) + UNDER_WAY)


def test_a_client_that_another_thread_closes(
    repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the client's own retries do; answers to the next one are bounded, too."""
    import httpx2
    from huggingface_hub.utils import close_session, get_session

    source, closed = open_source(), httpx2.Client()
    closed.close()
    clients = [closed]
    real = hub_session.session
    monkeypatch.setattr(hub_ranges, "session", lambda: clients.pop() if clients else real())
    read(source)
    assert not clients
    close_session()
    monkeypatch.setattr(hub_session, "MAX_PARSED_BYTES", 10)
    with pytest.raises(ValueError, match="over 10 bytes"):
        get_session().get(page("api/models/org/model"))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("fault", [Longer(1), Longer(100_000), Unranged()], ids=repr)
def test_what_is_no_answer(fault: Fault, hub: Hub, repository: Repository, open_source) -> None:
    for place in range(1, 5):
        source = open_source()
        assert source.available
        once(fault, place, hub)
        with pytest.raises(CheckpointError, match="the server gives"):
            read(source)


def says(**keys: object) -> bytes:
    """What a hub answers of a repository, with something else in it."""
    file = {"rfilename": "model.safetensors", "size": 700_001, "blobId": "b" * 40}
    siblings = [file | keys.pop("file", {})]
    return json.dumps({"id": "org/model", "sha": "a" * 40, "siblings": siblings} | keys).encode()


NO_REPOSITORY = {
    "portal": b"<html>log in</html>", "null": b"null", "list": b"[1, 2]", "no id": b"{}",
    "no text": b"\xff\xfe{", "nested": b'{"x":' + b"[" * 200_000, "commit": says(sha=7),
    "no commit": says(sha="main"), "files": says(siblings="xyz"), "date": says(lastModified="now"),
    "nameless": says(siblings=[{"size": 3}]), "name": says(file={"rfilename": 7}),
    "outside": says(file={"rfilename": "../../passwd"}), "size": says(file={"size": "12"}),
    "negative": says(file={"size": -5}), "huge": says(file={"size": 2**63}),
    "lfs": says(file={"lfs": "x"}), "git": says(file={"blobId": "main"}),
    "sha256": says(file={"lfs": {"sha256": "zz" * 32, "size": 1, "pointerSize": 1}}),
    "number": says(file={"lfs": {"sha256": 7, "size": 1, "pointerSize": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("body", [b" " * 2_000_000, gzip.compress(b"[" * 50_000_000)])
def test_an_answer_that_takes_the_memory(
    body: bytes, hub: Hub, repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository, of where its files lie, and an error."""
    monkeypatch.setattr(hub_session, "MAX_PARSED_BYTES", 1_000_000)
    packed = {"Content-Encoding": "gzip"} if body[:2] == b"\x1f\x8b" else {}
    hub.fault = lambda request: Answer(200, body, packed)
    told = refusal(open_source())
    assert "gives no answer of a hub" in told
    assert "over 1,000,000 bytes" in told or "bytes encoded as gzip" in told
    hub.fault = lambda request: Answer(500, body, packed)
    assert len(refusal(open_source())) < 1000
    hub.fault = lambda request: Answer(200, body, packed) if "/lfs/" in request.path else None
    read(open_source())


def test_an_answer_in_drips(
    hub: Hub, repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_requests, "PROGRESS_SECONDS", -1.0)  # so that any is late
    assert "bytes came in" in refusal(open_source())


@pytest.mark.parametrize("body", NO_REPOSITORY.values(), ids=NO_REPOSITORY)
def test_what_is_no_repository(body: bytes, hub: Hub, repository: Repository, open_source) -> None:
    hub.fault = lambda request: Answer(200, body, {})
    told = refusal(open_source())
    assert f"{hub.url} gives no answer of a hub for what it holds of org/model: " in told
    assert "\n" not in told
    assert len(hub.requests) < 10


DIGITS = "9" * 5000
NO_RANGE = {
    **{
        f"to {place!r}": Answer(302, b"", {"Location": place})
        for place in ("http://[", "http://x:99999999/", "ftp://x/y", "http://exa mple/", "//")
    },
    "size": Answer(206, b"x", {"Content-Range": f"bytes 0-9/{DIGITS}"}),
    "start": Answer(206, b"x", {"Content-Range": f"bytes {DIGITS}-9/{DIGITS}"}),
    "wait": Answer(429, b"", {"Retry-After": "\u00b2"}),
    "date": Answer(503, b"", {"Retry-After": "Mon, 99 Foo 0000"}),
    "limit": Answer(429, b"", {"RateLimit": f'"api";r=0;t={DIGITS}'}),
    "encoded": Answer(206, b"x", {"Content-Range": "bytes 0-9/9", "Content-Encoding": "gzip"}),
    "error": Answer(418, b'[{"error": 7}]', {}),
}


@pytest.mark.parametrize("answer", NO_RANGE.values(), ids=NO_RANGE)
def test_what_is_no_range(answer: Answer, hub: Hub, repository: Repository, open_source) -> None:
    source = open_source()
    assert source.available
    hub.fault = lambda request: answer
    with pytest.raises(CheckpointError, match=r"org/model|cannot be reached|status"):
        list(source.read("model.safetensors", 0, 10))


@pytest.mark.parametrize(
    "said",
    [
        b'{"objects":[],"x":' + b"[" * 200_000,
        *(
            {"objects": [{"oid": "OID", "actions": {"download": {"href": href}}}]}
            for href in ("http://[", "http://x:99999999/", "http:", "file:///etc/passwd", 7)
        ),
    ],
    ids=lambda said: str(said)[-60:],
)
def test_no_place_of_a_large_file(said, hub: Hub, repository: Repository, open_source) -> None:
    source = open_source()
    oid = source.hashes["model.safetensors"].digest.removeprefix("sha256:")
    body = said if isinstance(said, bytes) else json.dumps(said).replace("OID", oid).encode()
    hub.fault = lambda request: Answer(200, body, {}) if "batch" in request.path else None
    source._ranges.locate(["model.safetensors"])
    assert hub.asked("POST")
    read(source)


def test_places_of_large_files_that_come_in_drips(
    hub: Hub, repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source()
    assert source.available
    with monkeypatch.context() as slow:
        slow.setattr(hub_requests, "PROGRESS_SECONDS", -1.0)  # so that any is late
        source._ranges.locate(["model.safetensors"])
    assert hub.asked("POST")
    read(source)


def test_a_server_that_is_never_well_again(
    hub: Hub, repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source()
    assert source.available
    hub.fault = lambda request: busy(0, 503)
    with pytest.raises(HubUnreachable, match=r"status 503 to a request for .*, again and again"):
        read(source)
    assert len(hub.requests) < 20
    hub.fault = lambda request: busy(3600) if request.storage else None
    with pytest.raises(HubUnreachable, match=r"left alone for 3,600 s\. Try again later"):
        read(source)
    hub.fault = lambda request: Cut(3) if request.storage else None
    with pytest.raises(HubUnreachable, match=r"again and again|cannot be reached"):
        b"".join(source.read("model.safetensors", 0, 100_000))
    monkeypatch.setattr(hub_requests, "PROGRESS_SECONDS", 0.05)
    hub.fault = lambda request: Stall(10, 0.2) if request.storage else None
    with pytest.raises(
        HubUnreachable, match=r"no more than [\d,]+ bytes came in 0 s, again and again"
    ):
        list(source.read("model.safetensors", 0, 50_000))
    with pytest.raises(CheckpointError, match="no byte 700,002"):
        list(source.read("model.safetensors", 1, 700_001))


@pytest.mark.parametrize("located", [False, True])
def test_a_host_that_is_never_reached(
    located: bool, hub: Hub, repository: Repository, open_source
) -> None:
    """It is given up before long, and named; of two addresses, the hub may give another."""
    elsewhere = Answer(302, b"", {"Location": "http://127.0.0.1:1/file?signature=secret"})
    hub.fault = lambda request: elsewhere if "/resolve/" in request.path else None
    source = open_source()
    assert source.available
    if located:
        source._ranges._addresses["model.safetensors"] = "http://127.0.0.1:1/file"
    del hub.requests[:]
    with pytest.raises(
        HubUnreachable, match=r"^http://127.0.0.1:1, where http.* has model"
    ) as told:
        read(source)
    assert "secret" not in str(told.value)
    assert len(hub.requests) == 2 - located
    hub.fault = lambda request: None
    if located:
        source._ranges._addresses["model.safetensors"] = "http://127.0.0.1:1/file"
    read(source)


def test_a_server_is_waited_for(
    hub: Hub, repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    limit = {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    for wanted, fault in ((7, busy(7)), (55, Answer(429, b"", limit))):
        source = open_source()
        assert source.available
        once(fault, 0, hub)
        read(source)
        assert waits.pop() == wanted


def test_addresses_expire_and_are_used_until_then(
    hub: Hub, repository: Repository, open_source
) -> None:
    source = open_source()
    read(source)
    assert len(hub.asked("GET", "/resolve/")) == 1
    hub.fault = lambda request: Expired() if request.storage and request.count % 3 == 0 else None
    read(source)
    assert 1 < len(hub.asked("GET", "/resolve/")) <= 1 + len(RANGES)


def test_the_token_goes_to_the_hub_alone(
    hub: Hub,
    repository: Repository,
    open_source,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    faults: list[Fault] = [busy(0), Cut(5), Expired(), busy(0, 503)]

    def fault(request: Request) -> Fault:
        return faults.pop() if faults and request.count > 5 else None

    hub.fault = fault
    source = open_source()
    assert (source.small_files / "config.json").read_bytes() == b"{}"
    read(source)
    assert not faults
    asked = hub.asked(path="org/model")
    assert asked
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in asked)
    assert hub.asked(storage=True)
    for request in hub.asked(storage=True):
        assert TOKEN not in str(request)
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(capfd.readouterr())
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def refusal(source: HubSource) -> str:
    assert not source.available
    with pytest.raises(CheckpointError) as refused:
        read(source)
    return str(refused.value)


def test_what_is_not_to_be_had(
    hub: Hub, repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no model org/other at" in refusal(open_source("org/other"))
    told = refusal(open_source("org/model@v9"))
    assert "has no branch, tag or commit v9" in told
    assert f"{hub.url}/org/model/commits/main lists" in told
    assert "has no branch, tag or commit" in refusal(open_source(f"org/model@{'ab' * 20}"))
    assert not open_source("org/model/nowhere").available
    with pytest.raises(CheckpointError, match="before the folder: hf:org/model@v1/nowhere; http"):
        open_source("org/model/nowhere@v1").small_files  # noqa: B018 - for what it raises
    monkeypatch.setattr(constants, "ENDPOINT", "nonsense")
    assert "HF_ENDPOINT is nonsense, which is no address" in refusal(open_source("org/unasked"))


def test_what_is_private(
    hub: Hub, repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.private = True
    hub.accounts[TOKEN] = Account("another")
    told = refusal(open_source())
    assert "there is no model org/model" in told
    assert "or it is private" in told
    assert "the token that is used (HF_TOKEN, or hf auth login's) must be of that account" in told
    hub.accounts.clear()
    assert "refuses access to org/model (status 401)" in refusal(open_source())
    monkeypatch.delenv("HF_TOKEN")
    told = refusal(open_source())
    assert "or it is private" in told or "refuses access" in told
    assert "have HF_TOKEN hold a token of that account, or log in: hf auth login" in told


def test_what_is_gated(
    hub: Hub, repository: Repository, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.gated = True
    source = open_source()
    for gated in (lambda: read(source), lambda: source.small_files):
        with pytest.raises(CheckpointError, match="org/model is gated") as refused:
            gated()
        assert f"Ask for access at {hub.url}/org/model, and the token" in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="have HF_TOKEN hold a token of that account"):
        read(open_source())
    repository.admitted.add("somebody")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    read(source)


def test_a_file_that_is_gone_or_another(hub: Hub, repository: Repository, open_source) -> None:
    source = open_source()
    assert source.available
    commit = repository.commits[repository.head]
    kept = dict(commit.files)
    del commit.files["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"has no file model\.safetensors at"):
        read(source)
    commit.files["model.safetensors"] = kept["sub/a.pth"]
    with pytest.raises(CheckpointError, match="a file of sha256"):
        read(source)


def test_what_the_client_has_is_read_where_it_lies(
    hub: Hub, repository: Repository, open_source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(snapshot_download("org/model"))
    del hub.requests[:]
    source = open_source()
    assert source.path("model.safetensors") == folder / "model.safetensors"
    read(source)
    assert source.small_files == folder
    assert [request.path for request in hub.requests] == ["/api/models/org/model"]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    del hub.requests[:]
    source = open_source(locked=LockedCommit("ab" * 20, frozenset(), dict))
    assert "HF_HUB_OFFLINE" in refusal(source)
    for path in (tmp_path / "memos").rglob("*.json"):
        path.unlink()
    source = open_source()
    assert source.revision == repository.head
    assert source.names("*") == [".gitattributes", "config.json", "model.safetensors"]
    assert source.hashes["model.safetensors"].digest[7:] == commit_file(repository).content.sha256
    read(source)
    assert open_source("org/model/sub").names("*") == ["a.pth"]
    assert hub.requests == []


def test_of_many_files_those_that_a_build_reads_are_downloaded(
    hub: Hub, repository: Repository, open_source
) -> None:
    wanted = {
        "config.json", "LICENSE", "NOTICE.txt", "README.md", "tokenizer.model", "vocab.txt",
        "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    others = {
        "onnx/config.json", "image.png", "model.gguf", "a.md", "additional_chat_templates/a.png",
        "runs/additional_chat_templates/b.jinja",
    }  # fmt: skip
    repository.add(dict.fromkeys(wanted | others, b"{}"))
    folder = open_source().small_files
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == wanted
    repository.add({f"sub/{name}": b"{}" for name in wanted | others})
    source = open_source("org/model@main/sub", newest=True)
    folder = source.small_files
    assert folder.name == "sub"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == wanted
    assert b"".join(source.read("a.pth", 3, 7)) == WEIGHTS[3:10]


def test_through_a_mirror(tmp_path: Path, open_source) -> None:
    """Client and mirror are others' work; this one leaves out much that the hub itself says."""
    folder = checkpoints.make("llama", tmp_path / "checkpoint", files=2)
    with hub_server.serve(tmp_path / "uploaded") as hub:
        commit = hub.repository("org/model").add_folder(folder)
        with (
            servers.olah(hub.url, hub.storage_url, tmp_path) as mirror,
            hub.inside(tmp_path / "home", mirror=mirror),
        ):
            source = open_source()
            found = loaders.read(source, None, source.opening.memos)
            assert source.revision == commit
            own = FolderSource(folder)
            assert found.stored == loaders.read(own, None, source.opening.memos).stored
            for name in found.stamps:
                data = (folder / name).read_bytes()
                assert b"".join(source.read(name, 0, len(data))) == data
                digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
                assert source.hashes[name] == HubFile(len(data), digest)


@pytest.mark.parametrize("plain", [True, False], ids=["as torch writes it", "of another writer"])
def test_archives_of_torch_are_read_by_ranges(
    plain: bool, hub: Hub, open_source, tmp_path: Path
) -> None:
    """Their directory, their pickle and no storage, wherever torch padded what."""
    folder = checkpoints.make("llama", tmp_path / "checkpoint", form="bin", files=2)
    if not plain:
        for path in folder.glob("*.bin"):
            pad_members(path)
    hub.repository("org/model").add_folder(folder)
    source = open_source()
    own = loaders.read(FolderSource(folder), None, source.opening.memos)
    assert source.small_files.is_dir()
    del hub.requests[:]
    found = loaders.read(source, None, source.opening.memos)
    assert found.stored == own.stored
    assert [found.tensors, found.notes] == [own.tensors, own.notes]
    if plain:
        assert len(hub.asked(storage=True)) <= 2 * len(found.stamps)
    for key, stored in list(found.stored.items())[::5]:
        data = b"".join(source.read(stored.file, stored.offset, stored.nbytes))
        part = own.part(key)
        assert part is not None
        assert data == (folder / stored.file).read_bytes()[part.offset :][: part.length]


def pad_members(path: Path) -> None:
    """Write an archive anew, with bytes of nobody between its members."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data)
            file.seek(7, 1)
            archive.start_dir += 7


def test_what_only_torch_can_read_is_refused(hub: Hub, open_source, tmp_path: Path) -> None:
    import torch

    folder = checkpoints.make("llama", tmp_path / "checkpoint")
    for path in folder.glob("model*"):
        path.unlink()
    state = {"model.norm.weight": torch.ones(8, 4).T}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    hub.repository("org/old").add_folder(folder)
    torch.save(state, folder / "pytorch_model.bin")
    hub.repository("org/views").add_folder(folder)
    for name in ("org/old", "org/views"):
        source = open_source(name)
        with pytest.raises(CheckpointError, match="download it into a folder and name that"):
            loaders.read(source, None, source.opening.memos)


SMALL = {"config.json": b"{}", "README.md": b"x" * 5000, "tokenizer.model": b"y" * 90_000}


@pytest.mark.parametrize("fault", [busy(0, 503), busy(0), Cut(3), Expired()], ids=repr)
def test_small_files_come_in_spite_of_what_passes(
    fault: Fault, hub: Hub, open_source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for place in range(0, 10, 2):
        hub.repository(f"org/model-{place}").add(SMALL)
        once(fault, place, hub)
        folder = open_source(f"org/model-{place}").small_files
        assert {name: (folder / name).read_bytes() for name in SMALL} == SMALL


@pytest.mark.usefixtures("way")
def test_several_read_at_once(hub: Hub, repository: Repository, open_source) -> None:
    """With one client, whose connections are kept; what goes wrong with one is not the others'."""
    source = open_source()
    assert source.available
    wrong: list[Fault] = [Cut(1), Cut(99), Shorter(7), busy(0), busy(0, 503), Expired()]
    hub.fault = lambda request: wrong.pop() if wrong and request.count % 7 == 0 else None
    parts = [(start, min(20_000, len(WEIGHTS) - start)) for start in range(0, len(WEIGHTS), 20_000)]

    def read(part: tuple[int, int]) -> bytes:
        return b"".join(source.read("model.safetensors", *part))

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(read, parts)) == WEIGHTS
    assert not wrong


def test_small_files_in_the_blobs_that_models_share(tmp_path: Path) -> None:
    """As the client's cache has them where a file came by Xet."""
    cache = tmp_path / "hub"
    blob = cache / "blobs" / "ab" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"{}")
    link = cache / "models--org--model" / "blobs" / "e7a9"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    config = cache / "models--org--model" / "snapshots" / ("cd" * 20) / "config.json"
    config.parent.mkdir(parents=True)
    config.symlink_to(link)
    with pytest.raises(CheckpointError, match=r"is a link to .*, outside of "):
        read_bytes(config)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1")
    assert read_bytes(config) == b"{}"


def commit_file(repository: Repository):
    return repository.files["model.safetensors"]

"""A checkpoint on the hub by its name: what is asked, what is read, what is locked, what fails."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from cache.records.memos import Memos
from support import front_door, hub_server, inside, projects
from support.front_door import REPOSITORY
from support.hub_repositories import OnDisk, Repository
from support.hub_server import (
    Cut,
    Expired,
    Fault,
    Hub,
    Longer,
    Request,
    Shorter,
    Stall,
    busy,
)
from support.projects import FOUR_BIT, Project
from support.servers import Answer
from tasks.checkpoints import hub_name, hub_requests, loaders, sources
from tasks.checkpoints.source import Opening
from tasks.core.text import size
from tasks.layouts.registry import is_read


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server.serve(tmp_path / "uploaded") as hub, hub.inside(tmp_path / "home"):
        yield hub


def published(hub: Hub, folder: Path, kind: str = "huggingface") -> tuple[Project, Repository]:
    """A project whose checkpoint is only on the hub; what it builds by `anew` is of the folder."""
    project = projects.create(folder, kind, **FOUR_BIT)
    repository = hub.repository("org/model")
    repository.add_folder(project.checkpoint)
    project.configure(source="hf:org/model")
    return project, repository


def like(project: Project, folder: Path, **keys: Path) -> Project:
    """A project of the same models.toml and models.lock, as a fresh clone is."""
    folder.mkdir()
    other = Project(folder, project.kind, project.models, **keys)
    other.configure()
    shutil.copy(project.folder / "models.lock", folder)
    return other


def but_card(built: dict[str, str]) -> dict[str, str]:
    """The files of a built model without its card, which says where it comes from."""
    return {name: digest for name, digest in built.items() if name != "README.md"}


def source_in_lock(project: Project) -> dict:
    (source,) = json.loads((project.folder / "models.lock").read_bytes())["sources"].values()
    return source


@pytest.mark.parametrize("kind", projects.SOURCES)
def test_it_is_built_as_from_a_folder(kind: str, hub: Hub, tmp_path: Path) -> None:
    project, repository = published(hub, tmp_path / "project", kind)
    weights = {path.name: path.stat().st_size for path in projects.weight_files(project.checkpoint)}
    told = project.doit("plan", expect=1)
    assert len(hub.asked("GET", storage=True)) <= 3 * len(weights) + 2
    plan = json.loads(project.doit("plan", "--json", expect=1).stdout)
    assert 0.9 * sum(weights.values()) < plan["bytes_downloaded"] < sum(weights.values())
    assert f"downloads {size(plan['bytes_downloaded'])} of that" in told.stdout
    del hub.requests[:]
    assert project.doit("plan", expect=1).stdout == told.stdout
    assert hub.requests == []

    project.doit()
    fetched = sum(request.sent for request in hub.asked(storage=True))
    assert fetched <= 1.001 * sum(weights.values())
    table = project.models["model"]
    expected = {key: value for key, value in table.items() if key != "source"}
    project.models["model"] = {"source": "checkpoint", **expected}
    assert but_card(project.built()) == but_card(project.anew())
    assert repository.head in (project.folder / "build/model/README.md").read_text()
    project.models["model"] = table

    locked = source_in_lock(project)
    assert locked["revision"] == repository.head
    assert locked["hashes"].keys() >= {*weights, "tokenizer.model"}
    for name, (nbytes, digest) in locked["hashes"].items():
        file = repository.files[name]
        assert nbytes == file.content.size
        assert digest == f"{'sha256' if file.large else 'git'}:{file.etag}"

    del hub.requests[:]
    shutil.rmtree(project.checkpoint)
    assert project.doit().computed == set()
    project.doit("plan")
    assert hub.requests == []


def test_a_build_in_spite_of_all_that_passes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_requests, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    project, _ = published(hub, tmp_path / "project")
    weights = {path.name: path.stat().st_size for path in projects.weight_files(project.checkpoint)}
    plain = projects.create(tmp_path / "plain", "huggingface", **FOUR_BIT).anew()
    faults = [
        Cut(0), Cut(5000), busy(0), busy(0, 500), Expired(), Shorter(3), busy(0, 503), Cut(1),
        Stall(100, 1), Cut(30_000), Expired(), Answer(502, b"<html>", {}),
    ]  # fmt: skip
    project.doit("plan", expect=1)
    first = len(hub.requests)

    def fault(request: Request) -> Fault:
        return faults.pop() if faults and (request.count - first) % 3 == 1 else None

    hub.fault = fault
    project.doit()
    assert not faults
    assert but_card(project.built()) == but_card(plain)
    fetched = sum(request.sent for request in hub.asked(storage=True))
    assert fetched <= sum(weights.values()) + 12 * 2**17


def test_what_was_fetched_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    """After a build that an answer which is none has ended; wherever that came."""
    project, _ = published(hub, tmp_path / "project")
    plain = projects.create(tmp_path / "plain", "huggingface", **FOUR_BIT).anew()
    project.doit("plan", expect=1)
    wrong = 0
    for place in (4, 9, 14):
        first, given = len(hub.requests), []

        def fault(request: Request, at: int = first + place, given: list = given) -> Fault:
            begin, end = request.span or (0, 0)
            if request.count < at or given or not request.storage or end - begin < 5000:
                return None
            given.append(request)
            return Longer(1)

        hub.fault = fault
        done = project.doit(expect=None)
        if done.returncode:
            wrong += 1
            assert "org/model at" in done.stdout + done.stderr
            assert "the server gives" in done.stdout + done.stderr
            assert not (project.folder / "build/model").exists()
    assert wrong
    hub.fault = lambda request: None
    project.doit()
    assert but_card(project.built()) == but_card(plain)
    extracted = [
        entry["task"]
        for entry in front_door.log(project.folder)
        if entry["task"].startswith("extract:") and entry["outcome"] == "computed"
    ]
    assert sorted(extracted) == sorted(project.tasks(["extract"], pack=False))


def test_a_file_of_the_client_that_is_not_what_it_was(hub: Hub, tmp_path: Path) -> None:
    """It is as large, under the same name: nothing that was said of it is believed when mended."""
    project, _ = published(hub, tmp_path / "project")
    expected = projects.create(tmp_path / "plain", "huggingface", **FOUR_BIT).anew()
    snapshot = Path(snapshot_download("org/model"))
    gate, up = b"layers.1.mlp.gate_proj.weight", b"layers.1.mlp.up_proj.weight"
    path = next(p.resolve() for p in snapshot.glob("*.safetensors") if gate in p.read_bytes())
    whole = path.read_bytes()
    header = whole[: whole.index(b"}}") + 2]
    swapped = header.replace(gate, b"?").replace(up, gate).replace(b"?", up)
    assert up in header
    assert len(swapped) == len(header)
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])

    for damaged in (swapped + whole[len(header) :], flipped):
        path.write_bytes(damaged)
        (project.folder / "models.lock").unlink(missing_ok=True)
        project.doit("plan", expect=1)
        told = project.doit(expect=1).stdout
        found = hashlib.sha256(damaged).hexdigest()
        assert f"has sha256 {found}, and is said to have {path.name}: it came damaged" in told
        assert f"Remove {snapshot}/model-" in told
        assert not (project.folder / "models.lock").exists()
        assert not (project.folder / "build/model").exists()
        path.write_bytes(whole)
        project.doit()
        assert but_card(project.built()) == but_card(expected)
        shutil.rmtree(project.folder / "build")
    path.write_bytes(flipped)
    (project.folder / "models.lock").unlink()
    project.doit(expect=1)
    path.unlink()
    project.doit()  # by ranges
    assert but_card(project.built()) == but_card(expected)

    config = snapshot / "config.json"
    config.resolve().write_bytes(config.read_bytes().replace(b"}", b" }"))
    (project.folder / "models.lock").unlink()
    told = project.doit(expect=3).stderr
    assert f"{config} is not the file of org/model at" in told
    config.resolve().unlink()
    project.doit()
    assert but_card(project.built()) == but_card(expected)


@pytest.mark.parametrize("form", ["legacy", "column-major"])
def test_files_for_torch_alone_are_read_of_the_client(form: str, hub: Hub, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    project = projects.create(tmp_path / "project", "huggingface", **FOUR_BIT)
    expected = project.anew()
    state = {}
    for path in project.checkpoint.glob("model*"):
        state |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    if form == "column-major":
        state = {key: tensor.t().contiguous().t() for key, tensor in state.items()}
    path = project.checkpoint / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")
    hub.repository("org/model").add_folder(project.checkpoint)
    project.configure(source="hf:org/model")
    assert "only torch can read it" in project.doit(expect=3).stderr
    snapshot_download("org/model")
    project.doit()
    assert but_card(project.built()) == but_card(expected)


def test_a_folder_of_a_repository_at_a_tag(hub: Hub, tmp_path: Path) -> None:
    """As Meta's own files lie in `original/` beside those of Hugging Face."""
    project = projects.create(tmp_path / "project", "meta", **FOUR_BIT)
    expected = project.anew()
    repository = hub.repository("org/model")
    found = sorted(project.checkpoint.iterdir())
    repository.add({f"original/{path.name}": path.read_bytes() for path in found})
    repository.add({"config.json": b"{}", "model.safetensors": b"nothing"})
    repository.refs["v1"] = repository.head
    repository.tags.add("v1")
    repository.add({"original/params.json": b"{}"})
    project.configure(source="hf:org/model@v1/original")
    project.doit()
    assert but_card(project.built()) == but_card(expected)
    assert {path.rpartition("/")[2] for path in source_in_lock(project)["hashes"]} == {
        "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model",
    }  # fmt: skip


def test_a_commit_stays_until_it_is_told_to_move(hub: Hub, tmp_path: Path) -> None:
    project, repository = published(hub, tmp_path / "project")
    project.doit("plan", expect=1)
    first = repository.head
    config = json.loads((project.checkpoint / "config.json").read_bytes())
    second = repository.add({"config.json": json.dumps(config | {"max_window_layers": 7}).encode()})
    project.doit()
    assert source_in_lock(project)["revision"] == first
    assert project.doit().computed == set()

    weights = len(hub.asked("GET", storage=True))
    told = project.doit("lock").stdout
    assert f"hf:org/model moved from commit {first} to {second}: config.json is another" in told
    assert source_in_lock(project)["revision"] == second
    assert f"is locked at its newest commit, {second}" in project.doit("lock").stdout
    assert "is not of this models.toml" in project.doit("--locked", expect=3).stderr
    computed = project.doit().computed
    assert computed == {"pack:model"}
    assert len(hub.asked("GET", storage=True)) == weights
    built = json.loads((project.folder / "build/model/config.json").read_bytes())
    assert built["max_window_layers"] == 7
    project.doit("--locked")


def test_what_is_no_hub_fails_its_targets_alone(hub: Hub, tmp_path: Path) -> None:
    project, _ = published(hub, tmp_path / "project")
    project.models["other"] = {"source": "hf:org/other"}
    project.configure()
    hub.fault = lambda asked: Answer(200, b"<html>", {}) if "other" in asked.path else None
    told = project.doit(expect=None)
    assert told.returncode == 1
    assert "gives no answer of a hub for what it holds of org/other" in told.stdout + told.stderr
    assert "Traceback" not in told.stdout + told.stderr
    assert (project.folder / "build/model/config.json").exists()
    assert "up to date: model" in project.doit("plan", expect=3).stdout


def test_a_name_that_is_no_folder(hub: Hub, tmp_path: Path) -> None:
    project, _ = published(hub, tmp_path / "project")
    project.configure(source="org/model")
    assert "or the hub's: hf:org/model." in project.doit(expect=3).stderr
    for named, meant in (
        ("HF:org/model", "org/model"), ("huggingface:org/model", "org/model"),
        ("https://huggingface.co/org/model", "org/model"), ("https://hf.co/org/m/", "org/m"),
        ("https://huggingface.co/org/model/tree/main/a/b", "org/model@main/a/b"),
        ("https://example.com/org/model", None), ("a/b/c", None), ("org/model@v1", "org/model@v1"),
        ("https://huggingface.co/org/model/blob/main/config.json", "org/model@main"),
    ):  # fmt: skip
        assert hub_name.hint(named) == (f", or the hub's: hf:{meant}" if meant else "")
    hub.repositories["org/model"].add({"more/a.png": b"", "more/b.png": b""})
    for named, told in (
        ("hf:org/model/nowhere", "the folder nowhere of org/model holds no checkpoint at commit"),
        ("hf:org/model/more", ": it has a.png, b.png, and no config.json or params.json. Name a"),
    ):
        project.configure(source=named)
        assert told in project.doit(expect=3).stderr
    for wrong in ("hf:model", "hf:org/model@", "hf:org/../model", "hf:a/b/../c"):
        project.configure(source=wrong)
        assert "which is no name on the hub" in project.doit(expect=3).stderr
    for wrong, mend in (
        ("hf://org/model", "Write hf:org/model"), ("hf:models/org/model", "Write hf:org/model"),
        ("hf: org/model", "Write hf:org/model"), ("hf:datasets/org/model", "of the hub's datasets"),
        ("hf:org/model@a/b", "where a name has a slash, write %2F"),
        ("hf:org/model@abcdef1", "a commit's name is written in full"),
        ("hf:org/model:v1", "Write hf:org/model@v1"), ("hf:org/model.git", "Write hf:org/model"),
        ("hf:org/model/tree/v1/a", "Write hf:org/model@v1/a"),
        ("hf:https://huggingface.co/org/model", "Write hf:org/model"),
        ("hf:org/model/config.json", "is a file, and a checkpoint is all of them. Write hf:org/mo"),
    ):  # fmt: skip
        project.configure(source=wrong)
        assert mend in project.doit(expect=3).stderr
    project.configure(source="hf:org/model@main/")
    project.doit("plan", expect=1)
    files = hub.repositories["org/model"].files
    config, pointer = (
        files["config.json"].content,
        files["model-00001-of-00003.safetensors"].pointer,
    )
    for held, told in (
        ({"model.safetensors": pointer, "config.json": config}, "safetensors is a Git LFS pointer"),
        ({"a.gguf": b"GGUF", "config.json": config}, "GGUF files are not read: take the model"),
        ({"a.gguf": b"GGUF"}, "GGUF files are not read: take the model"),
        ({"README.md": b"", "a/b/config.json": config}, "There is one in a/b: name that folder."),
    ):
        hub.repository("org/other").add(held)
        project.configure(source=f"hf:org/other@{hub.repositories['org/other'].head}")
        assert told in project.doit(expect=3).stderr


def test_with_nothing_to_do_no_client_is_imported(hub: Hub, tmp_path: Path) -> None:
    project, _ = published(hub, tmp_path / "project")
    project.doit()
    del hub.requests[:]
    record = tmp_path / "record.json"
    environ = {**hub.environ(tmp_path / "home"), **projects.hooked({"record": str(record)})}
    assert front_door.doit(project.folder, env=environ).computed == set()
    modules = {name.partition(".")[0] for name in json.loads(record.read_bytes())["modules"]}
    assert not modules & {"huggingface_hub", "httpx2", "hf_xet", "requests", "ssl", "mlx_lm"}
    assert hub.requests == []


def test_locked_without_a_network(hub: Hub, tmp_path: Path) -> None:
    """Where every action is on record, though nothing else is here."""
    project, _ = published(hub, tmp_path / "project")
    project.doit()
    built = project.built()
    hub.fault = lambda request: busy(3600)
    del hub.requests[:]
    for name in ("with the small files", "without"):  # of the client's cache
        shutil.rmtree(project.store / "memos" / "hub")
        shutil.rmtree(project.store / "memos" / "extracts", ignore_errors=True)
        elsewhere = like(project, tmp_path / name, cache=project.store)
        elsewhere.doit("--locked")
        assert elsewhere.built() == built
        assert not hub.asked(storage=True)
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        (project.store / "memos" / "hub").mkdir(exist_ok=True)

    nothing = like(project, tmp_path / "nothing")
    told = nothing.doit(expect=3).stderr
    assert "answers with status 429 to a request for what it holds of org/model, again" in told
    assert "again and again. It asks to be left alone for 3,600 s" in told
    assert "And what models.lock says of it (record " in told

    hub.fault = lambda request: None
    third = like(project, tmp_path / "third", cache=project.store)
    third.doit()
    weights = {file.content.sha256 for file in hub.repositories["org/model"].files.values()}
    headers = [r for r in hub.asked(storage=True) if r.path[6:] in weights]
    assert sum(request.sent for request in headers) < 300_000
    assert third.built() == built

    shutil.rmtree(tmp_path / "home")
    snapshot_download("org/model", allow_patterns=["*.json"])
    hub.fault = lambda request: busy(3600)
    few = like(project, tmp_path / "few")  # of the client's files: what they lack is on the hub
    for said in "And what models.lock says of it (record ", "no whole checkpoint: ":
        told = few.doit(expect=3).stderr
        assert "again and again. It asks to be left alone" in told
        assert said in told
        (few.folder / "models.lock").unlink(missing_ok=True)


def test_init(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, repository = published(hub, tmp_path / "project")
    repository.add({"sub/README.md": b"nothing"})
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "models.toml"
    for wrong, told in (
        ("hf:model", "hf:model is 'hf:model', which is no name on the hub: write hf:ORG/NAME"),
        ("hf:org/other", "there is no model org/other"),
        ("hf:org/model/sub", "hf:org/model/sub is no folder with a checkpoint: expected"),
        ("org/model", "is no folder with a checkpoint, or the hub's: hf:org/model: expected"),
    ):
        assert told in inside.doit(tmp_path, "init", wrong, expect=3).stderr
        assert not here.exists()
    inside.doit(tmp_path, "init", "hf:org/model")
    assert '[models.model]\nsource = "hf:org/model"\nquantize' in here.read_text()
    assert not hub.asked(storage=True, path="model-")
    inside.doit(tmp_path, "plan", expect=1)
    del project


def test_a_plan_of_191_files(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import giant

    giant.write_checkpoint(tmp_path / "checkpoint")
    small = ("README.md", "LICENSE", "generation_config.json", "special_tokens_map.json")
    files = dict.fromkeys(small, b"{}") | {
        path.name: Sparse(path) if path.suffix == ".safetensors" else path.read_bytes()
        for path in (tmp_path / "checkpoint").iterdir()
    }
    assert len(files) == 191 + len(small) + 5
    files["tokenizer.json"] += b" " * 9_000_000  # as large as the real one
    hub.repository("org/giant").add(files)
    spec = sources.spec("hf:org/giant", tmp_path)
    for requests, nbytes in ((230, 16_000_000), (0, 0)):
        opening = Opening(is_read, Memos(tmp_path / "memos"), str(tmp_path))
        checkpoint = loaders.read(sources.open_source(spec, opening), None, opening.memos)
        assert len(checkpoint.stored) == 9 * 126 + 3
        assert len(hub.requests) <= requests
        assert sum(request.sent for request in hub.requests) <= nbytes
        del hub.requests[:]


class Sparse(OnDisk):
    """A file of many zeros, which are not read for its digest."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.name.encode()).hexdigest()


@pytest.mark.parametrize(("tied", "room", "threads"), [(False, 310_000, "2"), (True, 390_000, "0")])
def test_models_are_run_while_their_layers_are_there(
    hub: Hub, tmp_path: Path, tied: bool, room: int, threads: str
) -> None:
    """Built and evaluated, three variants fetch the checkpoint once, with room for one layer.

    Where an embedding is the head, too, beside that.
    """
    project = projects.create(tmp_path / "project", "huggingface")
    config = json.loads((project.checkpoint / "config.json").read_bytes())
    config["tie_word_embeddings"] = tied
    (project.checkpoint / "config.json").write_text(json.dumps(config))
    hub.repository("org/model").add_folder(project.checkpoint)
    weights = sum(path.stat().st_size for path in projects.weight_files(project.checkpoint))
    project.models.clear()
    project.quality = {"samples": 1, "sequence_length": 16, "top_logits": 16}
    for name, dtype in (("four", "float32"), ("other", "float16"), ("third", "bfloat16")):
        keys = {"dtype": dtype, "device": "cpu", "quantize": {"bits": 4}}
        project.configure(name, source="hf:org/model", **keys)

    def plan(disk: int) -> dict:
        project.disk = f"{disk / 1000}kB"
        project.configure("four")
        return json.loads(project.doit("plan", "--json", "pack", "evaluate", expect=1).stdout)

    plan(10**9)  # which fetches the headers
    disk = 10**9 - plan(10**9)["layers_bytes"] + room
    assert plan(disk)["bytes_downloaded"] <= weights
    del hub.requests[:]
    done = project.doit("-n", threads, "pack", "evaluate")
    assert done.stdout.count("perplexity") == 3
    fetched = sum(request.sent for request in hub.asked(storage=True))
    assert fetched <= 1.001 * weights

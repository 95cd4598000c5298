"""A checkpoint on the hub by its name: what is asked, what is read, what is locked, what fails."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import hub_server, projects
from support.hub_repositories import Repository
from support.hub_server import Hub
from support.projects import FOUR_BIT, Project


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


def source_in_lock(project: Project) -> dict:
    (source,) = json.loads((project.folder / "models.lock").read_bytes())["sources"].values()
    return source


@pytest.mark.parametrize("kind", projects.SOURCES)
def test_it_is_built_as_from_a_folder(kind: str, hub: Hub, tmp_path: Path) -> None:
    project, repository = published(hub, tmp_path / "project", kind)
    weights = {path.name: path.stat().st_size for path in projects.weight_files(project.checkpoint)}
    told = project.doit("plan", expect=1)
    assert len(hub.asked("GET", storage=True)) <= 3 * len(weights) + 2
    del hub.requests[:]
    assert project.doit("plan", expect=1).stdout == told.stdout
    assert hub.requests == []

    project.doit()
    fetched = sum(request.sent for request in hub.asked(storage=True))
    assert fetched <= 1.001 * sum(weights.values())
    table = project.models["model"]
    expected = {key: value for key, value in table.items() if key != "source"}
    project.models["model"] = {"source": "checkpoint", **expected}
    assert project.built() == project.anew()
    project.models["model"] = table

    locked = source_in_lock(project)
    assert locked["revision"] == repository.head
    assert locked["hashes"].keys() >= {*weights, "tokenizer.model"}
    for name, (size, digest) in locked["hashes"].items():
        file = repository.files[name]
        assert size == file.content.size
        assert digest == f"{'sha256' if file.large else 'git'}:{file.etag}"

    del hub.requests[:]
    shutil.rmtree(project.checkpoint)
    assert project.doit().computed == set()
    project.doit("plan")
    assert hub.requests == []


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


def test_a_name_that_is_no_folder(hub: Hub, tmp_path: Path) -> None:
    project, _ = published(hub, tmp_path / "project")
    project.configure(source="org/model")
    assert "or the hub's: hf:org/model." in project.doit(expect=3).stderr
    for wrong in ("hf:model", "hf:org/model@", "hf:org/../model", "hf:a/b/../c"):
        project.configure(source=wrong)
        assert "which is no name on the hub" in project.doit(expect=3).stderr

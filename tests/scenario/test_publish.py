"""doit publish: built models go to a hub, with huggingface_hub's own client, by what differs."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, snapshot_download

from support import hub_server, projects
from support.hub_repositories import whole
from support.projects import Project


@pytest.fixture
def hub(tmp_path):
    with hub_server.serve(tmp_path / "storage") as hub, hub.inside(tmp_path / "home"):
        yield hub


@pytest.fixture
def project(tmp_path: Path) -> Project:
    keys = {**projects.FOUR_BIT, "publish": "org/{target}"}
    project = projects.create(tmp_path / "project", "huggingface", **keys)
    project.configure("other", quantize={"bits": 8}, publish="org/{target}")
    return project


def held(hub, name: str) -> dict[str, bytes]:
    """What a repository holds, but for what the hub put there."""
    files = hub.repositories[name].files
    return {n: whole(file.content) for n, file in files.items() if n != ".gitattributes"}


def built(project: Project, target: str = "model") -> dict[str, bytes]:
    folder = project.folder / "build" / target
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def sent(hub) -> int:
    """Bytes of large files that were uploaded since this was asked."""
    uploads = [request for request in hub.requests if request.method == "PUT"]
    hub.requests.clear()
    return sum(request.received for request in uploads)


def writes(hub) -> list[str]:
    return [r.path for r in hub.requests if r.method != "GET" and r.method != "HEAD"]


def test_published_again_and_changed(hub, project: Project, tmp_path: Path) -> None:
    """Nothing goes up twice; of changed bits of one variant, that one's files alone."""
    project.doit()
    assert hub.requests == []  # a plain doit publishes nothing
    said = project.doit("plan", "publish", expect=1).stdout
    assert "publish: org/model (new, for all to see): " in said
    assert writes(hub) == []
    said = project.doit("publish").stdout
    assert "org/model (new, for all to see): " in said
    for target in ("model", "other"):
        assert held(hub, f"org/{target}") == built(project, target)
        assert len(hub.repositories[f"org/{target}"].commits) == 2
    weights = [built(project, target)["model.safetensors"] for target in ("model", "other")]
    tokenizer = built(project)["tokenizer.model"]  # both have it, and it goes up once
    assert sent(hub) == sum(map(len, [*weights, tokenizer]))
    loaded = snapshot_download("org/model", cache_dir=tmp_path / "there")
    sha256 = json.loads((project.folder / "models.lock").read_bytes())["targets"]["model"]["sha256"]
    assert sha256 == {
        n: hashlib.sha256(data).hexdigest() for n, data in held(hub, "org/model").items()
    }
    card = ModelCard.load(Path(loaded) / "README.md")
    assert card.data.library_name == "mlx"
    assert 'load("org/model")' in card.text

    said = project.doit("publish").stdout
    assert "org/model has all of build/model: no commit" in said
    assert sent(hub) == 0
    assert [len(each.commits) for each in hub.repositories.values()] == [2, 2]
    assert project.doit("plan", "publish").stdout.count("no commit") == 2

    before = held(hub, "org/model"), held(hub, "org/other")
    project.configure("other", quantize={"bits": 6})
    assert (
        "what differs once it is packed" in project.doit("plan", "publish:other", expect=1).stdout
    )
    said = project.doit("publish").stdout
    assert sent(hub) == len(built(project, "other")["model.safetensors"])
    assert held(hub, "org/model") == before[0]
    now = held(hub, "org/other")
    assert now == built(project, "other")
    changed = {name for name in now if now[name] != before[1].get(name)}
    assert changed == {"model.safetensors", "model.safetensors.index.json", "config.json",
                       "README.md"}  # fmt: skip
    told = [hub.repositories[f"org/{target}"] for target in ("model", "other")]
    assert [len(repository.commits) for repository in told] == [2, 3]
    assert "4 files uploaded" in said
    assert hub_server.TOKEN.encode() not in b"".join(
        path.read_bytes() for path in project.folder.rglob("*") if path.is_file()
    )


def test_what_others_changed_is_not_overwritten(hub, project: Project) -> None:
    project.doit("publish:model")
    repository = hub.repositories["org/model"]
    theirs = repository.add({"README.md": b"by hand", "demo.png": b"\0png"})
    project.configure(tags=["new"])
    done = project.doit("publish:model", expect=1)
    assert "org/model has README.md of somebody else's" in done.stderr + done.stdout
    assert repository.head == theirs
    assert "README.md of somebody else's" in project.doit("plan", "publish:model", expect=3).stdout

    # What is put right there, or is no matter to the build, stops nothing.
    repository.commit({n: f for n, f in repository.files.items() if n != "README.md"}, "away")
    (project.folder / "build/model/notes.txt").write_text("mine")
    said = project.doit("publish:model").stdout
    assert "demo.png in org/model is not of the build, and stays" in said
    assert "notes.txt in build/model was not built, and is not published" in said
    assert held(hub, "org/model").keys() == {*built(project), "demo.png"} - {"notes.txt"}

    # Nor what comes while it is compared.
    def meanwhile(request):
        if "/preupload/" in request.path and "late.txt" not in repository.files:
            repository.add({"late.txt": b"late"})

    hub.fault = meanwhile
    project.configure(tags=["newer"])
    done = project.doit("publish:model", expect=1)
    assert "changed by somebody else while it was compared" in done.stderr + done.stdout
    assert b"newer" not in held(hub, "org/model")["README.md"]
    assert project.doit("publish:model").computed == {"publish:model"}


def test_files_of_an_earlier_build_go(hub, project: Project) -> None:
    """Without a record here, by that the last commits that wrote them are of the same target's."""
    project.configure(max_shard_size="300kB")
    project.doit("publish:model")
    assert len([name for name in held(hub, "org/model") if "safetensors" in name]) > 2
    published = project.state / "published" / "model.json"
    published.unlink()
    project.configure(max_shard_size=None)
    said = project.doit("publish:model").stdout
    assert "removed: model-00001-of-0000" in said
    assert held(hub, "org/model") == built(project)

    published.unlink()
    hub.repositories["org/model"].add({"model-0.safetensors": b"theirs"})
    done = project.doit("publish:model", expect=1)
    assert "has model-0.safetensors of somebody else's" in done.stderr + done.stdout

    # Not even where the last commit is of the same target's, but did not write it.
    hub.repositories["org/model"].add({"old.txt": b""}, "model, built by mlx-make")
    done = project.doit("publish:model", expect=1)
    assert "has model-0.safetensors of somebody else's" in done.stderr + done.stdout


def test_private_and_in_a_collection(hub, project: Project) -> None:
    project.configure(private=True, collection="Our models", files=None)
    project.doit("publish:model")
    assert hub.repositories["org/model"].private
    (collection,) = hub.collections.values()
    assert (collection.title, collection.items) == ("Our models", ["org/model"])
    project.doit("publish:model")
    assert collection.items == ["org/model"]
    hub.repositories["org/model"].private = False
    done = project.doit("publish:model", expect=1)
    assert "private = true" in done.stderr + done.stdout
    project.configure("other", create=False)
    done = project.doit("publish:other", expect=1)
    assert "create = false" in done.stderr + done.stdout
    assert "org/other" not in hub.repositories


@pytest.mark.parametrize("token", [None, "hf_wrong", "hf_reader"])
def test_who_may_not_publish(hub, project: Project, tmp_path: Path, token: str | None) -> None:
    hub.accounts["hf_reader"] = hub_server.Account("reader", writes=False)
    with hub.inside(tmp_path / "other-home", token):
        done = project.doit("publish", expect=3 if token is None else 1)
    said = done.stderr + done.stdout
    assert "HF_TOKEN" in said
    if token is None:
        assert done.entries == []  # before any work
    else:
        assert token not in said
    assert hub.repositories == {}


def test_a_hub_that_fails(hub, project: Project) -> None:
    project.doit()
    for body in (b"<html>", b"null", b"{}"):
        hub.fault = lambda request, body=body: hub_server.Answer(200, body)
        done = project.doit("publish:model", expect=1)
        assert "gives no answer of a hub for what it holds of org/model" in done.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda seconds: None)
        hub.fault = lambda request: hub_server.Answer(500, b"{}")
        done = project.doit("publish:model", expect=1)
        assert "status 500" in done.stderr + done.stdout
        hub.fault = lambda request: hub_server.Cut() if request.method == "PUT" else None
        done = project.doit("publish:model", expect=1)
    assert "publish again" in done.stderr + done.stdout
    hub.fault = lambda request: None
    project.doit("publish:model")
    assert held(hub, "org/model") == built(project)


def test_nothing_to_publish(hub, project: Project) -> None:
    for target in ("model", "other"):
        project.configure(target, publish=None)
    for task in ("publish", "publish:model"):
        done = project.doit(task, expect=1)
        assert 'publish = "ORG/{target}"' in done.stderr + done.stdout
    assert hub.requests == []


def test_a_plan_for_scripts(hub, project: Project) -> None:
    project.doit("pack:model")
    found = json.loads(project.doit("plan", "--json", "publish:model", expect=1).stdout)["publish"]
    sizes = {name: len(data) for name, data in built(project).items()}
    assert found["model"]["uploads"] == sizes
    assert found["model"]["removes"] == []


def test_from_the_hub_and_back_to_it(hub, project: Project) -> None:
    """The card names the source's repository and commit, and the model's own."""
    source = hub.repository("some/Model-1.1")
    project.models.clear()
    project.configure(source="hf:some/Model-1.1/sub", publish="org/{target}", quantize={"bits": 4})
    for path in project.checkpoint.iterdir():
        source.add({f"sub/{path.name}": path.read_bytes()})
    commit = source.head
    project.doit("publish")
    card = ModelCard(held(hub, "org/model")["README.md"].decode())
    assert card.data.base_model == "some/Model-1.1"
    assert card.data.base_model_relation == "quantized"
    assert f'source = "hf:some/Model-1.1@{commit}/sub"' in card.text
    assert len(hub.repositories["org/model"].commits) == 2


def test_the_card_tells_how_good_the_model_is(hub, project: Project) -> None:
    """Where that is known of what is published; build/ and models.lock do not depend on it."""
    project.quality = {"samples": 2, "sequence_length": 16, "top_logits": 16}
    project.configure(dtype="float32", device="cpu", publish="org/{target}")
    project.doit("publish:model")
    plain, local = held(hub, "org/model")["README.md"], built(project)
    lock = (project.folder / "models.lock").read_bytes()
    assert b"perplexity" not in plain
    assert plain == local["README.md"]

    told = project.doit("publish:model", "evaluate:model", "measure:model").stdout
    assert "1 file uploaded" in told
    card = held(hub, "org/model")["README.md"].decode()
    words = re.search(r"perplexity ([\d.]+), of the teacher ([\d.]+); .* mean ([\d.]+)", told)
    assert f"| perplexity | {words[1]}; before quantizing {words[2]} |" in card
    assert f"| KL divergence, nats | mean {words[3]}, median " in card
    assert re.search(r"\| quantization error \| [\d.]+ % of", card)
    assert [line for line in plain.decode().splitlines() if line not in card] == []
    assert built(project) == local
    assert (project.folder / "models.lock").read_bytes() == lock
    assert "no commit" in project.doit("publish:model").stdout

    project.configure(quantize={"bits": 8})  # of which nothing is known
    project.doit("publish:model")
    assert held(hub, "org/model") == built(project)

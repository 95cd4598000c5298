"""What people are told of a built model: its card and license, through the front door."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from support import projects
from support.projects import Project
from tasks.layouts.limited import Limits
from tasks.planning import card_template

LICENSE = "All is allowed.\n"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = projects.create(tmp_path / "project", "huggingface", **projects.FOUR_BIT)
    write(project, "apache-2.0")
    (project.checkpoint / "LICENSE").write_text(LICENSE)
    (project.checkpoint / "NOTICE.txt").write_text("by somebody\n")
    return project


def write(project: Project, license_: str) -> None:
    front_matter = f"license: {license_}\nlanguage:\n- de\ntags:\n- chat\nbase_model: a/b\n"
    (project.checkpoint / "README.md").write_text(f"---\n{front_matter}---\n# Theirs\n")


def card(folder: Path) -> tuple[dict, str]:
    found = ModelCard.load(folder / "README.md")
    return found.data.to_dict(), found.text


def test_card_and_license(project: Project) -> None:
    built = project.folder / "build" / "model"
    project.doit()
    data, text = card(built)
    assert data == {
        "license": "apache-2.0",
        "language": ["de"],
        "base_model": "a/b",
        "tags": ["chat", "mlx"],
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
    }
    assert "mlx-make" in text
    assert "Theirs" not in text
    assert (built / "LICENSE").read_text() == LICENSE
    assert (built / "NOTICE.txt").read_text() == "by somebody\n"
    locked = json.loads((project.folder / "models.lock").read_text())
    assert {"README.md", "LICENSE", "NOTICE.txt"} <= locked["sources"]["checkpoint"]["files"].keys()

    # Another license is another card, and no reason to stop but where all is locked.
    write(project, "mit")
    done = project.doit("--locked", expect=3)
    assert "README.md of source checkpoint is another" in done.stderr
    done = project.doit()
    assert {entry["outcome"] for entry in done.entries if "pack:" not in entry["task"]} <= {"hit"}
    assert card(built)[0]["license"] == "mit"
    project.doit("--locked")
    assert project.built() == project.anew()
    assert project.doit().entries == []


def test_what_is_told_of_the_build(project: Project) -> None:
    """Figures, versions, the tensors' digest, and lines that make the very same again."""
    hub = project.folder / "models--some--Model-1.1" / "snapshots" / ("a" * 40)
    hub.parent.mkdir(parents=True)
    project.checkpoint.rename(hub)
    quantize = {"bits": 4, "rules": [{"match": "lm_head", "bits": 8}]}
    keys = {"source": str(hub.parent.parent), "quantize": quantize, "dtype": "float16"}
    project.configure(**keys, tags=["legal"], publish="org/{target}")
    built = project.folder / "build" / "model"
    project.doit()
    data, text = card(built)
    assert data["base_model"] == "some/Model-1.1"
    assert data["base_model_relation"] == "quantized"
    assert data["tags"] == ["chat", "mlx", "legal"]
    assert 'load("org/model")' in text
    assert "4 bits, affine, groups of 64" in text
    assert "| quantized | 8 bits, affine, groups of 64: 1 module |" in text
    versions = [f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "mlx-make")]
    assert ", ".join(versions) in text
    assert str(project.folder) not in text
    lines = text.partition("```toml\n")[2].partition("```")[0]
    said = tomllib.loads(lines)["models"]["model"]
    assert said.pop("source") == f"hf:some/Model-1.1@{'a' * 40}"
    again = Project(project.folder / "again", "huggingface", {"model": said}, project.cache)
    again.folder.mkdir()
    again.configure(source=str(hub))
    again.doit()
    for name in ("model.safetensors", "config.json"):
        assert again.built()[name] == project.built()[name]
    digest = text.partition("(XXH3): `")[2][:32]
    assert digest in (again.folder / "build/model/README.md").read_text()

    weights = built / "model.safetensors"
    for tags in (["other"], ["legal"]):
        file = weights.stat().st_ino
        project.configure(tags=tags)
        said = project.doit("plan", expect=1).stdout
        assert "card changed" in said
        (entry,) = project.doit().entries
        assert entry["bytes_written"] < 50_000, "the weight files were copied"
        assert weights.stat().st_ino == file
        assert card(built)[0]["tags"] == ["chat", "mlx", *tags]

    # Without the checkpoint it is built from the record, and is the same.
    shutil.rmtree(built)
    shutil.rmtree(hub.parent.parent)
    project.doit("--locked")
    assert card(built) == (data, text)


def test_a_card_of_one_s_own(project: Project) -> None:
    template = project.folder / "own.md.j2"
    template.write_text("---\n{{ front_matter }}---\n{{ name }}: {{ size }}, {{ digest }}\n")
    project.configure(card="own.md.j2")
    project.doit()
    built = project.folder / "build" / "model"
    data, text = card(built)
    assert data["license"] == "apache-2.0"
    assert re.match(r"model: \d+ kB, [0-9a-f]{32}$", text)
    assert project.doit().entries == []
    template.write_text("mine\n")
    assert project.doit().computed == {"pack:model"}
    assert (built / "README.md").read_text() == "mine\n"
    for wrong, fact in (
        ("\n{{ nmae }}", "'nmae' is undefined"),
        ("\n{% if", "line 2"),
        ("{{ name.__class__ }}", "__class__"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'x' %}", "no loader"),
        (None, "cannot be read"),
    ):
        project.configure(card="none" if wrong is None else "own.md.j2")
        template.write_text(wrong or "")
        done = project.doit(expect=3)
        assert fact in done.stderr
        assert done.entries == []


def test_a_template_that_has_no_end(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails its own target, within bounds of time and memory."""
    monkeypatch.setattr(card_template, "LIMITS", Limits(2, 1 << 30))
    many = "{% for n in range(99999) %}"
    for template, said in (
        (f"{many * 3}x{'{% endfor %}' * 3}", "it took over 2 s"),
        ("{{ 'x' * 10 ** 10 }}", "MemoryError"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ):
        (project.folder / "own.md.j2").write_text(template)
        project.configure(card="own.md.j2")
        assert said in project.doit("plan", expect=3).stderr


def test_a_lock_of_an_older_version(project: Project) -> None:
    """Has no such files in it: the next build adds them."""
    project.doit()
    path = project.folder / "models.lock"
    lock = json.loads(path.read_text())
    for name in ("README.md", "LICENSE", "NOTICE.txt"):
        del lock["sources"]["checkpoint"]["files"][name]
    path.write_text(json.dumps(lock))
    (project.folder / "build" / "model" / "README.md").unlink()
    project.doit()
    assert "LICENSE" in json.loads(path.read_text())["sources"]["checkpoint"]["files"]


def test_what_cannot_be_read_is_told(project: Project) -> None:
    (project.checkpoint / "README.md").write_text("---\nlicense: [mit\n---\n")
    said = project.doit().stdout
    assert "README.md of the checkpoint begins with what is no YAML" in said
    assert card(project.folder / "build" / "model")[0]["tags"] == ["mlx"]


def built_of_metas(folder: Path, layout: str) -> Path:
    """The build of a checkpoint of Meta's, with a card and a licence."""
    project = projects.create(folder, "meta", layout=layout)
    write(project, "llama2")
    (project.checkpoint / "LICENSE").write_text(LICENSE)
    project.doit()
    return project.folder / "build" / "model"


def test_layout_mlx_examples(tmp_path: Path) -> None:
    built = built_of_metas(tmp_path / "project", "mlx-examples")
    assert (built / "LICENSE").read_text() == LICENSE
    assert not (built / "README.md").exists()


def test_metas_checkpoint(tmp_path: Path) -> None:
    built = built_of_metas(tmp_path / "project", "mlx-lm")
    assert card(built)[0]["license"] == "llama2"
    assert (built / "LICENSE").read_text() == LICENSE


def test_the_card_s_lines_make_the_same_whatever_was_asked_for(tmp_path: Path) -> None:
    """Of a budget, of what is rounded on a text, with rules and recipes: nothing is made anew."""
    project = projects.create(tmp_path, "huggingface", dtype="float32", device="cpu")
    project.models.clear()
    (tmp_path / "own.txt").write_text("One two three, and so on to some more words. " * 60)
    project.quality = {"text": "own.txt", "samples": 2, "sequence_length": 12, "seed": 3}
    rules = [
        {"match": "*.v_proj", "bits": 8},
        {"match": "*.0.*.up_proj", "skip": True},
        {"match": "*.1.*.down_proj", "dtype": "float16"},
    ]
    others = [{"bits": 3}, {"bits": 8, "group_size": 64}, {"mode": "mxfp8"}, {"mode": "mxfp4"}]
    budget = {"target_bpw": 7.0, "group_size": 32, "min_bits": 3, "rules": rules}
    for name, quantize in {
        "budget": {**budget, "candidates": others},
        "scaled": {**budget, "method": "awq"},
        "mixed": {"recipe": "mixed_3_6", "rules": rules[:2]},
    }.items():
        project.configure(name, dtype="float32", device="cpu", quantize=quantize)
    project.doit()
    again = Project(tmp_path / "again", "huggingface", cache=project.store, quality=project.quality)
    again.folder.mkdir()
    lines = {name: _lines(project.folder / "build" / name) for name in project.models}
    for name, said in lines.items():
        assert str(tmp_path) not in repr(said)
        (model,) = said["models"].values()
        again.models[name] = model | {"source": str(project.checkpoint)}
        assert said.get("quality") == (project.quality if name == "scaled" else None)
    again.quality = {**project.quality, "text": str(tmp_path / "own.txt")}
    again.configure("mixed")
    ran = again.doit()
    assert not {task for task in ran.computed if not task.startswith("pack:")}
    for name in project.models:
        for file in ("model.safetensors", "config.json"):
            assert again.built(name)[file] == project.built(name)[file], (name, file)
    card_of_awq = (project.folder / "build" / "scaled" / "README.md").read_text()
    sha256 = hashlib.sha256((tmp_path / "own.txt").read_bytes()).hexdigest()
    assert f'# "own.txt": SHA-256 {sha256}' in card_of_awq


def _lines(built: Path) -> dict:
    return tomllib.loads(
        (built / "README.md").read_text().partition("```toml\n")[2].split("```")[0]
    )

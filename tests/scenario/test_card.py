"""What people are told of a built model: its card and license, through the front door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from support import projects
from support.projects import Project

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

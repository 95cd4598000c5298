"""What people put into build/, or have there already, is never lost, and is told of."""

import json
import os
import shutil
from pathlib import Path

import pytest

from support import projects
from support.inside import doit
from support.projects import FOUR_BIT, Project
from tasks.execution import changed_files


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return projects.create(tmp_path / "p", "huggingface", **FOUR_BIT)


@pytest.fixture
def built(project: Project) -> Project:
    doit(project.folder)
    return project


def folder(project: Project) -> Path:
    return project.folder / "build" / "model"


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def somebodys_model(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_bytes(b"of another tool")


def somebodys_notes(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("mine")


def a_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("mine")


@pytest.mark.parametrize("make", [somebodys_model, somebodys_notes, a_file])
@pytest.mark.parametrize("command", [(), ("clean", "pack"), ("plan",)])
def test_what_was_never_built_here(project: Project, make, command: tuple[str, ...]) -> None:
    """It is refused before any work, and neither a build nor `doit clean` touches it."""
    make(folder(project))
    whole = folder(project) if folder(project).is_dir() else folder(project).parent
    before = contents(whole)
    done = doit(project.folder, *command, expect=None)
    assert done.entries == []
    assert done.returncode != 0 or command[:1] == ("clean",)
    said = done.stdout + done.stderr
    assert "build/model" in said
    assert "not built here" in said or "it is a file" in said
    assert contents(whole) == before


def test_what_somebody_puts_there_meanwhile(project: Project, monkeypatch) -> None:
    """What lies there once the new model is written, and did not before the work, is no build."""
    check = changed_files.check_unchanged

    def then_put(*args: object) -> None:
        check(*args)
        somebodys_model(folder(project))

    monkeypatch.setattr(changed_files, "check_unchanged", then_put)
    done = doit(project.folder, expect=None)
    assert "was not built here" in done.stdout + done.stderr
    assert contents(folder(project))["model.safetensors"] == b"of another tool"


def test_a_link_to_nowhere(project: Project) -> None:
    folder(project).parent.mkdir()
    folder(project).symlink_to("/nonexistent/models/model")
    done = doit(project.folder, expect=3)
    assert "build/model is a link to /nonexistent/models/model, which does not exist" in done.stderr
    assert done.entries == []


@pytest.mark.parametrize("what", ["build", "model"])
def test_a_link_is_followed(project: Project, tmp_path: Path, what: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = folder(project) if what == "model" else folder(project).parent
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(elsewhere)
    doit(project.folder)
    project.configure(quantize={"bits": 8})
    doit(project.folder)
    assert link.is_symlink()
    real = elsewhere if what == "model" else elsewhere / "model"
    assert json.loads((real / "config.json").read_text())["quantization"]["bits"] == 8
    assert project.built() == project.anew()
    assert "nothing to do" in doit(project.folder).stdout
    doit(project.folder, "clean")
    assert link.is_symlink()
    assert not any(elsewhere.iterdir())
    doit(project.folder)
    assert (real / "config.json").exists()


ADDED = {
    "notes.txt": b"mine",
    ".DS_Store": b"the Finder's",
    "._model.safetensors": b"macOS's, on exFAT",
    ".cache/huggingface/download/x.metadata": b"the hub's",
    "mtp.safetensors": b"loaded by none",
    "sub/model.safetensors": b"nor this",
}


def test_what_people_add_is_carried_over(built: Project) -> None:
    """It is no reason to build again, and lies in the folder that takes the old one's place."""
    for name, data in ADDED.items():
        path = folder(built) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder(built) / "link").symlink_to("notes.txt")
    assert "nothing to do" in doit(built.folder).stdout
    built.configure(quantize={"bits": 8}, max_shard_size="200kB")
    doit(built.folder)
    for name, data in ADDED.items():
        assert (folder(built) / name).read_bytes() == data
    assert os.readlink(folder(built) / "link") == "notes.txt"
    shown = {name for name in built.built() if name not in ADDED and name != "link"}
    assert shown == built.anew().keys()
    assert not folder(built).with_name("model~aside").exists()


def test_what_clients_would_load_is_set_aside(built: Project) -> None:
    stranger = folder(built) / "model-old.safetensors"
    stranger.write_bytes(b"of another model")
    done = doit(built.folder)
    aside = built.folder / "build" / "model~aside" / "model-old.safetensors"
    assert "model-old.safetensors was added to the model, and clients would load it" in done.stdout
    assert "build/model~aside/model-old.safetensors" in done.stdout
    assert aside.read_bytes() == b"of another model"
    assert not stranger.exists()
    assert "nothing to do" in doit(built.folder).stdout


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_edited_file_is_kept_aside(built: Project, name: str, bits: int) -> None:
    """Whether anything else changed or not; twice, so that neither edit is lost."""
    for number, text in enumerate((b"edited", b"edited again")):
        path = folder(built) / name
        path.unlink()
        path.write_bytes(text)
        built.configure(quantize={"bits": bits + number * (4 if bits == 4 else -2)})
        done = doit(built.folder)
        assert f"{name} was changed since it was built and is made again" in done.stdout
        assert 'files = "FOLDER"' in done.stdout
    aside = built.folder / "build" / "model~aside"
    assert (aside / name).read_bytes() == b"edited"
    assert (aside / f"{name}.1").read_bytes() == b"edited again"
    assert built.built() == built.anew()


def test_an_added_file_whose_name_a_build_takes(built: Project) -> None:
    (folder(built) / "model-00001-of-00004.txt").write_text("not this")
    (folder(built) / "model.safetensors.index.json").unlink()
    (folder(built) / "model.safetensors.index.json").mkdir()
    (folder(built) / "model.safetensors.index.json" / "mine").write_text("mine")
    done = doit(built.folder)
    aside = built.folder / "build" / "model~aside"
    assert (aside / "model.safetensors.index.json" / "mine").read_text() == "mine"
    assert "model.safetensors.index.json/mine was added" in done.stdout
    assert "build/model~aside/model.safetensors.index.json/mine" in done.stdout
    assert "model~aside/model~aside" not in done.stdout
    assert (folder(built) / "model-00001-of-00004.txt").read_text() == "not this"


def test_clean_removes_what_was_built_alone(built: Project) -> None:
    (folder(built) / "notes.txt").write_text("mine")
    (folder(built) / "README.md").unlink()
    (folder(built) / "README.md").write_text("edited")
    done = doit(built.folder, "clean", "pack")
    assert contents(folder(built)) == {"notes.txt": b"mine", "README.md": b"edited"}
    assert "README.md, notes.txt left there" in done.stdout
    shutil.rmtree(folder(built))
    doit(built.folder)
    assert doit(built.folder, "clean", "-n", "pack").stdout == "would remove build/model\n"
    assert doit(built.folder, "clean").stdout.splitlines() == [
        "removing build/model",
        "forgot how 28 steps ended; the results stay in the cache",
    ]
    assert not folder(built).exists()


def test_the_records_may_be_removed(built: Project) -> None:
    """What lies in build/ is what comes out again, so that nothing is lost."""
    before = built.built()
    (folder(built) / "notes.txt").write_text("mine")
    shutil.rmtree(built.state)
    doit(built.folder)
    assert (folder(built) / "notes.txt").read_text() == "mine"
    (folder(built) / "notes.txt").unlink()
    assert built.built() == before


@pytest.mark.parametrize("shards", [None, "100kB"])
def test_the_records_were_removed_and_a_setting_changed(project: Project, shards: str) -> None:
    """models.lock knows what was built."""
    project.configure(max_shard_size=shards)
    doit(project.folder)
    (folder(project) / "notes.txt").write_text("mine")
    shutil.rmtree(project.state)
    project.configure(quantize={"bits": 8}, max_shard_size=None)
    doit(project.folder)
    assert (folder(project) / "notes.txt").read_text() == "mine"
    (folder(project) / "notes.txt").unlink()
    assert project.built() == project.anew()
    assert not folder(project).with_name("model~aside").exists()


def test_the_records_were_removed_and_something_else_lies_there(built: Project) -> None:
    shutil.rmtree(built.state)
    built.configure(quantize={"bits": 8})
    (folder(built) / "config.json").write_text("{}")
    assert_refused(built)


def test_files_laid_over_the_model(built: Project) -> None:
    """A folder of one's own is where changes last; another file in it, or one less, is noticed."""
    extra = built.folder / "extra"
    (extra / "sub").mkdir(parents=True)
    (extra / "README.md").write_text("my card")
    (extra / "sub" / "notes.txt").write_text("mine")
    weights = built.built()["model.safetensors"]
    built.configure(files="extra")
    assert {entry["task"] for entry in doit(built.folder).entries} == {"pack:model"}
    assert (folder(built) / "README.md").read_text() == "my card"
    assert (folder(built) / "sub" / "notes.txt").read_text() == "mine"
    assert built.built()["model.safetensors"] == weights
    assert "nothing to do" in doit(built.folder).stdout
    doit(built.folder, "report")
    (extra / "README.md").write_text("my other card")
    assert "files changed" in doit(built.folder, "plan", expect=1).stdout
    doit(built.folder)
    assert (folder(built) / "README.md").read_text() == "my other card"
    (extra / "sub" / "notes.txt").unlink()
    doit(built.folder)
    assert not (folder(built) / "sub").exists()
    assert not (built.folder / "build" / "model~aside").exists()
    built.configure(files=None)
    doit(built.folder)
    assert "by mlx-make" in (folder(built) / "README.md").read_text()


def test_files_that_cannot_be_laid_over(built: Project) -> None:
    before = built.built()
    built.configure(files="extra")
    assert "files is" in doit(built.folder, expect=3).stderr
    (built.folder / "extra").mkdir()
    (built.folder / "extra" / "model-mine.safetensors").write_bytes(b"weights")
    done = doit(built.folder, expect=3)
    assert "model-mine.safetensors would be loaded as weights" in done.stderr
    assert "Traceback" not in done.stderr
    (built.folder / "secret").write_text("of somebody")
    (built.folder / "extra" / "model-mine.safetensors").unlink()
    (built.folder / "extra" / "notes.txt").symlink_to(built.folder / "secret")
    done = doit(built.folder, expect=None)
    assert f"is a link to {built.folder / 'secret'}, outside of" in done.stdout + done.stderr
    assert built.built() == before


def test_a_damaged_record(built: Project) -> None:
    """Something was built here; whether it is what lies there nobody knows."""
    (folder(built) / "README.md").unlink()
    (folder(built) / "README.md").write_text("mine")  # else models.lock would know it
    (built.state / "manifests" / "model" / "pack.json").write_bytes(b"{")
    built.configure(quantize={"bits": 8})
    assert_refused(built)


def assert_refused(project: Project, *names: str) -> None:
    """Neither a build, refused while it is planned, nor a clean touches what lies there."""
    before = contents(folder(project))
    done = doit(project.folder, expect=3)
    assert done.entries == []
    assert "build/model was not built here, as far as is on record: it holds " in done.stderr
    assert not [name for name in names if name not in done.stderr]
    said = doit(project.folder, "clean").stdout
    assert "left there, since not built here" in said
    assert "removing build/model" not in said
    assert contents(folder(project)) == before
    assert not folder(project).with_name("model~aside").exists()


def by_another_tool(project: Project) -> None:
    """The same checkpoint and bits, and so the same tokenizer and config.json, and another card."""
    old = contents(folder(project))
    shutil.rmtree(folder(project))
    folder(project).mkdir()
    for name, data in old.items():
        (folder(project) / name).write_bytes(data)
    (folder(project) / "README.md").write_text("by another tool")
    (folder(project) / "model.safetensors").write_bytes(old["model.safetensors"][:-1] + b"?")


def notes_in_its_place(project: Project) -> None:
    shutil.rmtree(folder(project))
    somebodys_notes(folder(project))


def a_link_to_a_model(project: Project) -> None:
    shutil.rmtree(folder(project))
    somebodys_model(project.folder / "mine")
    folder(project).symlink_to(project.folder / "mine")


def one_of_the_same_names(project: Project) -> None:
    for name in contents(folder(project)):
        (folder(project) / name).unlink()
        (folder(project) / name).write_text("mine")


def a_clean(project: Project) -> None:
    doit(project.folder, "clean")
    somebodys_model(folder(project))


def a_clean_that_left_notes(project: Project) -> None:
    (folder(project) / "notes.txt").write_text("mine")
    doit(project.folder, "clean")
    somebodys_model(project.folder / "other")
    shutil.copytree(project.folder / "other", folder(project), dirs_exist_ok=True)


EXCHANGED = [
    by_another_tool, notes_in_its_place, a_link_to_a_model, one_of_the_same_names, a_clean,
    a_clean_that_left_notes,
]  # fmt: skip


@pytest.mark.parametrize("exchange", EXCHANGED)
def test_what_was_built_was_exchanged(built: Project, exchange) -> None:
    """By somebody, for what is not ours, whether the record of the build is there or not."""
    exchange(built)
    assert_refused(built)


def test_what_a_clean_left_is_carried_over(built: Project) -> None:
    """The folder is still the one that was built here, also once its notes are longer."""
    for name in ("notes.txt", ".DS_Store"):
        (folder(built) / name).write_text("mine")
    doit(built.folder, "clean")
    (folder(built) / "notes.txt").write_text("mine, and more")
    doit(built.folder)
    assert (folder(built) / "notes.txt").read_text() == "mine, and more"
    assert built.built().keys() >= built.anew().keys()


def test_a_link_to_another_target(tmp_path: Path) -> None:
    """Each of the two would be replaced by the other, build after build."""
    project = projects.create(tmp_path / "p", "huggingface", **FOUR_BIT)
    for name, bits in (("a", 4), ("b", 8)):
        project.configure(name, quantize={"bits": bits})
    doit(project.folder)
    shutil.rmtree(project.folder / "build" / "a")
    (project.folder / "build" / "a").symlink_to("b")
    done = doit(project.folder, expect=1)
    assert "build/a is a link to" in done.stdout
    assert "which is the place of the target b" in done.stdout
    assert {entry["outcome"] for entry in done.entries} == {"failed"}

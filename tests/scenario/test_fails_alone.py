"""A target that cannot be planned fails alone: the others are built, and all is said at the end."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import checkpoints
from support.inside import doit


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a good checkpoint, which no test changes, and of a cache for what it has."""
    folder = tmp_path_factory.mktemp("shared")
    checkpoints.make("llama-tied", folder / "good")
    return folder


@dataclass
class Project:
    """A folder with `models.toml`: the target `good`, and whatever else a test says."""

    folder: Path
    shared: Path

    def says(self, toml: str = "") -> None:
        (self.folder / "models.toml").write_text(
            f'{toml}\n[models.good]\nsource = "{self.shared}/good"\n'
            f'[cache]\ndir = "{self.shared}/cache"\n'
        )

    def is_built(self, target: str) -> bool:
        return (self.folder / "build" / target / "model.safetensors").exists()

    @property
    def lock(self) -> dict:
        return json.loads((self.folder / "models.lock").read_text())


@pytest.fixture
def project(shared: Path, tmp_path: Path) -> Project:
    return Project(tmp_path, shared)


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def absent(_project: Project) -> str:
    return 'source = "not-here"'


def unknown(project: Project) -> str:
    config = shutil.copytree(project.shared / "good", project.folder / "copy") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "lama"}))
    return 'source = "copy"'


def no_such_files(project: Project) -> str:
    return f'source = "{project.shared}/good"\nfiles = "not-there"'


def never_built_here(project: Project) -> str:
    (project.folder / "build" / "bad").mkdir(parents=True)
    (project.folder / "build" / "bad" / "thesis.txt").write_text("years of work")
    return f'source = "{project.shared}/good"'


def link_to_nowhere(project: Project) -> str:
    (project.folder / "build").mkdir()
    (project.folder / "build" / "bad").symlink_to("nowhere")
    return f'source = "{project.shared}/good"'


BAD: dict[str, tuple[Callable[[Project], str], str]] = {
    "an absent disk": (absent, "not-here does not exist"),
    "an unknown architecture": (unknown, "Model type lama not supported"),
    "a setting that does not fit": (no_such_files, "not-there, which is no folder"),
    "a folder that was not built here": (never_built_here, "build/bad was not built here"),
    "a link to nowhere": (link_to_nowhere, "is a link to nowhere, which does not exist"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_the_others_are_built(project: Project, bad: str, first: bool) -> None:
    act, reason = BAD[bad]
    project.says(f"[models.bad]\n{act(project)}\n")
    if not first:
        path = project.folder / "models.toml"
        one, other = path.read_text().split("\n[models.good]")
        path.write_text(f"[models.good]{other}{one}")
    done = doit(project.folder, expect=1)
    assert project.is_built("good")
    assert not project.is_built("bad")
    said = last_line(done.stdout)
    assert said.startswith("ERROR: ")
    assert reason in said
    assert "\n1 target built, 1 target failed in " in done.stdout
    assert f"models.toml:{1 if first else 5}: bad: " in said
    assert done.stdout.count(reason) == 1
    assert "Traceback" not in done.stdout + done.stderr
    if bad == "a folder that was not built here":
        assert (project.folder / "build" / "bad" / "thesis.txt").read_text() == "years of work"

    again = doit(project.folder, expect=1)
    assert last_line(again.stdout) == said
    assert again.computed == set()


def test_in_one_thread(project: Project) -> None:
    project.says('[models.bad]\nsource = "not-here"\n')
    for threads in "0", "1":
        done = doit(project.folder, "-n", threads, "-a", "extract", "pack", expect=1)
        assert "pack:good" in {entry["task"] for entry in done.entries}
        assert "not-here does not exist" in last_line(done.stdout)


def test_only_what_is_asked_for_matters(project: Project) -> None:
    project.says('[models.bad]\nsource = "not-here"\n')
    done = doit(project.folder, "good")
    assert project.is_built("good")
    assert "not-here" not in done.stdout + done.stderr
    for name in "bad", "pack:bad", "quantize:bad", "report:bad", "lock:bad", "pack:b*":
        before = project.lock
        done = doit(project.folder, name, expect=3)
        assert "models.toml:1: bad: " in done.stderr
        assert "not-here does not exist" in done.stderr
        assert (done.entries, project.lock) == ([], before)
    done = doit(project.folder, "run", "pack:good", "extract:bad:layers.0", expect=3)
    assert "not-here does not exist" in done.stderr


def test_nothing_can_be_planned(project: Project) -> None:
    """Then it is as with one target: it is said before any work, each reason once."""
    (project.folder / "models.toml").write_text(
        '[models.a]\nsource = "one"\n[models.b]\nsource = "two"\n'
    )
    for command in [], ["list"], ["plan"], ["pack:a", "pack:b"]:
        said = doit(project.folder, *command, expect=3).stderr
        assert said.count("models.toml:1: a: ") == said.count("models.toml:3: b: ") == 1
    assert not (project.folder / "build").exists()


def test_what_targets_share_is_told_once(project: Project) -> None:
    project.says(
        '[models.bad]\nsource = "not-here"\nmatrix = { bits = [3, 4] }\n'
        '[models.other]\nsource = "neither"\n'
    )
    done = doit(project.folder, expect=1)
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 2
    assert ": bad, bad-3bit, bad-4bit: " in errors[0]
    assert ": other: " in errors[1]
    assert project.is_built("good")


def test_a_failure_stops_the_rest_as_ever(project: Project) -> None:
    """A target that cannot be planned does not make a run go on behind a real failure."""
    checkpoints.make("llama-tied", project.folder / "spoilt")
    project.says('[models.spoilt]\nsource = "spoilt"\n[models.bad]\nsource = "not-here"\n')
    doit(project.folder, "spoilt")
    (path,) = (project.folder / "spoilt").glob("model*.safetensors")
    data = bytearray(path.read_bytes())
    data[-100:] = bytes(100)
    path.write_bytes(data)
    done = doit(project.folder, "-n", "1", "pack:spoilt", "pack:bad", "pack:good", expect=1)
    assert "is not what models.lock has" in done.stdout
    assert not project.is_built("good")


@pytest.fixture
def broken(project: Project) -> Project:
    """Two targets that were built; then the disk of one is gone, and what the cache has of it."""
    checkpoints.make("qwen3", project.folder / "disk")
    project.says('[models.bad]\nsource = "disk"\n')
    doit(project.folder)
    shutil.rmtree(project.folder / "disk")
    project.says('[models.bad]\nsource = "disk"\nlayout = "mlx-examples"\n')
    return project


def test_the_lock_keeps_its_lines(broken: Project) -> None:
    before = broken.lock
    toml = (broken.folder / "models.toml").read_text()
    (broken.folder / "models.toml").write_text(
        toml.replace("[models.good]", '[models.good]\ndtype = "float32"')
    )
    doit(broken.folder, expect=1)
    after = broken.lock
    assert after["targets"]["good"] != before["targets"]["good"]
    assert after["targets"]["bad"] == before["targets"]["bad"]
    assert after["sources"] == before["sources"]
    doit(broken.folder, "lock", expect=1)
    assert broken.lock == after
    assert broken.is_built("bad")

    done = doit(broken.folder, "--locked", expect=3)
    assert "bad: " in done.stderr
    assert done.entries == []
    doit(broken.folder, "--locked", "good", expect=3)


def test_what_tells_of_targets(broken: Project) -> None:
    """They name it, and tell of the others."""
    listed = doit(broken.folder, "list")
    (line,) = [line for line in listed.stdout.splitlines() if "bad" in line]
    assert line.split() == ["pack:bad", "cannot", "be", "planned"]
    assert listed.stderr.count("bad: ") == 1
    assert "pack:good" in listed.stdout
    everything = doit(broken.folder, "list", "--all", "-s").stdout.splitlines()
    (line,) = [line for line in everything if "bad" in line]
    assert line.split() == ["E", "pack:bad", "cannot", "be", "planned"]

    planned = doit(broken.folder, "plan", expect=3)
    assert "bad: " in planned.stdout
    assert "up to date: good" in planned.stdout
    (reason,) = json.loads(doit(broken.folder, "plan", "--json", expect=3).stdout)["refused"]
    assert "bad: " in reason
    doit(broken.folder, "plan", "good", expect=0)
    why = doit(broken.folder, "why", "pack:bad", "pack:good").stdout
    assert reason in why
    assert "now: up to date" in why

    drawn = doit(broken.folder, "graph")
    assert reason in drawn.stderr
    assert "good" in drawn.stdout
    assert reason in doit(broken.folder, "graph", "bad", expect=3).stderr
    assert reason not in doit(broken.folder, "graph", "good").stderr

    done = doit(broken.folder, "report", expect=1)
    assert reason in last_line(done.stdout)
    assert (broken.folder / "reports" / "good.html").exists()
    assert (broken.folder / "reports" / "index.html").exists()
    doit(broken.folder, "report:good")

    doit(broken.folder, expect=1)
    assert "- failed: `pack:bad`" in doit(broken.folder, "summary").stdout
    for command in ["info", "pack:bad"], ["forget", "pack:bad"], ["clean", "-n", "pack:bad"]:
        assert "Traceback" not in doit(broken.folder, *command, expect=None).stderr


def test_the_cache_is_kept_and_pushed(broken: Project) -> None:
    toml = (broken.folder / "models.toml").read_text()
    (broken.folder / "models.toml").write_text(
        toml.replace(
            "[cache]", f'[cache]\nmax_size = "1B"\nremote = "file://{broken.folder}/remote"'
        )
    )
    pushed = doit(broken.folder, "cache", "push")
    assert "bad: " in pushed.stderr
    assert "uploaded" in pushed.stdout
    manifests = [*(broken.folder / ".mlx-make" / "manifests" / "bad").rglob("*.json")]
    doit(broken.folder, "cache", "gc")
    assert manifests
    assert all(path.exists() for path in manifests)
    checkpoints.make("qwen3", broken.folder / "disk")
    (broken.folder / "models.toml").write_text(toml.replace('layout = "mlx-examples"', ""))
    assert doit(broken.folder).computed == set()


def test_clean(broken: Project) -> None:
    """What was built of it goes as if it could be planned; what was not stays."""
    (broken.folder / "build" / "bad" / "notes.txt").write_text("mine")
    doit(broken.folder, "clean", "pack:bad")
    assert [path.name for path in (broken.folder / "build" / "bad").iterdir()] == ["notes.txt"]
    assert broken.is_built("good")

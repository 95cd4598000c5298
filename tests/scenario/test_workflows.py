"""tests of action.yml and the workflows: valid, and their steps do what docs/ci.md says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support import front_door, projects
from support.projects import Project
from support.runner import ACTION, WORKFLOWS, Job

DOCS = front_door.REPOSITORY / "docs" / "ci.md"
BIN = Path(sys.executable).parent
SETTINGS = ("MLX_MAKE_CACHE_REMOTE", "MLX_MAKE_CACHE_MODE", "MLX_MAKE_SIGNING_KEY")


def examples() -> list[str]:
    """The workflows that docs/ci.md shows."""
    return re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def workflows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The project's workflows and those of its docs, as files of a repository."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(WORKFLOWS[0].parent, folder / ".github" / "workflows")
    shutil.copy(ACTION, folder)
    for i, example in enumerate(examples()):
        (folder / ".github" / "workflows" / f"example-{i}.yml").write_text(example, "utf-8")
    return sorted((folder / ".github" / "workflows").iterdir())


def check(*call: str | Path, cwd: Path = front_door.REPOSITORY) -> None:
    # shellcheck, which actionlint runs, lies beside it.
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_schemas(workflows: list[Path]) -> None:
    assert len(examples()) >= 4
    tool = BIN / "check-jsonschema"
    check(tool, "--builtin-schema", "vendor.github-workflows", *workflows)
    check(tool, "--builtin-schema", "vendor.github-actions", ACTION)


def test_actionlint(workflows: list[Path]) -> None:
    check(BIN / "actionlint", *workflows, cwd=workflows[0].parents[2])


def test_shellcheck(tmp_path: Path) -> None:
    steps = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"]
    scripts = []
    for i, step in enumerate(step for step in steps if "run" in step):
        scripts.append(tmp_path / f"{i}.sh")
        scripts[-1].write_text(f"#!/usr/bin/env bash\nset -eo pipefail\n{step['run']}", "utf-8")
    assert len(scripts) == 4
    check(BIN / "shellcheck", *scripts)


def test_what_wants_a_library_is_run_with_it() -> None:
    """Tests that are skipped where a library is missing, by a job that installs the extras."""
    wants = {
        str(path.relative_to(front_door.REPOSITORY)): extra
        for path in (front_door.REPOSITORY / "tests").rglob("test_*.py")
        for extra in re.findall(
            r"""find_spec\("\w+"\) is None, reason="needs pip install 'mlx-make\[(\w+)\]'""",
            path.read_text(encoding="utf-8"),
        )
    }
    ci = next(path for path in WORKFLOWS if path.name == "ci.yml")
    steps = yaml.safe_load(ci.read_text(encoding="utf-8"))["jobs"]["libraries"]["steps"]
    install, _, run = (step["run"] for step in steps if "run" in step)
    assert sorted(wants) == sorted(word for word in run.split() if word.startswith("tests/"))
    extras = re.search(r"\[(.*)\]", install)
    assert extras
    assert {"dev", *wants.values()} == {*extras[1].split(",")}


@pytest.mark.parametrize("path", [ACTION, *WORKFLOWS, DOCS], ids=lambda path: path.name)
def test_actions_are_pinned(path: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", path.read_text(encoding="utf-8"))
    for action, comment in used:
        if action not in ("./", "OWNER/mlx-make@COMMIT"):
            assert re.fullmatch(r"(actions|aws-actions)/[\w/-]+@[0-9a-f]{40}", action)
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)


class Repository:
    """A repository whose workflow runs the action, each time on a runner of its own."""

    def __init__(self, folder: Path, project: Project) -> None:
        self.folder = folder
        self.project = project
        self.runs = 0
        self.path: list[str] = []  # what the first run's job has installed

    def job(self) -> tuple[Job, Project]:
        """Begin a run: a workspace with models.toml and the checkpoint."""
        self.runs += 1
        workspace = self.folder / f"runner-{self.runs}" / "workspace"
        workspace.mkdir(parents=True)
        shutil.copytree(self.project.checkpoint, workspace / "checkpoint")
        shutil.copy(self.project.folder / "models.toml", workspace)
        job = Job(workspace, workspace.with_name("temporary"), self.folder / "caches")
        job.run, job.path = self.runs, self.path
        return job, Project(workspace, self.project.kind, self.project.models)

    @property
    def saved(self) -> int:
        return len([*(self.folder / "caches").glob("*")])


def outcomes(project: Project, stage: str) -> set[str]:
    last = front_door.runs(project.folder)[-1]
    return {
        entry["outcome"]
        for entry in front_door.log(project.folder)
        if entry["run"] == last and entry["task"].startswith(f"{stage}:")
    }


def test_action_builds_from_what_was_built(tmp_path: Path) -> None:
    settings = projects.create(tmp_path / "settings", "huggingface", **projects.FOUR_BIT)
    repository = Repository(tmp_path, settings)

    job, built = repository.job()
    job.action()
    assert not job.failed, job.said
    assert built.built() == settings.anew()
    assert all(outcomes(built, stage) == {"computed"} for stage in projects.STAGES)
    assert f"| quantize | {len(projects.LAYERS[built.kind])} |" in job.summary
    assert repository.saved == 1
    repository.path = job.path

    job, built = repository.job()
    job.action()
    assert not job.failed, job.said
    assert built.built() == settings.anew()
    assert all(outcomes(built, stage) == {"reused"} for stage in projects.STAGES)
    assert re.search(r"^Time saved: \d+\.\d s of work", job.summary, re.MULTILINE)
    assert repository.saved == 1  # nothing new

    settings.configure(quantize={"bits": 8})
    job, built = repository.job()
    job.action(args="pack:model")
    assert not job.failed, job.said
    assert built.built() == settings.anew()
    assert outcomes(built, "quantize") == {"computed", "reused"}  # norm is not quantized
    assert outcomes(built, "cast") == {"reused"}
    assert repository.saved == 2

    job, _ = repository.job()
    job.action(args="pack:nobody")
    assert job.failed
    assert "pack:nobody" in job.said
    assert "No task ran." in job.summary

    job, built = repository.job()
    job.action(**{"actions-cache": "false"})
    assert not job.failed, job.said
    assert outcomes(built, "cast") == {"computed"}
    assert repository.saved == 2


FORK = {"head": {"repo": {"full_name": "them/models"}}}
OURS = {"head": {"repo": {"full_name": "us/models"}}}
INPUTS = {"remote": "https://host/path", "mode": "read-write", "signing-key": "secret"}
GIVEN = ["https://host/path", "read-write", "secret"]


@pytest.mark.parametrize(
    ("event", "inputs", "env", "told"),
    [
        ({}, {}, {}, [None, None, None]),
        ({}, {}, {"MLX_MAKE_CACHE_MODE": "off"}, [None, "off", None]),
        ({}, INPUTS, {"MLX_MAKE_CACHE_MODE": "off"}, GIVEN),
        ({"pull_request": OURS}, INPUTS, {}, GIVEN),
        ({"pull_request": FORK}, INPUTS, {}, [GIVEN[0], "read-only", None]),
        ({"pull_request": FORK}, {}, {"MLX_MAKE_SIGNING_KEY": "x"}, [None, "read-only", None]),
        ({"pull_request": FORK}, {"mode": "off"}, {}, [None, "off", None]),
        ({"pull_request": {"head": {"repo": None}}}, INPUTS, {}, [GIVEN[0], "read-only", None]),
    ],
)
def test_settings_of_the_remote(tmp_path: Path, event, inputs, env, told) -> None:
    """What mlx-make is told, by a stand-in that writes down its environment."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "mlx-make"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "json.dump([sys.argv[1:], dict(os.environ)], open('told.json', 'w'))\n"
    )
    stand_in.chmod(0o755)
    steps = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"]
    build = [step for step in steps if step.get("id") in ("cache", "build")]
    inputs = {"args": "-n 2  pack:a", "models": "models.toml", **inputs}
    path = {"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"}
    job = Job(tmp_path, tmp_path / "temporary", tmp_path / "caches", env={**path, **env})
    job.github["event"] = event
    job.steps(build, inputs)
    assert not job.failed, job.said
    args, environment = json.loads((tmp_path / "told.json").read_text())
    assert args == ["-n", "2", "pack:a", "models=models.toml"]
    assert [environment.get(name) for name in SETTINGS] == told
    assert "secret" not in job.said
    assert ("secret" in environment.values()) == ("secret" in told)


def test_example_of_build_yml(tmp_path: Path) -> None:
    """The step that makes what the checkout's models.toml is of."""
    (build,) = [path for path in WORKFLOWS if path.name == "build.yml"]
    steps = yaml.safe_load(build.read_text(encoding="utf-8"))["jobs"]["build"]["steps"]
    for name in ("constraints.txt", "models.toml", "tasks"):
        (tmp_path / name).symlink_to(front_door.REPOSITORY / name)
    job = Job(tmp_path, tmp_path / "temporary", tmp_path / "caches")
    job.steps([step for step in steps if step.get("name") == "Make the example checkpoint"])
    assert not job.failed, job.said
    assert (tmp_path / "checkpoints" / "tiny-llama" / "params.json").is_file()

"""A target is skipped without a look only where a look would find that nothing is to be done."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from doit.exceptions import InvalidDodoFile

from cache.digest import canonical
from support import projects
from support.projects import FOUR_BIT, Project
from tasks.cli.doit_database import Database
from tasks.cli.look import Look
from tasks.cli.options import Options
from tasks.cli.session import Session
from tasks.cli.task_graph import TaskGraph
from tasks.cli.untouched import Untouched
from tasks.config import reader
from tasks.layouts import asking
from tasks.planning.node import Node
from tasks.planning.plan import Plan
from tasks.stages import registry


def no_look(*_: object) -> bool:
    """A look that finds something to do."""
    return False


def skipped(project: Project) -> bool:
    """Whether a run would skip the target without a look."""
    saved = Database(str(project.state / "doit.json"), None).saved
    try:
        session = Session.open(reader.load(project.folder / "models.toml"))
    except InvalidDodoFile:  # a run would be an error
        return False
    untouched = Untouched(session.workspace, session.lock, session.planner, saved, no_look)
    return untouched.holds(session.config.targets["model"])


def nothing_to_do(project: Project) -> bool:
    """Whether a look at everything finds nothing to do; so must say who is spared the look."""
    status = project.doit("plan", "pack", expect=None).returncode
    assert status in (0, 1, 3)
    assert project.doit("plan", expect=None).returncode == status
    return status == 0


def manifest(project: Project, chance: random.Random) -> Path:
    below = project.state / "manifests" / "model"
    return chance.choice(
        sorted(path for stage in projects.STAGES for path in below.glob(f"{stage}/*"))
    )


def packed(project: Project, chance: random.Random) -> Path:
    return chance.choice(sorted((project.folder / "build" / "model").iterdir()))


def record(project: Project, _: random.Random) -> Path:
    return project.state / "manifests" / "model" / "pack.json"


def source(project: Project, chance: random.Random) -> Path:
    return chance.choice(sorted(project.checkpoint.iterdir()))


def database(project: Project, _: random.Random) -> Path:
    return project.state / "doit.json"


def lock(project: Project, _: random.Random) -> Path:
    return project.folder / "models.lock"


def touched(path: Path, _: random.Random) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1000))


def removed(path: Path, _: random.Random) -> None:
    path.unlink()


def written_anew(path: Path, _: random.Random) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)


def grown(path: Path, _: random.Random) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def flipped(path: Path, chance: random.Random) -> None:
    """Changed in place, its size as it was."""
    projects.flip(path, chance.randrange(path.stat().st_size))


def beside(path: Path, _: random.Random) -> None:
    path.with_name("model-00009.safetensors").write_bytes(b"not ours")


FILES = (manifest, packed, record, database, lock)
CHANGES = (touched, removed, written_anew, grown, flipped)
KEYS = (
    {"quantize": {"bits": 8}},
    {"dtype": "bfloat16"},
    {"max_shard_size": "1MB"},
    {"quantize": None},
)


def named(project: Project, command: str, chance: random.Random) -> None:
    project.doit(command, chance.choice(sorted(project.tasks())))


def other_digest(project: Project) -> None:
    path = project.folder / "models.lock"
    locked = json.loads(path.read_bytes())
    locked["targets"]["model"]["output"] = "0" * 32
    path.write_text(json.dumps(locked))


def older_database(project: Project, chance: random.Random) -> None:
    """As an older version wrote it; a record that it has of something else is not believed."""
    path = database(project, chance)
    line = json.loads(path.read_bytes().splitlines()[1])
    line["value"][chance.choice(sorted(line["value"]))]["_values_:"]["told"] = "0" * 32
    path.write_bytes(canonical(line["value"]))


def disturbances() -> dict[str, Callable[[Project, random.Random], object]]:
    found: dict[str, Callable[[Project, random.Random], object]] = {
        f"{where.__name__} {change.__name__}": (
            lambda project, chance, where=where, change=change: change(
                where(project, chance), chance
            )
        )
        for where in FILES
        for change in CHANGES
    }
    found["source touched"] = lambda project, chance: touched(source(project, chance), chance)
    found["weights beside"] = lambda project, chance: beside(packed(project, chance), chance)
    found["other keys"] = lambda project, chance: project.configure(**chance.choice(KEYS))
    found["forgotten"] = lambda project, chance: named(project, "forget", chance)
    found["ignored"] = lambda project, chance: named(project, "ignore", chance)
    found["lock edited"] = lambda project, _: other_digest(project)
    found["older database"] = older_database
    return found


@pytest.mark.parametrize("seed", range(3))
def test_what_is_skipped_has_nothing_to_be_done(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    every = sorted(disturbances().items())
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    for name, disturb in chance.sample(every, 12):
        project.configure(**FOUR_BIT, max_shard_size=None)
        (project.state / "doit.json").unlink(missing_ok=True)  # also what was ignored
        (project.folder / "models.lock").unlink(missing_ok=True)
        shutil.rmtree(project.folder / "build", ignore_errors=True)
        project.doit(expect=None)
        assert not skipped(project), name
        assert project.doit().entries == []
        assert skipped(project), name
        assert nothing_to_do(project), name
        disturb(project, chance)
        assert nothing_to_do(project) or not skipped(project), name


def test_what_is_told_without_a_look(tmp_path: Path) -> None:
    """It is what a look tells: of targets that share layers, were measured, or are to be built."""
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    project.configure("other", source="checkpoint", quantize={"bits": 8})
    project.configure("floats", source="checkpoint")
    project.configure("measured", source="checkpoint", quantize={"bits": 3})
    commands = (["list"], ["plan"], ["graph"], ["graph", "other"], ["cache", "stats"])
    project.doit()
    project.doit("measure:measured")
    for settings in (None, {"bits": 6}):
        project.doit()
        if settings:
            project.configure("other", quantize=settings)
        told = [project.doit(*command, expect=None).stdout for command in commands]
        (project.state / "up-to-date.json").rename(tmp_path / "kept")
        assert [project.doit(*command, expect=None).stdout for command in commands] == told
        with mock.patch.object(Look, "finds_nothing_to_do", no_look):  # so all tasks are made
            assert [project.doit(*command, expect=None).stdout for command in commands] == told
        (tmp_path / "kept").rename(project.state / "up-to-date.json")


def test_another_version_of_a_stage_is_looked_at(tmp_path: Path) -> None:
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    project.doit()
    assert skipped(project)
    with mock.patch.object(registry.PIPELINE[-1], "version", 99):
        assert not skipped(project)


def test_another_release_of_the_library_is_looked_at(tmp_path: Path) -> None:
    """Of whichever the layout asks: the card names it."""
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    project.doit()
    assert skipped(project)
    real = asking.versions()
    for release, expected in ((real["mlx-lm"], True), ("0.0.1", False)):
        with mock.patch.object(asking, "versions", lambda *_, r=release: real | {"mlx-lm": r}):
            assert skipped(project) == expected


def test_an_untouched_target_keeps_its_lines_in_the_lock(tmp_path: Path) -> None:
    """While another one is built."""
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    project.configure("other", source="checkpoint", quantize={"bits": 8})
    project.doit()
    project.doit()
    before = json.loads((project.folder / "models.lock").read_bytes())
    project.configure("other", quantize={"bits": 3})
    assert "1 target is up to date" in project.doit().stdout
    after = json.loads((project.folder / "models.lock").read_bytes())
    assert after["targets"]["model"] == before["targets"]["model"]
    assert after["targets"]["other"] != before["targets"]["other"]
    assert after["sources"] == before["sources"]
    assert skipped(project)


def test_what_is_kept_of_it_is_not_believed_damaged(tmp_path: Path) -> None:
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    project.doit()
    path = project.state / "up-to-date.json"
    for data in (b"", b"{}", path.read_bytes()[:-1]):
        path.write_bytes(data)
        assert not skipped(project)
        assert "nothing to do" in project.doit().stdout
        assert skipped(project)


def test_who_names_tasks_has_their_targets_planned_alone(tmp_path: Path) -> None:
    project = projects.create(tmp_path, "huggingface", **FOUR_BIT)
    project.configure("other", source="checkpoint", quantize={"bits": 8})
    project.configure("refused", source="nowhere")
    config = reader.load(project.folder / "models.toml")
    every = {"model", "other"}
    for names, planned, all_asked in (
        (("pack:model",), {"model"}, False),
        (("cast:model:layers.0", "pack:other"), every, False),
        (("pack",), every, True),
        (("cast:model:*",), every, True),
        (("pack:nobody",), every, True),
        ((), every, True),
    ):
        session = Session.open(config, Options(requested_tasks=names))
        assert session.plans.keys() == planned
        assert ("refused" in session.refused) == all_asked
        assert session.all_plans.keys() == every


def test_layers_that_are_up_to_date_have_no_tasks_where_models_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand targets they would be half a million; and accepting a checkpoint needs none."""
    project = projects.create(tmp_path / "p", "huggingface", **FOUR_BIT)
    assert "pack:model" in project.doit("report").computed
    made: list[str] = []
    layer_task = TaskGraph._layer_task

    def count(graph: TaskGraph, plan: Plan, node: Node) -> dict[str, object]:
        made.append(node.name)
        return layer_task(graph, plan, node)

    monkeypatch.setattr(TaskGraph, "_layer_task", count)
    page = project.folder / "reports" / "model.html"
    page.unlink()
    assert list(project.doit("report").computed) == ["report:model"]
    project.doit("lock")
    project.doit("pack")
    assert page.exists()
    assert made == []
    shutil.rmtree(project.state / "manifests" / "model" / "error")
    assert all(task.startswith("measure:") for task in project.doit("report").computed)
    assert {name.partition(":")[0] for name in made} == {"measure"}
    project.configure(quantize={"bits": 8})
    assert "pack:model" in project.doit("report").computed
    assert "quantize:model:layers.0" in made

"""tests of a build on a Dask cluster: whatever its workers do, the same model, by no lie."""

import os
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from support import cluster, front_door, hub_server, projects, running
from support.front_door import Finished
from support.projects import Project

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("distributed") is None, reason="wants the extra dask"),
]


READ_HERE = len(projects.LAYERS["huggingface"])  # of a folder: which bytes are asked for


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return projects.create(tmp_path / "project", "huggingface", **projects.FOUR_BIT)


def environment(scheduler: Path, **said: str) -> dict[str, str]:
    return {"MLX_MAKE_BUILD_CLUSTER": str(scheduler), "MLX_MAKE_SIGNING_KEY": "", **said}


def build(project: Project, scheduler: Path, *args: str) -> Finished:
    return front_door.doit(project.folder, *args, env=environment(scheduler))


def machines(done: Finished) -> Counter[str]:
    """How many tasks each machine did."""
    return Counter(entry.get("machine", "") for entry in done.entries)


def made_by_workers(project: Project) -> set[str]:
    return {entry["task"] for entry in front_door.log(project.folder) if entry.get("machine")}


def test_workers_make_the_layers(project: Project, tmp_path: Path) -> None:
    with cluster.running(tmp_path, ["good", "good"]) as (scheduler, _):
        done = build(project, scheduler)
        assert project.built() == project.anew()
        assert machines(done)[""] == READ_HERE + 1  # packing
        (machine,) = machines(done).keys() - {""}
        assert f"layers on {machine}" in done.stdout
        threads = {entry["thread"] for entry in done.entries if entry.get("machine")}
        assert len(threads) == 2
        assert "nothing to do" in build(project, scheduler).stdout
        project.configure(quantize={"bits": 8})
        again = build(project, scheduler)
        assert project.built() == project.anew()
        assert machines(again)[""] == 1
    assert not done.stderr + again.stderr


def test_whoever_lies_or_has_no_room_is_passed_over(project: Project, tmp_path: Path) -> None:
    bad = ["flips a byte", "other shape", "full disk", "raises", "reads another"]
    _change(shutil.copytree(project.checkpoint, f"{project.checkpoint}-other"))
    with cluster.running(tmp_path, ["good", *bad]) as (scheduler, (process,)):
        done = build(project, scheduler)
        said = process.log.read_text()
    assert project.built() == project.anew()
    assert {"lied", "full", "raised"} <= {*said.splitlines()}
    assert not done.stderr or "is made here" in done.stderr


def test_only_workers_that_fail(project: Project, tmp_path: Path) -> None:
    """They are not asked for the same without end."""
    with cluster.running(tmp_path, ["raises", "reads another"]) as (scheduler, _):
        _change(shutil.copytree(project.checkpoint, f"{project.checkpoint}-other"))
        done = build(project, scheduler)
    assert project.built() == project.anew()
    assert machines(done).keys() == {""}
    assert "is made here" in done.stderr
    assert "out of memory" in done.stderr
    assert "other bytes than the checkpoint has here" in done.stderr


def test_checkpoints_that_only_their_bytes_tell_apart(project: Project, tmp_path: Path) -> None:
    other = Path(shutil.copytree(project.checkpoint, project.folder / "tuned"))
    _change(other)
    project.configure("tuned", source="tuned", **projects.FOUR_BIT)
    with cluster.running(tmp_path, ["good"]) as (scheduler, _):
        build(project, scheduler)
    built = [project.built(name) for name in ("model", "tuned")]
    assert built[0] != built[1]
    for folder in (project.state, project.folder / "build"):
        shutil.rmtree(folder)
    project.doit()
    assert [project.built(name) for name in ("model", "tuned")] == built


def _change(folder: str | Path) -> None:
    """Change weights, under the same sizes and times."""
    for path in Path(folder).glob("*.safetensors"):
        stat, data = path.stat(), bytearray(path.read_bytes())
        for at in range(8 + int.from_bytes(data[:8], "little"), len(data), 2):
            data[at] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_workers_that_are_others_get_nothing(project: Project, tmp_path: Path) -> None:
    with cluster.running(tmp_path, ["plain", "other key"]) as (scheduler, _):
        done = build(project, scheduler)
    assert project.built() == project.anew()
    assert machines(done).keys() == {""}
    (refused, alone) = done.stderr.splitlines()
    assert "2 workers get no layers" in refused
    assert "is not started by mlx-make worker" in refused
    assert "has another signing key" in refused
    assert "goes on alone" in alone


def test_a_killed_worker_s_layer_goes_to_another(project: Project, tmp_path: Path) -> None:
    with cluster.running(tmp_path, ["good"], ["hangs"]) as (scheduler, (_, doomed)):
        process = running.start(project, env=environment(scheduler))
        running.wait_for(lambda: "hangs" in doomed.log.read_text(), process)
        doomed.end()
        process.communicate(timeout=cluster.PATIENCE)
    assert process.returncode == 0
    assert project.built() == project.anew()


def test_without_the_scheduler_it_stops_and_can_be_taken_up(
    project: Project, tmp_path: Path
) -> None:
    with cluster.running(tmp_path, [], ["hangs", "good"]) as (scheduler, (first, second)):
        env = environment(scheduler, MLX_MAKE_BUILD_CLUSTER_LOST="stop")
        process = running.start(project, env=env)
        running.wait_for(lambda: "hangs" in second.log.read_text(), process)
        running.wait_for(lambda: made_by_workers(project), process)
        first.end()
        said = "".join(process.communicate(timeout=cluster.PATIENCE))
    assert process.returncode == 1
    assert said.count("cluster_lost") == 1
    done = made_by_workers(project)
    assert done
    again = project.doit()
    assert project.built() == project.anew()
    assert not done & again.computed


@pytest.mark.parametrize("remote", [False, True])
def test_two_builds_of_a_hub_s_checkpoint_make_each_layer_once(
    remote: bool, tmp_path: Path
) -> None:
    ours = [projects.create(tmp_path / name, "huggingface", **projects.FOUR_BIT) for name in "ab"]
    expected = ours[0].anew()
    (tmp_path / "remote").mkdir()
    where = f"file://{tmp_path}/remote" if remote else ""
    with hub_server.serve(tmp_path / "uploaded") as hub, hub.inside(tmp_path / "home"):
        hub.repository("org/model").add_folder(ours[0].checkpoint)
        for project in ours:
            project.configure(source="hf:org/model")
        with cluster.running(tmp_path, ["says", "says"]) as (scheduler, (workers,)):
            env = environment(scheduler, MLX_MAKE_CACHE_REMOTE=where)
            builds = [running.start(project, env=env) for project in ours]
            said = [build.communicate(timeout=cluster.PATIENCE) for build in builds]
            printed = workers.log.read_text()
    made = [line for line in printed.splitlines() if line.startswith("made")]
    assert [build.returncode for build in builds] == [0, 0], said
    assert "Traceback" not in printed, printed
    assert len(made) == len({*made}) == len(projects.LAYERS["huggingface"])
    for project in ours:
        assert {**project.built(), "README.md": ""} == {**expected, "README.md": ""}
        assert not any((project.store / "blobs" / "packs").glob("*.part"))
    assert any((tmp_path / "remote").rglob("*")) == remote

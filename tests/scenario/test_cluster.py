"""tests of a build on a Dask cluster: whatever its workers do, the same model, by no lie."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from support import cluster, front_door, hub_server, projects, running
from support.front_door import Finished
from support.projects import Project

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_spec("distributed") is None, reason="wants the extra dask"),
]


READ_HERE = len(projects.LAYERS["huggingface"])  # of a folder: which bytes are asked for


EIGHT_BIT = {"dtype": "float16", "quantize": {"bits": 8}}
# Dask's own limits, of the process that builds: minutes are for machines that are far away.
IMPATIENT = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "3s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
}


class Workers(NamedTuple):
    """Two good workers, which keep what they made for one test for the next, and their hub."""

    scheduler: Path
    process: cluster.Process
    hub: hub_server.Hub


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    folder = tmp_path_factory.mktemp("workers")
    with (
        hub_server.serve(folder / "uploaded") as hub,
        hub.inside(folder / "home"),
        cluster.running(folder, ["says", "says"]) as (scheduler, (process,)),
    ):
        yield Workers(scheduler, process, hub)


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


def test_workers_make_the_layers(project: Project, workers: Workers) -> None:
    scheduler = workers.scheduler
    done = build(project, scheduler)
    assert project.built() == project.anew()
    assert machines(done)[""] == READ_HERE + 1  # packing
    (machine,) = machines(done).keys() - {""}
    assert f"layers on {machine}" in done.stdout
    threads = {entry["thread"] for entry in done.entries if entry.get("machine")}
    assert len(threads) == 2
    assert "nothing to do" in build(project, scheduler).stdout
    project.configure(**EIGHT_BIT)
    again = build(project, scheduler)
    assert project.built() == project.anew()
    assert machines(again)[""] == 1
    assert not done.stderr + again.stderr


def test_whoever_lies_or_has_no_room_is_passed_over(project: Project, tmp_path: Path) -> None:
    """Nor does a remote store lack what a worker uploaded elsewhere."""
    bad = ["flips a byte", "other shape", "full disk", "raises", "reads another", "other store"]
    _change(shutil.copytree(project.checkpoint, f"{project.checkpoint}-other"))
    remote = {"MLX_MAKE_CACHE_REMOTE": f"file://{tmp_path}/remote"}
    (tmp_path / "remote").mkdir()
    with cluster.running(tmp_path, ["good", *bad]) as (scheduler, (process,)):
        done = build(project, scheduler)
        said = process.log.read_text()
        assert project.built() == project.anew()
        project.configure(**EIGHT_BIT)
        front_door.doit(project.folder, env=environment(scheduler, **remote))
    assert {"lied", "full", "raised"} <= {*said.splitlines()}
    assert not done.stderr or "made here" in done.stderr
    assert project.built() == project.anew()
    for folder in (project.state, project.folder / "build"):
        shutil.rmtree(folder)
    assert not project.quantizing() & front_door.doit(project.folder, env=remote).computed


def test_only_workers_that_fail(project: Project, tmp_path: Path) -> None:
    """They are not asked for the same without end, and told of once."""
    bad = ["raises", "full disk", "reads another"]
    with cluster.running(tmp_path, bad) as (scheduler, _):
        _change(shutil.copytree(project.checkpoint, f"{project.checkpoint}-other"))
        done = build(project, scheduler)
    assert project.built() == project.anew()
    assert machines(done).keys() == {""}
    (first, others) = done.stderr.splitlines()
    assert "is made here" in first
    assert "out of memory" in first
    assert "the disk is full" in first
    assert "other bytes than the checkpoint has here" in first
    assert f"{len(projects.LAYERS['huggingface']) - 1} more" in others


def test_checkpoints_that_only_their_bytes_tell_apart(project: Project, workers: Workers) -> None:
    other = Path(shutil.copytree(project.checkpoint, project.folder / "tuned"))
    _change(other)
    project.configure("tuned", source="tuned", **projects.FOUR_BIT)
    build(project, workers.scheduler)
    built = [project.built(name) for name in ("model", "tuned")]
    assert built[0] != built[1]
    nodes = [
        (stage, layer) for stage in projects.STAGES for layer in projects.LAYERS["huggingface"]
    ]
    records = [project.manifest(*node).read_bytes() for node in nodes]
    for folder in (project.state, project.folder / "build"):
        shutil.rmtree(folder)
    project.doit()
    assert [project.built(name) for name in ("model", "tuned")] == built
    assert [project.manifest(*node).read_bytes() for node in nodes] == records


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


def test_a_worker_gets_what_its_versions_of_libraries_do_not_concern(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", "meta", **projects.FOUR_BIT)
    project.configure("plain", layout="mlx-examples", **projects.FOUR_BIT)
    with cluster.running(tmp_path, ["other mlx-lm"]) as (scheduler, _):
        done = build(project, scheduler)
    by_target: dict[str, set[bool]] = {"model": set(), "plain": set()}
    for entry in done.entries:
        if entry["task"].startswith("quantize"):
            by_target[entry["task"].split(":")[1]].add("machine" in entry)
    assert by_target == {"model": {False}, "plain": {True}}
    refused = f"has mlx-lm 0.0.1, and this machine {version('mlx-lm')}"
    assert "1 worker gets no layers of some targets" in done.stderr
    assert refused in done.stderr
    assert project.built() == project.anew()


def test_the_layer_of_who_is_killed_or_frozen_goes_to_another(
    project: Project, tmp_path: Path
) -> None:
    """And a frozen worker that is none of ours holds nobody up."""
    processes = ["good"], ["hangs"], ["hangs"], ["plain"]
    with cluster.running(tmp_path, *processes) as (scheduler, (_, doomed, frozen, foreign)):
        foreign.process.send_signal(signal.SIGSTOP)
        process = running.start(project, env=environment(scheduler, **IMPATIENT))
        for each in (doomed, frozen):
            running.wait_for(lambda log=each.log: "hangs" in log.read_text(), process)
        frozen.process.send_signal(signal.SIGSTOP)
        doomed.end()
        _, said = process.communicate(timeout=cluster.PATIENCE)
    assert process.returncode == 0
    (refused,) = said.splitlines()
    assert "1 worker gets no layers" in refused
    assert "silent" in refused or "says nothing" in refused
    assert project.built() == project.anew()


def test_without_the_scheduler_it_stops_and_can_be_taken_up(
    project: Project, tmp_path: Path
) -> None:
    with cluster.running(tmp_path, [], ["hangs", "good"]) as (scheduler, (first, second)):
        env = environment(scheduler, MLX_MAKE_BUILD_CLUSTER_LOST="stop", **IMPATIENT)
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


@pytest.mark.parametrize(
    ("bits", "remotes"), [(2, ()), (3, ("one", "one")), (6, ("one", "two"))]
)  # bits that no other test has
def test_two_builds_of_a_hub_s_checkpoint_make_each_layer_once(
    bits: int, remotes: tuple[str, ...], workers: Workers, tmp_path: Path
) -> None:
    """For both, unless their results go to two places; then each place has all."""
    before, asked = len(workers.process.log.read_text()), len(workers.hub.requests)
    keys = {"dtype": "float16", "quantize": {"bits": bits}}
    ours = [projects.create(tmp_path / name, "huggingface", **keys) for name in "ab"]
    expected = ours[0].anew()
    repository = f"org/model-{bits}"
    workers.hub.repository(repository).add_folder(ours[0].checkpoint)
    where = [f"file://{tmp_path}/{remote}" for remote in remotes] or ["", ""]
    for remote in remotes:
        (tmp_path / remote).mkdir(exist_ok=True)
    for project in ours:
        project.configure(source=f"hf:{repository}", **keys)
    builds = [
        running.start(project, env=environment(workers.scheduler, MLX_MAKE_CACHE_REMOTE=remote))
        for project, remote in zip(ours, where, strict=True)
    ]
    said = [build.communicate(timeout=cluster.PATIENCE) for build in builds]
    printed = workers.process.log.read_text()[before:]
    made = [line for line in printed.splitlines() if line.startswith("made")]
    assert [build.returncode for build in builds] == [0, 0], said
    assert "Traceback" not in printed, printed
    assert len({*made}) >= len(projects.LAYERS["huggingface"]) - 1, said  # norm has no bits
    if len({*remotes}) < 2:
        assert len(made) == len({*made})
        size = sum(path.stat().st_size for path in ours[0].checkpoint.iterdir())
        read = sum(request.sent for request in workers.hub.requests[asked:])
        assert read < 1.8 * size  # each layer once; it is small, and each who plans reads headers
    for project, remote in zip(ours, where, strict=True):
        assert {**project.built(), "README.md": ""} == {**expected, "README.md": ""}
        assert not any((project.store / "blobs" / "packs").glob("*.part"))
        lock = json.loads((project.folder / "models.lock").read_text())
        (source,) = lock["sources"].values()  # each worker read parts of each file
        assert source["unverified"] == [f for f in source["files"] if f.endswith(".safetensors")]
        if remote:
            for folder in (project.store, project.folder / "build"):
                shutil.rmtree(folder)
            again = front_door.doit(project.folder, env={"MLX_MAKE_CACHE_REMOTE": remote})
            assert not project.quantizing() & again.computed

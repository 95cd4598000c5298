"""`doit cache`: what it says, what it removes, and that no build comes to harm by it."""

import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from cache.blobs import Blobs
from cache.digest import digest
from cache.lock import Lock
from cache.maintenance import gc, survey
from support import front_door, projects, running
from tasks.checkpoints import safetensors_file
from tasks.checkpoints.record import KIND
from tasks.cli.commands import cache as cache_command
from tasks.config import reader
from tasks.core.text import size

HOUR = 3600
DAY = 24 * HOUR
EVERYTHING = ("cache", "gc", "--all", "--max-size", "0")


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def blobs(project: projects.Project) -> Mapping[str, int]:
    """The bytes of the blobs that the store has itself."""
    return survey.inventory(project.store, [KIND]).owned


def files_of(project: projects.Project, made: Iterable[str]) -> set[Path]:
    """The files that are there for the sake of blobs."""
    found = survey.inventory(project.store, [KIND])
    keys = found.reach(made)
    keys |= {whole for whole in found.of("reference") if found.pinned(whole) & keys}
    kinds = ("blob", "reference", "container")
    return {file.path for file in found.files if file.kind in kinds and file.key in keys}


def spoil(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x11" * 1000)


def dead_process() -> int:
    with running.spawn([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def needed(project: projects.Project, target: str) -> set[str]:
    """The blobs that a target's manifests name."""
    found = set()
    for path in (project.state / "manifests" / target).glob("*/*.json"):
        found |= {tensor[-1] for tensor in json.loads(path.read_bytes())["tensors"]}
    return found & blobs(project).keys()


def test_stats_add_up_with_what_targets_share_counted_once(tmp_path):
    project = projects.create(tmp_path, "meta", **projects.FOUR_BIT)
    project.doit()
    project.configure("a-target-whose-name-is-far-too-long-for-a-table", quantize={"bits": 8})
    other = "a-target-whose-name-is-far-too-long-for-a-table"
    project.doit()
    project.configure("model", quantize={"bits": 6})
    project.doit()

    said = project.doit("cache", "stats").stdout.splitlines()
    assert all(len(line) <= 80 for line in said[1:])
    last = {line.split()[0]: " ".join(line.split()[-2:]) for line in said if line}
    both = needed(project, "model"), needed(project, other)
    own = blobs(project)

    def total(digests: Iterable[str]) -> int:
        return sum(own[digest] for digest in digests)

    assert last["model"] == size(total(both[0]))
    assert size(total(both[1])) in next(v for k, v in last.items() if k.startswith("a-target"))
    assert last["(all)"] == size(total(own))
    assert last["(no"] == size(total(own.keys() - both[0] - both[1]))
    assert f"share, {size(total(both[0] & both[1]))}," in "\n".join(said)
    outcomes = [entry["outcome"] for entry in projects.front_door.log(project.folder)]
    for outcome in ("computed", "reused", "failed"):
        row = next(line for line in said if line.startswith(outcome))
        assert row.split()[1] == str(outcomes.count(outcome))


def test_a_quick_look_reads_no_weights(tmp_path):
    project = projects.create(tmp_path, "meta", **projects.FOUR_BIT)
    project.doit()
    blob = project.blob("cast", "layers.1", "model.layers.1.mlp.up_proj.weight")
    spoil(blob)
    assert "none corrupt" in project.doit("cache", "verify", "--quick").stdout
    with blob.open("ab") as file:
        file.write(b" ")
    (memo, *_) = sorted((project.store / "memos").rglob("*.json"))
    projects.flip(memo, memo.stat().st_size - 2)
    found = project.doit("cache", "verify", "--quick", expect=1).stdout
    assert "2 corrupt" in found
    assert "cast:model:layers.1" in found
    assert not blob.exists()
    assert not memo.exists()
    assert "none corrupt" in project.doit("cache", "verify", "--quick").stdout
    project.doit()
    assert project.built() == project.anew()


def test_what_was_made_of_corrupt_bytes_is_made_again(tmp_path):
    project = projects.create(tmp_path, "meta", **projects.FOUR_BIT)
    project.doit()
    assert "none corrupt" in project.doit("cache", "verify").stdout
    name = "model.layers.1.mlp.up_proj.weight"
    blob = project.blob("cast", "layers.1", name)
    spoil(blob)
    # Noticed as it is read: nothing is made of it.
    project.configure(quantize={"bits": 3})
    project.doit()
    assert project.built() == project.anew()
    assert "none corrupt" in project.doit("cache", "verify").stdout

    spoil(blob)
    found = project.doit("cache", "verify", expect=1).stdout
    assert f"cast:model:layers.1 {name}" in found
    assert not blob.exists()
    aside = project.store / "corrupt" / blob.relative_to(project.store)
    assert digest(aside.read_bytes()) != blob.parent.name + blob.name
    assert "none corrupt" in project.doit("cache", "verify").stdout

    project.doit()
    assert project.built() == project.anew()
    project.doit("cache", "gc")
    assert not aside.exists()


@pytest.mark.parametrize("layout", ["mlx-lm", "mlx-examples"])
def test_a_corrupt_blob_is_never_packed(tmp_path, layout):
    project = projects.create(tmp_path, "meta", layout=layout, **projects.FOUR_BIT)
    project.doit()
    for layer in ("layers.1", "layers.3"):
        tensors = json.loads(project.manifest("quantize", layer).read_bytes())["tensors"]
        name = next(name for name, dtype, *_ in tensors if dtype == "uint32")
        project.stored("quantize", layer, name).flip(1000)
    project.configure(max_shard_size="1MB")
    entries = project.doit().entries
    lost = {entry["task"] for entry in entries if entry["why"].startswith("blob lost")}
    assert lost == {"quantize:model:layers.1", "quantize:model:layers.3"}
    assert project.built() == project.anew()
    found = project.doit("cache", "verify", expect=1).stdout
    assert " 1 corrupt" in found  # the built file as it was
    assert "none corrupt" in project.doit("cache", "verify").stdout


def test_changed_bytes_of_the_checkpoint_are_never_packed(tmp_path, has_ctime):
    """Not quantized, so packed from where they lie, under a stamp that holds."""
    project = projects.create(tmp_path, "huggingface")
    project.doit()
    name = "model.layers.2.self_attn.q_proj.weight"
    (weights,) = {path for path in projects.weight_files(project.checkpoint) if holds(path, name)}
    before, built = weights.stat(), project.built()
    projects.alter(project.checkpoint, name)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    project.configure(max_shard_size="1MB")
    said = project.doit(expect=1).stdout
    assert (f"tensor {name} has other contents" if has_ctime else f"{name} is lost") in said
    assert project.built() == built
    assert f"tensor {name} has other contents" in project.doit(expect=1).stdout
    project.accept()
    project.doit()
    assert project.built() == project.anew()


def test_a_checkpoint_that_changed_unnoticed_is_found(tmp_path, has_ctime):
    project = projects.create(tmp_path, "huggingface", **projects.FOUR_BIT)
    project.doit()
    name = "model.layers.2.self_attn.q_proj.weight"
    (weights,) = {path for path in projects.weight_files(project.checkpoint) if holds(path, name)}
    before = weights.stat()
    projects.alter(project.checkpoint, name)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    if not has_ctime:
        assert "nothing to do" in project.doit().stdout

    found = project.doit("cache", "verify", expect=1).stdout
    assert str(weights) in found
    assert f"extract:model:layers.2 {name}" in found
    assert f"tensor {name} has other contents" in project.doit(expect=1).stdout
    project.accept()
    project.doit()
    assert project.built() == project.anew()


def holds(path: Path, name: str) -> bool:
    return any(stored.name == name for stored in safetensors_file.read(path))


@pytest.mark.parametrize(
    "parts", [b"[]", b"{}", b'[["packs/x",0,-5]]', b'[["packs/x\\u0000",0,5]]', b'[["x","a",1]]']
)
def test_a_reference_to_nothing_is_found(parts, tmp_path):
    project = projects.create(tmp_path, "meta", **projects.FOUR_BIT)
    project.doit()
    stored = project.stored("quantize", "layers.0", "model.layers.0.mlp.up_proj.scales")
    stored.reference.write_bytes(parts)
    assert "scales" in project.doit("cache", "verify", expect=1).stdout
    assert "none corrupt" in project.doit("cache", "verify").stdout
    assert "containers of blobs" in project.doit("cache", "stats").stdout


def test_a_damaged_action_entry_is_found(tmp_path):
    project = projects.create(tmp_path, "meta", **projects.FOUR_BIT)
    project.doit()
    (entry,) = project.actions("quantize", "layers.0")
    entry.write_bytes(entry.read_bytes()[:-7])
    assert "quantize:model:layers.0" in project.doit("cache", "verify", expect=1).stdout
    assert not entry.exists()


def test_least_recently_used_goes_and_what_a_target_needs_stays(tmp_path):
    project = projects.create(tmp_path, "meta", **projects.FOUR_BIT)
    made: dict[int, set[Path]] = {}
    for bits in (4, 6, 8, 3):
        before = files_of(project, blobs(project)) if bits != 4 else set()
        project.configure(quantize={"bits": bits})
        project.doit()
        made[bits] = files_of(project, blobs(project)) - before
        for path in made[bits]:
            age(path, 20 * DAY if bits == 8 else 9 * DAY)
    # Used again, from the cache: the age of these is that of their last use.
    project.configure(quantize={"bits": 6})
    project.doit()
    project.configure(quantize={"bits": 3})
    project.doit()
    assert any(time.time() - path.stat().st_mtime < HOUR for path in made[6])
    for path in made[3]:
        if path.suffix == ".parts":  # else it is the built file, too
            age(path, 30 * DAY)

    def left() -> set[Path]:
        return {path for path in made[4] | made[6] | made[8] | made[3] if path.exists()}

    found = survey.inventory(project.store, [KIND])
    cap = found.size - sum(file.size for file in found.files if file.path in made[8])
    dry = project.doit("cache", "gc", "--max-size", str(cap), "--dry-run").stdout
    assert "would remove 1 containers of blobs" in dry
    assert made[8] <= left()
    project.doit("cache", "gc", "--max-size", str(cap))
    assert left() == made[4] | made[6] | made[3]

    said = project.doit("cache", "gc", "--max-size", "1").stdout
    assert "--all" in said
    assert made[3] <= left()
    assert not made[6] & left()
    assert "nothing to do" in project.doit().stdout


def test_what_lies_in_one_pack_goes_together(tmp_path):
    """Of references alone no room is to be had, and what they name would be lost."""
    project = projects.create(tmp_path, "huggingface", **projects.FOUR_BIT)
    project.doit()
    made = files_of(project, blobs(project))
    project.configure(quantize={"bits": 6})  # which leaves most biases as they are
    project.doit()
    found = survey.inventory(project.store, [KIND])
    (pack,) = {key for key, file in found.of("container").items() if file.path in made}
    inside = {key for key in found.of("reference") if pack in found.pinned(key)}
    assert len(inside) > 20
    unit = {file.path for file in found.files if file.key in {pack, *inside}}
    for path in unit:
        age(path, 9 * DAY)

    cap = found.size - 150  # as much as a few references have
    project.doit("cache", "gc", "--max-size", str(cap))
    left = survey.inventory(project.store, [KIND])
    assert left.size <= cap
    assert {file.path for file in found.files} - {file.path for file in left.files} == unit
    assert "nothing to do" in project.doit().stdout
    project.configure(quantize={"bits": 4})
    project.doit()
    assert project.built() == project.anew()


def test_without_a_cap_only_garbage_goes(tmp_path):
    project = projects.create(tmp_path, "meta", **projects.FOUR_BIT)
    project.doit()
    project.configure(quantize={"bits": 6})
    project.doit()
    before = {path for path in project.store.rglob("*") if path.is_file()}
    mine, dead = f".tmp-{platform.node()}", dead_process()
    some = next(path for path in (project.store / "memos").rglob("*.json"))
    (entry,) = project.actions("quantize", "norm")

    def temporary(folder: Path, name: str, seconds: float) -> Path:
        path = folder / name
        path.write_bytes(b"x" * 100)
        age(path, seconds)
        return path

    gone = [
        temporary(project.store / "blobs", f"{mine}-{dead}-a", 2 * HOUR),
        temporary(next((project.store / "blobs").glob("??")), f"{mine}-{dead}-b", 2 * HOUR),
        temporary(some.parent, f"{mine}-{dead}-c", 2 * HOUR),
        temporary(entry.parent, ".tmp-elsewhere-1-d", 2 * DAY),
    ]
    scratch = project.store / "blobs" / f"{mine}-{dead}-e"
    scratch.mkdir()
    gone.append(temporary(scratch, "0", 2 * HOUR))
    age(scratch, 2 * HOUR)
    kept = [
        temporary(entry.parent, f"{mine}-{os.getpid()}-f", 2 * HOUR),
        temporary(entry.parent, ".tmp-elsewhere-1-g", 2 * HOUR),
        temporary(entry.parent, "mine.txt", 400 * DAY),
    ]
    said = project.doit("cache", "gc", "--dry-run").stdout
    assert "would remove 5 temporary files, 500 B" in said
    assert all(path.exists() for path in gone)
    said = project.doit("cache", "gc").stdout
    assert "removed 5 temporary files, 500 B" in said
    assert "max_size" in said
    assert not any(path.exists() for path in (*gone, scratch))
    assert all(path.exists() for path in (*kept, *before))


def test_records_of_sources_go_that_no_target_needs(tmp_path):
    project = projects.create(tmp_path, "huggingface", **projects.FOUR_BIT)
    shutil.copytree(project.checkpoint, tmp_path / "spare")
    projects.alter(tmp_path / "spare", "model.norm.weight")
    project.configure("other", source="spare")
    project.doit()
    records = set((project.store / "sources").iterdir())
    assert len(records) == 2
    del project.models["other"]
    project.configure()
    (needed,) = (json.loads((tmp_path / "models.lock").read_bytes())["sources"]["checkpoint"],)
    for path in (project.store / "sources").rglob("*"):
        age(path, 80 * DAY)
    assert "source records" not in project.doit("cache", "gc").stdout
    for path in (project.store / "sources").rglob("*"):
        age(path, 100 * DAY)
    assert "removed 1 source records" in project.doit("cache", "gc").stdout
    assert [path.name for path in (project.store / "sources").iterdir()] == [needed["record"]]
    # Used again: when it was, its time says.
    shutil.rmtree(project.checkpoint)
    shutil.rmtree(project.folder / "build")
    project.doit()
    (record,) = (project.store / "sources").glob("*/record.json")
    assert time.time() - record.stat().st_mtime < HOUR
    project.doit(*EVERYTHING)
    assert list((project.store / "sources").iterdir()) == []


def test_looking_ahead_is_no_use(tmp_path):
    """`doit plan` leaves everything as it is, times too; but what it learned is remembered."""
    project = projects.create(tmp_path, "huggingface", **projects.FOUR_BIT)
    project.doit()
    project.configure(quantize={"bits": 6})
    shutil.rmtree(project.state / "manifests")
    shutil.rmtree(project.checkpoint)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            age(path, 9 * DAY)
    memos = project.store / "memos"

    def times() -> dict[Path, int]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if memos not in path.parents}

    before, remembered = times(), projects.contents(memos)
    project.doit("plan", expect=1)
    assert times() == before
    assert projects.contents(memos).items() >= remembered.items()


def test_what_two_want_that_is_lost_is_made_once(tmp_path):
    """At the same time: one makes it, and the other waits."""
    project = projects.create(tmp_path, "meta", **projects.FOUR_BIT)
    project.doit()
    blob = project.blob("cast", "layers.1", "model.layers.1.mlp.up_proj.weight")
    blob.unlink()
    project.configure(quantize={"bits": 6})
    project.configure("other", dtype="float16", quantize={"bits": 8})
    # Each looks for it twice, before it asks who makes it.
    done = project.doit(hook={"meet": [f"{blob.name}.parts", 20, 2]})
    lost = [entry["task"] for entry in done.entries if entry["why"].startswith("blob lost")]
    assert len(lost) == 1
    assert project.built() == project.anew()
    assert project.built("other") == project.anew("other")


def test_a_reference_keeps_the_blobs_that_it_is_made_of(tmp_path):
    store = Blobs(tmp_path / "blobs")
    keys = {}
    for name, data in (("a", b"a" * 50), ("b", b"b" * 70), ("alone", b"c" * 60)):
        with store.writing() as writer:
            writer.write(memoryview(data))
        keys[name] = writer.digest
        age(store.path(writer.digest), 9 * DAY if name != "alone" else 5 * DAY)
    parts = [part for name in "ab" for part in store.locate(keys[name], 50 if name == "a" else 70)]
    for name in "ab":
        age(store.path(keys[name]), 9 * DAY)
    keys["stack"] = digest(b"a" * 50 + b"b" * 70)
    store.refer(keys["stack"], parts)
    found = survey.inventory(tmp_path)

    def evicted(wanted: str, cap: int) -> list[str]:
        names = {key: name for name, key in keys.items()}
        blobs = frozenset(key for name, key in keys.items() if name == wanted)
        gone: list[survey.File] = []
        gc.collect(found, gc.Wanted(blobs), cap, time.time(), gone.append)
        return [names[file.key] for file in gone]

    assert evicted("stack", 0) == ["alone"]
    assert evicted("", found.size - 1) == ["alone"]
    assert evicted("", 0)[:2] == ["alone", "stack"]
    # By a changed mtime no reference is lost: a blob's own file is vouched for by its name.
    assert store.locate(keys["stack"], 120) == parts


@pytest.mark.parametrize("kind", projects.SOURCES)
def test_what_was_evicted_is_not_missed_until_it_is_wanted(tmp_path, kind):
    project = projects.create(tmp_path, kind, **projects.FOUR_BIT)
    project.doit()
    project.doit(*EVERYTHING)
    assert not any(path.is_file() for path in (project.store / "blobs").rglob("*"))
    assert "nothing to do" in project.doit().stdout
    projects._seed(project)
    project.configure(quantize={"bits": 6})
    project.doit()
    assert project.built() == project.anew()


def anew(project, bits):
    project.configure(quantize={"bits": bits})
    return project.anew()


def test_builds_beside_collectors_come_out_right(tmp_path):
    """Two folders of one cache build while everything is removed, over and over."""
    some = [
        projects.create(tmp_path / kind, kind, cache=tmp_path / "cache", **projects.FOUR_BIT)
        for kind in projects.SOURCES
    ]
    read = reader.load(some[0].folder / "models.toml")
    expected = {(each.kind, bits): anew(each, bits) for each in some for bits in (4, 6)}
    stop = threading.Event()
    failures = []

    def collect_all() -> None:
        try:
            while not stop.wait(0.01):
                options = {"max_size": "1", "all": True, "dry_run": False}
                cache_command.collect_garbage(read, options)
        except BaseException as error:
            failures.append(error)

    def build(project: projects.Project) -> None:
        try:
            for bits in (4, 6):
                project.configure(quantize={"bits": bits})
                front_door.doit(project.folder)
                assert project.built() == expected[project.kind, bits]
        except BaseException as error:
            failures.append(error)

    collector = threading.Thread(target=collect_all)
    builds = [threading.Thread(target=build, args=[project]) for project in some]
    for thread in (collector, *builds):
        thread.start()
    for thread in builds:
        thread.join()
    stop.set()
    collector.join()
    assert not failures
    entries = [entry for project in some for entry in projects.front_door.log(project.folder)]
    lost = [entry for entry in entries if entry["why"].startswith("blob lost")]
    assert lost, "nothing was removed under a build: this shows nothing"


def test_a_collector_waits_for_tasks_and_tasks_for_a_waiting_collector(tmp_path):
    lock = Lock(tmp_path)
    order = []
    waiting = threading.Event()

    def alone() -> None:
        with lock.alone(waiting.set):
            order.append("collector")

    def late() -> None:
        with lock.using():
            order.append("late task")

    with lock.using(), lock.using():
        collector = threading.Thread(target=alone)
        collector.start()
        assert waiting.wait(10)
        task = threading.Thread(target=late)
        task.start()
        time.sleep(0.1)
        order.append("tasks end")
    collector.join()
    task.join()
    assert order == ["tasks end", "collector", "late task"]


@pytest.mark.parametrize("subcommand", ["stats", "verify", "gc"])
def test_a_cache_that_is_not_there_and_a_bad_models_toml(tmp_path, subcommand):
    (tmp_path / "models.toml").write_text('[models.a]\nsource = "nowhere"\n', encoding="utf-8")
    done = projects.front_door.doit(tmp_path, "cache", subcommand)
    assert "0 B" in done.stdout or "nothing" in done.stdout
    (tmp_path / "models.toml").write_text('[models.a]\nsauce = "nowhere"\n', encoding="utf-8")
    done = projects.front_door.doit(tmp_path, "cache", subcommand, expect=3)
    assert done.stderr.startswith("ERROR: ")
    assert "Did you mean 'source'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "fact"),
    [
        (["gsc"], "doit cache has no 'gsc'; it has stats, verify, gc, push, pull"),
        (["gc", "all"], "takes no 'all'"),
        (["gc", "--max-size", "20 gigs"], "20 gigs is no size: write it as 20GB"),
        (["gc", "--all"], "--all needs a size cap"),
        (["stats", "--all"], "--all not recognized"),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, args, fact):
    (tmp_path / "models.toml").write_text('[models.a]\nsource = "a"\n', encoding="utf-8")
    done = projects.front_door.doit(tmp_path, "cache", *args, expect=3)
    assert fact in done.stderr
    assert "Traceback" not in done.stderr


def test_alone_it_says_what_there_is(tmp_path):
    said = projects.front_door.doit(tmp_path, "cache").stdout
    assert all(word in said for word in ("stats", "verify", "gc", "--max-size", "--dry-run"))

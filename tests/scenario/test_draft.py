"""What is quantized is written once, in its place in a weight file that build/ and cache share."""

import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

import pytest
from safetensors import safe_open

from cache.errors import NoRoom
from cache.files import link
from cache.maintenance import survey
from support import checkpoints, inside
from support.projects import FOUR_BIT, Project, contents, create, flip, outcomes
from support.running import start, wait_for
from tasks.checkpoints.record import KIND
from tasks.planning import bundle
from tasks.tensors import device

SHARDS = {**FOUR_BIT, "max_shard_size": "200kB"}


def weights(project: Project, target: str = "model") -> list[Path]:
    folder = project.folder / "build" / target
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".npz"))


def packs(project: Project) -> set[str]:
    """The digests of the cache's weight files."""
    return {*contents(project.packs).values()}


def packed(project: Project, target: str = "model") -> set[str]:
    """The digests of the built ones."""
    built = project.built(target)
    return {built[path.name] for path in weights(project, target)}


def written(entries: list[dict], *stages: str) -> int:
    return sum(e["bytes_written"] for e in entries if e["task"].split(":")[0] in stages)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("huggingface", FOUR_BIT), ("huggingface", SHARDS), ("meta", {"layout": "mlx-examples"})],
)
def test_no_byte_is_written_twice(kind: str, keys: dict, tmp_path: Path) -> None:
    """Not by the build, and not by taking a setting back, or by a build/ that was removed."""
    project = create(tmp_path, kind, **{**keys, "quantize": {"bits": 4}})
    done = project.doit()
    first = project.built()
    size = sum(path.stat().st_size for path in (tmp_path / "build" / "model").iterdir())
    assert size <= written(done.entries, "quantize", "pack") < 1.01 * size
    assert packed(project) <= packs(project)
    for path in weights(project):  # the cache's own, where the file system shares no blocks
        assert path.stat().st_nlink == 1 or not path.stat().st_mode & 0o222

    project.configure(quantize={"bits": 8})
    project.doit()
    assert project.built() == project.anew()
    for change in (lambda: None, lambda: shutil.rmtree(tmp_path / "build")):
        change()
        project.configure(quantize={"bits": 4})
        done = project.doit()
        assert "computed" not in outcomes(done)
        assert written(done.entries, "quantize", "pack") < 0.1 * size  # the small files
        assert project.built() == first == project.anew()
    assert project.doit().entries == []


@pytest.mark.skipif(platform.system() != "Linux", reason="FICLONE is Linux's")
def test_a_file_system_that_shares_blocks(tmp_path: Path) -> None:
    """A built file is none of the cache's there: what is done to it is done to nothing else."""
    hook = {"reflinks": True}
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    done = project.doit(hook=hook)
    (path,) = weights(project)
    size = sum(path.stat().st_size for path in (tmp_path / "build" / "model").iterdir())
    assert written(done.entries, "quantize", "pack") < 1.01 * size
    assert packed(project) == packs(project)
    assert (path.stat().st_nlink, path.stat().st_mode & 0o200) == (1, 0o200)
    flip(path, 50_000)
    assert outcomes(project.doit(hook=hook)) == {"reused": {"pack:model"}}
    assert project.built() == project.anew()
    assert "none corrupt" in project.doit("cache", "verify").stdout


def test_a_report_packs_as_well(tmp_path: Path) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    plan = json.loads(project.doit("plan", "--json", "report", expect=1).stdout)
    done = project.doit("report")
    assert packed(project) == packs(project)
    total = sum(entry["bytes_written"] for entry in done.entries)
    assert plan["bytes_written"] == pytest.approx(total, abs=60_000)  # headers, a tokenizer


def test_a_cache_that_moved(tmp_path: Path) -> None:
    """Its own files are found where it is now."""
    project = create(tmp_path / "before", "huggingface", **FOUR_BIT)
    project.doit()
    built = project.built()
    shutil.move(project.folder, tmp_path / "after")
    project.folder = tmp_path / "after"
    shutil.rmtree(project.folder / "build")
    project.lose_packed()
    assert not outcomes(project.doit()).get("computed", set()) & project.quantizing()
    assert project.built() == built


def test_few_new_layers_are_no_reason_for_another_file(tmp_path: Path) -> None:
    """It would stay in the cache for their sake. They are packed as ever."""
    rule = {"match": "*.layers.1.*", "bits": 8}
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    before = packs(project)
    project.configure(quantize={"bits": 4, "rules": [rule]})
    assert outcomes(project.doit()) == {"computed": {"quantize:model:layers.1", "pack:model"}}
    assert packs(project) == before
    assert not packed(project) & before
    assert project.built() == project.anew()


@pytest.mark.parametrize("change", ["dtype", "checkpoint"])
def test_a_change_of_all_that_is_quantized(change: str, tmp_path: Path) -> None:
    """The manifests that are there tell of what was before it; `doit plan` knows that, too."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    if change == "dtype":
        project.configure(dtype="bfloat16")
    else:
        checkpoints.make("llama", project.checkpoint, seed=1)
        project.accept()
    plan = json.loads(project.doit("plan", "--json", expect=1).stdout)
    done = project.doit()
    size = sum(path.stat().st_size for path in (tmp_path / "build" / "model").iterdir())
    assert size <= written(done.entries, "quantize", "pack") < 1.01 * size
    assert packed(project) <= packs(project)
    total = sum(entry["bytes_written"] for entry in done.entries)
    assert plan["bytes_written"] == pytest.approx(total, abs=60_000)  # headers, a tokenizer
    assert project.built() == project.anew()


def test_a_first_layer_of_which_nothing_is_quantized(tmp_path: Path) -> None:
    """The weight files are begun with it, and the others written into them."""
    rules = [{"match": "model.embed_tokens", "skip": True}]
    project = create(tmp_path, "huggingface", quantize={"bits": 4, "rules": rules})
    project.doit(hook={"cores": 4})
    assert packed(project) == packs(project)
    assert project.built() == project.anew()


def test_what_lies_beside_a_wanted_layer_stays(tmp_path: Path) -> None:
    """Removing what says where it is would free nothing."""
    project = create(tmp_path, "huggingface", dtype="float16", quantize={"bits": 8})
    project.doit()
    rule = {"match": "*.layers.1.*", "bits": 8}
    project.configure(quantize={"bits": 4, "rules": [rule]})
    project.doit()
    assert "No current target needs" not in project.doit("cache", "stats").stdout
    there = survey.inventory(project.store, [KIND]).owned
    project.doit("cache", "gc", "--max-size", "1")
    assert survey.inventory(project.store, [KIND]).owned == there
    shutil.rmtree(tmp_path / "build")
    project.lose_packed()
    assert not outcomes(project.doit()).get("computed")
    assert project.built() == project.anew()


def test_a_built_file_that_is_altered(tmp_path: Path) -> None:
    """It is the cache's own. What is measured of it is not taken from there, either."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit("measure")
    errors = {path.name: path.read_bytes() for path in error_manifests(project)}
    shutil.rmtree(project.state)
    project.doit()
    stored = project.stored("quantize", "layers.3", "model.layers.3.mlp.up_proj.weight")
    stored.flip(500)
    project.doit("measure")
    assert {path.name: path.read_bytes() for path in error_manifests(project)} == errors
    project.doit()
    assert project.built() == project.anew()


def error_manifests(project: Project) -> list[Path]:
    return sorted((project.state / "manifests" / "model" / "error").iterdir())


def test_a_built_file_that_decayed(tmp_path: Path) -> None:
    """Unnoticed, since its time is as it was; verify finds it, also in what is not quantized."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.doit()
    (path,) = project.packs.iterdir()  # the built one, too, if it is a link
    before = path.stat()
    with safe_open(path, "mlx") as read:
        norm = bytes(read.get_tensor("model.norm.weight"))
    at = path.read_bytes().index(norm)
    flip(path, at)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "nothing to do" in project.doit().stdout
    assert "pack:model" in project.doit("cache", "verify", expect=1).stdout
    project.doit()
    assert project.built() == project.anew()


def test_targets_that_share_layers(tmp_path: Path) -> None:
    """Each layer is written where the first one that makes it has it; the others copy it."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    project.configure("shards", **SHARDS)
    project.configure("other", dtype="float16", quantize={"bits": 8})
    project.doit()
    for target in ("model", "shards", "other"):
        assert project.built(target) == project.anew(target)
    assert packed(project, "other") <= packs(project)


@pytest.mark.parametrize("last", ["layers.1", "layers.6"])
def test_a_build_that_was_killed(last: str, tmp_path: Path) -> None:
    """What it wrote stays; of few layers it is copied into the next one's file, most are packed."""
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    checkpoints.make("llama", project.checkpoint, num_hidden_layers=8)
    mark = tmp_path / "mark"
    held = [os.sep.join(["", "quantize", f"{last}.json"]), str(mark), str(tmp_path / "never")]
    process = start(project, "-n", "1", hook={"hold": held})
    wait_for(mark.exists, process)
    process.kill()
    process.communicate()
    (first,) = packs(project)
    made = {path.stem for path in (project.state / "manifests/model/quantize").glob("*.json")}
    assert "layers.0" in made
    done = project.doit()
    assert not {f"quantize:model:{layer}" for layer in made} & outcomes(done)["computed"]
    assert project.built() == project.anew()
    assert len(packs(project) - {first}) == (last == "layers.1")
    assert "none corrupt" in project.doit("cache", "verify").stdout


def test_cuda_writes_into_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = create(tmp_path, "huggingface", **FOUR_BIT)
    assert bundle.writes_in_place(inside.session(tmp_path).plans["model"], lambda _: True)
    monkeypatch.setattr(device, "backend", lambda _: "cuda")
    assert not bundle.writes_in_place(inside.session(tmp_path).plans["model"], lambda _: True)
    assert not packs(project)


def test_a_cache_on_another_disk(tmp_path: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system here")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        project = create(tmp_path, "huggingface", cache=Path(folder), **FOUR_BIT)
        plan = json.loads(project.doit("plan", "--json", expect=1).stdout)
        done = project.doit()
        total = sum(entry["bytes_written"] for entry in done.entries)
        assert plan["bytes_written"] == pytest.approx(total, abs=90_000)  # headers, twice
        assert project.built() == project.anew()
        assert all(path.stat().st_nlink == 1 for path in weights(project))


def test_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no links either, the bytes are copied, if there is room."""
    source = tmp_path / "source"
    source.write_bytes(b"bytes" * 100)

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    assert not link.link(source, tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(link, "_reflink", lambda *_: False)
    assert link.link(source, tmp_path / "copied")
    for name in ("linked", "copied"):
        assert (tmp_path / name).read_bytes() == source.read_bytes()
    assert (tmp_path / "copied").stat().st_ino != source.stat().st_ino
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(NoRoom):
        link.link(source, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

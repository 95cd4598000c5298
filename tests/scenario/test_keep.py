"""`[cache] keep`: whatever it says, the same models; what it says, and no more, is written."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cache.maintenance import survey
from support import checkpoints, inside
from support.projects import FOUR_BIT, Project, create, outcomes, weight_files
from tasks.checkpoints.record import KIND
from tasks.execution.pack import Packing

POLICIES: dict[str, list[str] | None] = {
    "default": None,
    "nothing": [],
    "unshard": ["unshard"],
    "both": ["unshard", "cast"],
}
# By the target's name, the checkpoint beside models.toml and the other keys.
TARGETS = {
    "joined-cast": ("meta", FOUR_BIT),
    "joined": ("meta", {"quantize": {"bits": 4}}),
    "joined-unquantized": ("meta", {"dtype": "float16"}),
    "joined-examples": ("meta", {"quantize": {"bits": 4}, "layout": "mlx-examples"}),
    "narrow": ("llama", FOUR_BIT),
    "plain": ("llama", {"quantize": {"bits": 4}}),
    "narrow-unquantized": ("llama", {"dtype": "float16"}),
    "plain-unquantized": ("llama", {}),
    "tied": ("llama-tied", {"dtype": "bfloat16", "quantize": {"mode": "mxfp4"}}),
    "sanitized": ("deepseek-v3", {"dtype": "float16", "quantize": {"bits": 4}}),
    "stacked": ("mixtral", {"quantize": {"bits": 4}}),
}


def in_meta(folder: Path, policy: list[str] | None, **keys) -> Project:
    """A project on Meta's two shards of bfloat16."""
    project = create(folder, "meta")
    project.keep = policy
    project.configure(**FOUR_BIT | keys)
    return project


def owned(project: Project) -> set[str]:
    """The digests of the blobs whose bytes the store has itself."""
    return {*survey.inventory(project.store, [KIND]).owned}


def made(project: Project, stage: str) -> Iterator[tuple[list, str]]:
    """By tensor that a stage made: how unshard was told to make it, and its digest."""
    for path in (project.state / "manifests" / "model" / stage).iterdir():
        manifest = json.loads(path.read_bytes())
        told = manifest["action"]["params"].get("tensors", {})
        for name, *_, digest in manifest["tensors"]:
            yield told[name][3] if stage == "unshard" else [], digest


def expected(project: Project, keep: list[str]) -> set[str]:
    """The digests of what a policy writes: what is packed; and by stage what is no mere range."""
    found = {digest for _, digest in made(project, "quantize")}
    if "cast" in keep:
        found |= {digest for _, digest in made(project, "cast")}
    if "unshard" in keep:
        ranges = (["same"], ["concatenate", 0])
        found |= {
            digest for steps, digest in made(project, "unshard")
            if any(step not in ranges for step in steps)
        }  # fmt: skip
    return found


def test_every_policy_builds_the_same(tmp_path: Path) -> None:
    built = {}
    memos = tmp_path / "architectures"
    for policy, keep in POLICIES.items():
        project = create(tmp_path / policy, "meta")
        shutil.move(project.checkpoint, project.folder / "meta")
        for arch in {source for source, _ in TARGETS.values()} - {"meta"}:
            checkpoints.make(arch, project.folder / arch, num_hidden_layers=2)
        project.keep = keep
        project.models.clear()
        for target, (source, keys) in TARGETS.items():
            project.configure(target, source=source, **keys)
        shutil.copy(project.folder / "meta" / "tokenizer.model", project.folder / "llama")
        if memos.exists():  # what mlx-lm says of the architectures, asked once
            shutil.copytree(memos, project.store / "memos" / memos.name, dirs_exist_ok=True)
        project.doit()
        if not memos.exists():
            shutil.copytree(project.store / "memos" / memos.name, memos)
        assert project.doit().entries == [], policy
        built[policy] = {target: project.built(target) for target in TARGETS}
        shutil.rmtree(project.folder)
    for target in TARGETS:
        assert {"config.json"} < built["default"][target].keys()
        for policy in POLICIES:
            assert built[policy][target] == built["default"][target], (policy, target)


def test_what_is_written(tmp_path: Path) -> None:
    sizes = {}
    for policy, keep in POLICIES.items():
        project = in_meta(tmp_path / policy, keep)
        project.doit()
        found = owned(project)
        assert found == expected(project, ["cast"] if keep is None else keep), policy
        sizes[policy] = sum(path.stat().st_size for path in (project.store / "blobs").rglob("*"))
        assert project.built() == project.anew()
    assert sizes["nothing"] < sizes["unshard"] < sizes["both"]
    assert sizes["nothing"] < sizes["default"] < sizes["both"]


@pytest.mark.parametrize("policy", POLICIES)
def test_changed_bits(policy: str, tmp_path: Path) -> None:
    """They compute no more for what is not kept; but they read it again in the checkpoint."""
    keep = POLICIES[policy]
    project = in_meta(tmp_path, keep)
    project.doit()
    project.configure(quantize={"bits": 8})
    record = tmp_path / "record.json"
    done = project.doit(hook={"record": str(record)})
    assert outcomes(done) == {"computed": project.quantizing()}
    opened = {*json.loads(record.read_bytes())["opened"]}
    weights = {*map(str, weight_files(project.checkpoint))}
    # Without cast, at least for what unshard joined end to end: it is a range of the checkpoint.
    assert bool(opened & weights) == (keep is not None and "cast" not in keep)
    assert project.built() == project.anew()


@pytest.mark.parametrize(
    ("before", "after", "again"),
    [("both", "nothing", ()), ("default", "nothing", ()), ("nothing", "default", ("cast",)),
     ("nothing", "both", ("unshard", "cast")), ("unshard", "default", ("cast",))],
)  # fmt: skip
def test_another_policy(before: str, after: str, again: tuple[str, ...], tmp_path: Path) -> None:
    """Nothing that is there is made again; what was not kept is, once it is wanted."""
    project = in_meta(tmp_path, POLICIES[before])
    project.doit()
    project.keep = POLICIES[after]
    project.configure()
    assert project.doit().entries == []
    project.configure(quantize={"bits": 8})
    computed = outcomes(project.doit())["computed"]
    # The norm is kept as it is packed, and unshard makes both of these of ranges.
    there = {"cast:model:norm", "unshard:model:norm", "unshard:model:lm_head"}
    wanted = project.quantizing() | project.tasks(again, pack=False)
    assert computed - there == wanted - there
    assert project.built() == project.anew()
    project.configure(quantize={"bits": 6})
    assert outcomes(project.doit()) == {"computed": project.quantizing()}  # kept from now on


@pytest.mark.parametrize("policy", POLICIES)
def test_each_blob_lost(policy: str, tmp_path: Path) -> None:
    """Some at a time, with everything made anew that quantize and pack make."""
    project = in_meta(tmp_path, POLICIES[policy])
    project.doit()
    before = project.built()
    packed = {digest for _, digest in made(project, "quantize")}
    blobs = [path for path in (project.store / "blobs").rglob("*") if path.is_file()]
    assert len(blobs) > 50
    for some in (blobs[i::6] for i in range(6)):
        for blob in some:
            blob.unlink()
        quantize_and_pack(project)
        assert project.built() == before
        assert packed <= owned(project)


def quantize_and_pack(project: Project) -> None:
    """What doit would do if no record of quantize and pack were left, in this process."""
    found = inside.session(project.folder)
    shutil.rmtree(project.state / "manifests" / "model" / "quantize")
    shutil.rmtree(project.store / "actions")
    shutil.rmtree(project.folder / "build")
    plan = found.plans["model"]
    for node in plan.last:
        found.builder.run(plan, node, "test")
    # Neither lock nor remote has a say.
    nobody = SimpleNamespace(
        with_blake3=False, locked_output=None, check=lambda _: None, accept=lambda *_: None,
        contradicted=lambda _: False, output=lambda _: None,
    )  # fmt: skip
    Packing(found.builder, plan, nobody, None).run("test")


def test_a_checkpoint_that_goes_while_it_is_needed(tmp_path: Path) -> None:
    """With nothing kept, changed bits need it; it goes after the plan was made."""
    project = in_meta(tmp_path / "project", [])
    project.doit()
    before = project.built()
    project.configure(quantize={"bits": 8})
    shard = weight_files(project.checkpoint)[1]
    mark, go = tmp_path / "mark", tmp_path / "go"

    def take_away() -> None:
        while not mark.exists():
            time.sleep(0.005)
        shard.rename(tmp_path / "away")
        go.touch()

    thread = threading.Thread(target=take_away)
    thread.start()
    hold = {"hold": [f"{os.sep}actions{os.sep}", str(mark), str(go)]}
    done = project.doit(hook=hold, expect=1)
    thread.join()
    assert str(shard) in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert project.built() == before
    (tmp_path / "away").rename(shard)
    project.doit()
    assert project.built() == project.anew()

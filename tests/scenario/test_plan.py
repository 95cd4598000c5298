"""Doit then does what doit plan says."""

import fcntl
import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from support import inside, meta, projects
from support.projects import Project
from tasks.layouts import asking

OUTCOME = {"run": "computed", "reuse": "reused", "fetch": "fetched"}
QUANTIZE = (
    False,
    {"bits": 4},
    {"bits": 8},
    {"bits": 4, "group_size": 32},
    {"mode": "mxfp4"},
    {"recipe": "mixed_3_6"},
    {"bits": 4, "rules": [{"match": "*down_proj", "bits": 8}]},
    {"bits": 4, "rules": [{"match": "lm_head", "skip": True}]},
)
REST = 50_000  # bytes in build/ that are no tensors: not foretold where these are not known
STAGES = ("extract", "unshard", "cast", "quantize", "pack")
LAYERS = ("embed_tokens", "layers.0", "layers.1", "norm", "lm_head")


# What doit plan says is what doit does


@dataclass
class World:
    """A project whose owner edits it, and another that shares a cache or a remote with it.

    Attributes:
        folder: of both.
        models: what models.toml says of each model.
        cache: what it says of the cache.
        lost: whether the action cache has results made of others that it has not.
    """

    folder: Path
    models: dict[str, dict] = field(default_factory=lambda: {"a": {"quantize": {"bits": 4}}})
    cache: dict = field(default_factory=dict)
    lost: bool = False

    @property
    def mine(self) -> Path:
        return self.folder / "mine"

    @property
    def store(self) -> Path:
        return Path(self.cache.get("dir", self.mine / ".mlx-make" / "cache"))

    def begin(self, checkpoint: Path) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("mine", "other"):
            shutil.copytree(checkpoint, self.folder / name / "checkpoint")
        self.configure(self.mine)

    def configure(self, folder: Path) -> None:
        tables = {"cache": self.cache}
        tables |= {
            f"models.{name}": {"source": "checkpoint", "device": "cpu", **model}
            for name, model in self.models.items()
        }
        lines = []
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{k} = {projects._toml(v)}" for k, v in table.items())]
        (folder / "models.toml").write_text("\n".join(lines) + "\n")

    def some(self, pick: random.Random, folder: Path, pattern: str, count: int = 1) -> list[Path]:
        found = sorted(path for path in folder.rglob(pattern) if path.is_file())
        return pick.sample(found, min(count, len(found)))

    # The edits. Each may find nothing to do.

    def quantize(self, pick: random.Random) -> None:
        model = self.models[pick.choice(list(self.models))]
        # llama.py of mlx-examples takes one setting for all.
        some = QUANTIZE[1:4] if model.get("layout") == "mlx-examples" else QUANTIZE
        model["quantize"] = pick.choice(some)

    def dtype(self, pick: random.Random) -> None:
        self.models[pick.choice(list(self.models))]["dtype"] = pick.choice(
            ["float16", "bfloat16", "float32"]
        )

    def shard_size(self, pick: random.Random) -> None:
        self.models[pick.choice(list(self.models))]["max_shard_size"] = pick.choice(
            ["100kB", "300kB", "5GiB"]
        )

    def layout(self, pick: random.Random) -> None:
        model = self.models[pick.choice(list(self.models))]
        model["layout"] = pick.choice(["mlx-lm", "mlx-examples"])
        if model["layout"] == "mlx-examples":
            model["quantize"] = {"bits": 4}

    def variant(self, pick: random.Random) -> None:
        if len(self.models) > 1:
            del self.models[pick.choice(list(self.models))]
        else:
            self.models[pick.choice("bc")] = {"quantize": pick.choice(QUANTIZE)}

    def touched(self, pick: random.Random) -> None:
        projects.touch(*self.some(pick, self.mine / "checkpoint", "*.pth"))

    def replaced(self, pick: random.Random) -> None:
        for path in self.some(pick, self.mine / "checkpoint", "*"):
            shutil.copy(path, self.mine / "copy")
            os.replace(self.mine / "copy", path)

    def altered(self, pick: random.Random) -> None:
        name = f"layers.{pick.randrange(2)}.feed_forward.w1.weight"
        projects.alter(self.mine / "checkpoint", name)
        self.configure(self.mine)
        self.remove_unknown()  # of which lock tells, too
        inside.doit(self.mine, "lock")

    def lost_blobs(self, pick: random.Random) -> None:
        for path in self.some(pick, self.store / "blobs", "*", pick.choice([1, 5, 1000])):
            path.unlink()

    def lost_manifests(self, pick: random.Random) -> None:
        for path in self.some(pick, self.mine / ".mlx-make" / "manifests", "*.json", 2):
            path.unlink()

    def lost_entries(self, pick: random.Random) -> None:
        for path in self.some(pick, self.store / "actions", "*.json", pick.choice([2, 1000])):
            path.unlink()
            self.lost = True

    def lost_memos(self, pick: random.Random) -> None:
        shutil.rmtree(self.store / "memos" / "extracts", ignore_errors=True)

    def remove_unknown(self) -> None:
        """Remove built folders without a record, which may be refused: see test_nothing_is_lost."""
        for built in (self.mine / "build").glob("*"):
            if not (self.mine / ".mlx-make" / "manifests" / built.name / "pack.json").exists():
                shutil.rmtree(built)

    def lost_build(self, pick: random.Random) -> None:
        for path in self.some(pick, self.mine / "build", "*.*[sz]"):
            path.unlink()

    def lost_database(self, pick: random.Random) -> None:
        (self.mine / ".mlx-make" / "doit.json").unlink(missing_ok=True)

    def lost_state(self, pick: random.Random) -> None:
        shutil.rmtree(self.mine / ".mlx-make" / "manifests", ignore_errors=True)
        self.lost_database(pick)

    def lost_lock(self, pick: random.Random) -> None:
        (self.mine / "models.lock").unlink(missing_ok=True)

    def keep(self, pick: random.Random) -> None:
        self.cache["keep"] = pick.choice([[], ["cast"], ["unshard"], ["unshard", "cast"]])

    def shared_cache(self, pick: random.Random) -> None:
        self.cache["dir"] = str(self.folder / "shared")
        self.lost = True
        self.build_other(pick)

    def remote(self, pick: random.Random) -> None:
        self.cache["remote"] = (self.folder / "remote").as_uri()
        here = self.cache.pop("dir", None)
        self.build_other(pick)
        if here:
            self.cache["dir"] = here

    def build_other(self, pick: random.Random) -> None:
        if pick.random() < 0.7:
            self.configure(self.folder / "other")
            inside.doit(self.folder / "other")


EDITS: tuple[Callable[[World, random.Random], None], ...] = (
    World.quantize, World.dtype, World.shard_size, World.layout, World.variant, World.touched,
    World.replaced, World.altered, World.lost_blobs, World.lost_manifests, World.lost_entries,
    World.lost_memos, World.lost_build, World.lost_database, World.lost_state, World.lost_lock,
    World.keep, World.shared_cache, World.remote,
)  # fmt: skip
edits = st.lists(st.sampled_from(EDITS), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest of Meta's, in two shards: there is something to join, to cast, to copy."""
    return meta.make("llama-2", tmp_path_factory.mktemp("plan") / "checkpoint", shards=2)


EXAMPLES = int(os.environ.get("MLX_MAKE_TEST_EXAMPLES", "12"))


@settings(
    deadline=None,
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink would take minutes
)
@given(rounds=st.lists(edits, min_size=1, max_size=4), pick=st.randoms(use_true_random=False))
def test_doit_does_what_plan_says(
    tmp_path: Path, checkpoint: Path, rounds: list, pick: random.Random
) -> None:
    world = World(tmp_path / "world")
    world.begin(checkpoint)
    for these in ([], *rounds):
        note(f"{[edit.__name__ for edit in these]}")
        for edit in these:
            edit(world, pick)
        world.configure(world.mine)
        world.remove_unknown()
        compare(world)


def compare(world: World) -> dict[str, dict]:
    """Have doit do what is to be done, and return what doit plan said of each task."""
    before = everything(world.folder)
    packed = {path.parent.name for path in (world.mine / ".mlx-make").rglob("pack.json")}
    plan = json.loads(inside.doit(world.mine, "plan", "--json", expect=None).stdout)
    assert everything(world.folder) == before, "doit plan writes nothing"
    done = inside.doit(world.mine)
    # Without a manifest only sizes tell what build/ holds, and `altered` changes none.
    told = not any(
        step["stage"] == "pack" and step["state"] == "reuse" and step["target"] not in packed
        for step in plan["tasks"]
    )
    check(plan, done.entries, lost=world.lost, bytes_told=told)
    after = json.loads(inside.doit(world.mine, "plan", "--json").stdout)
    assert {step["state"] for step in after["tasks"]} == {"up to date"}
    return {step["task"]: step for step in plan["tasks"]}


def test_a_lost_tensor_that_joining_passes_on(tmp_path: Path, checkpoint: Path) -> None:
    """What is joined is not known before it is; what lies beside it is, and is read later."""
    world = World(tmp_path / "world")
    world.begin(checkpoint)
    compare(world)
    layer = world.mine / ".mlx-make" / "manifests" / "a" / "extract" / "layers.1.json"
    digests = {name: digest for name, *_, digest in json.loads(layer.read_bytes())["tensors"]}
    lost = digests["layers.1.ffn_norm.weight#0"]
    (world.store / "blobs" / lost[:2] / f"{lost[2:]}.parts").unlink()
    world.models["a"] = {"layout": "mlx-examples", "quantize": {"bits": 4}}
    world.configure(world.mine)
    assert compare(world)["extract:a:layers.1"]["state"] == "run"


def test_a_task_that_may_run_and_another_that_shares_its_action(
    tmp_path: Path, checkpoint: Path
) -> None:
    """If joining yields what it did, the cast of the one is up to date, and the other's runs."""
    world = World(tmp_path / "world", lost=True)
    world.begin(checkpoint)
    compare(world)
    (world.mine / ".mlx-make" / "manifests" / "a" / "unshard" / "layers.1.json").unlink()
    for path in (world.store / "actions").rglob("*.json"):
        path.unlink()
    world.models["b"] = {"quantize": {"bits": 8}}
    world.configure(world.mine)
    steps = compare(world)
    assert not steps["cast:a:layers.1"]["certain"]
    assert not steps["cast:b:layers.1"]["certain"]
    assert steps["cast:b:layers.0"]["certain"]


@pytest.mark.parametrize("packed", [True, False])
def test_another_card_of_what_is_not_on_record(
    packed: bool, tmp_path: Path, checkpoint: Path
) -> None:
    """What models.lock has may be another result, unless the last packing is known."""
    world = World(tmp_path / "world")
    world.begin(checkpoint)
    compare(world)
    for path in (world.store / "actions").rglob("*.json"):
        path.unlink()
    if not packed:
        (world.mine / ".mlx-make" / "manifests" / "a" / "pack.json").unlink()
    world.models["a"]["dtype"] = "bfloat16"  # which it is: of the card alone another
    world.configure(world.mine)
    to_run = {task for task, step in compare(world).items() if step["state"] == "run"}
    made_again = {f"{stage}:a:{layer}" for stage in STAGES[1:4] for layer in LAYERS}
    assert to_run == {"pack:a"} | (set() if packed else made_again)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """All files, with size and time, and folders; without answers that are remembered."""
    found = (path for path in folder.rglob("*") if "memos" not in path.parts)
    return {
        str(p): (p.stat().st_size, p.stat().st_mtime_ns) if p.is_file() else (0, 0)
        for p in found
        if p.is_file() or any(each.is_file() for each in p.iterdir())
    }


def check(plan: dict, entries: list[dict], *, lost: bool, bytes_told: bool) -> None:
    """Compare what was said with the build log.

    Args:
        plan: what was said.
        entries: what was done.
        lost: whether what is made of results that are not on record may be on record itself.
        bytes_told: whether what will be written can be known.
    """
    did: dict[str, str] = {}
    for entry in entries:  # a result that was reused, but is lost, is made again
        if did.get(entry["task"]) != "computed":
            did[entry["task"]] = entry["outcome"]
    again = {entry["task"] for entry in entries if entry["why"].startswith("blob lost")}
    steps = {step["task"]: step for step in plan["tasks"]}
    assert did.keys() <= steps.keys()
    check_steps(steps, did, again)
    check_outcomes(steps, did, lost=lost)
    known = bytes_told and all(step["certain"] for step in steps.values())
    if known and not again and not lost:
        # Of a layer of which one tensor changed, the others may be copied already.
        written = sum(entry["bytes_written"] for entry in entries)
        assert plan["bytes_written"] >= 0.98 * written - REST


def check_steps(steps: dict[str, dict], did: dict[str, str], again: set[str]) -> None:
    """Each task that was said to be done was, and no other."""
    said_again = {(s["stage"], s["layer"]) for s in steps.values() if about_lost(s)}
    for task, step in steps.items():
        if step["state"] == "up to date" and task in did:
            # Of targets that share what is lost, any may be the first to want it.
            assert task in again, (task, did[task])
            assert (step["stage"], step["layer"]) in said_again, task
        if step["state"] != "up to date":
            assert step["why"]
            if step["certain"] and not about_lost(step):
                assert task in did, step
        if not step["certain"] and task in did and step["stage"] != "extract":
            earlier = STAGES[: STAGES.index(step["stage"])]
            assert any(steps[t]["stage"] in earlier for t in did), (task, did)


def check_outcomes(steps: dict[str, dict], did: dict[str, str], *, lost: bool) -> None:
    """Each was done as was said; targets that share an action may swap who carries it out."""
    groups = defaultdict(list)
    for step in steps.values():
        if step["state"] != "up to date":
            groups[step["stage"], step["layer"]].append(step)
    for group in groups.values():
        sure = [step for step in group if step["certain"] and not about_lost(step)]
        said = Counter(OUTCOME[step["state"]] for step in sure)
        found = Counter(did[step["task"]] for step in group if step["task"] in did)
        if lost and (made := found["reused"] - said["reused"]) > 0 and said["computed"]:
            found += Counter(computed=made)
        assert not said - found, (group, found)


def about_lost(step: dict) -> bool:
    return any("not in the cache any more" in reason["fact"] for reason in step["why"])


# Through the front door


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two targets, built; each test that edits it builds it again."""
    project = projects.create(tmp_path_factory.mktemp("door") / "p", "meta", **projects.FOUR_BIT)
    project.configure("other", **projects.FOUR_BIT)
    project.doit()
    return project


def said(text: str, *lines: str) -> None:
    """Each of the lines is one of the text's; blanks count as one."""
    found = [" ".join(line.split()) for line in text.splitlines()]
    for line in lines:
        assert line in found, text
    assert all(len(line) <= 80 for line in text.splitlines()), text


def test_a_changed_setting(project: Project) -> None:
    assert project.doit("plan").stdout == "up to date: model, other\n"
    project.configure(quantize={"bits": 8})
    before = everything(project.folder)
    text = project.doit("plan", expect=1).stdout
    said(
        text,
        "model",
        "quantize run embed_tokens, layers.0-3, lm_head",
        "quantize.bits 4 → 8",
        "quantize up to date norm",
        "cast up to date embed_tokens, layers.0-3, norm, lm_head",
        "pack run",
        "up to date: other",
        "7 of 58 tasks",
    )
    assert "?" not in text
    assert project.doit("plan", "pack:other").stdout == "up to date: other\n"
    name = "quantize:model:layers.1"
    why = project.doit("why", name).stdout
    said(why, name, "now: run")
    assert "quantize.bits 4 → 8: model.layers.1.mlp.down_proj.weight," in why
    assert "model.layers.1.self_attn.v_proj.weight" in why
    plan = json.loads(project.doit("plan", "--json", expect=1).stdout)
    assert everything(project.folder) == before

    done = project.doit()
    check(plan, done.entries, lost=False, bytes_told=True)
    todo = [step for step in plan["tasks"] if step["state"] != "up to date"]
    for key in ("bytes_read", "bytes_written"):
        did = {entry["task"]: entry[key] for entry in done.entries}
        for step in todo:
            packed = REST if step["stage"] == "pack" else 0
            assert 0 <= did[step["task"]] - step[key] <= packed
        assert plan[key] == sum(step[key] for step in todo)
    assert plan["disk_bytes"] == plan["bytes_written"]
    assert plan["seconds"] is not None
    for entry in done.entries:
        if entry["task"].startswith("quantize:"):
            assert entry["why"].startswith("quantize.bits 4 → 8 (")
    after = project.doit("why", name).stdout
    said(after, "now: up to date")
    assert "computed in" in after
    assert "quantize.bits 4 → 8 (model.layers.1." in after


def test_a_changed_checkpoint(project: Project) -> None:
    file, _ = projects.alter(project.checkpoint, "layers.2.feed_forward.w2.weight")
    text = project.doit("plan", expect=1).stdout
    said(
        text,
        "extract run? tok_embeddings, layers.0-3, norm, output",
        f"checkpoint file {file.name} changed",
        "what it reads may come out differently",
    )
    project.doit("lock")  # which reads it
    said(
        project.doit("plan", expect=1).stdout,
        "extract run layers.2",
        "unshard run layers.2",
        "unshard up to date embed_tokens, layers.0-1, layers.3, norm, lm_head",
    )
    why = project.doit("why", "extract:model:layers.2", "unshard:model:layers.2").stdout
    tensor = "layers.2.feed_forward.w2.weight#0"
    said(why, f"checkpoint file {file.name} changed", f"it reads other contents: {tensor}")

    done = {entry["task"]: entry["why"] for entry in project.doit().entries}
    changed = f"checkpoint file {file.name} changed"
    assert done["extract:model:layers.1"] == changed
    assert done["extract:model:layers.2"] == f"{changed}; it reads other contents ({tensor})"
    assert done["unshard:model:layers.2"] == f"it reads other contents ({tensor})"
    whole = "model.layers.2.mlp.down_proj.weight"
    assert done["cast:model:layers.2"] == f"it reads other contents ({whole})"
    assert done["quantize:model:layers.2"] == f"it reads other contents ({whole})"
    assert done["pack:model"] == "models.lock has another source or result than it built"
    assert "unshard:model:layers.1" not in done


def test_another_mlx(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "world")
    world.begin(checkpoint)
    now = asking.versions()
    with monkeypatch.context() as patch:
        patch.setattr(asking, "versions", lambda *_: {**now, "mlx": "0.1.2"})
        inside.doit(world.mine)
    reason = f"mlx 0.1.2 → {now['mlx']}"
    said(
        inside.doit(world.mine, "plan", expect=1).stdout,
        "quantize run embed_tokens, layers.0-1, lm_head",
        reason,
    )
    said(inside.doit(world.mine, "why", "quantize:a").stdout, reason)
    done = {entry["task"]: entry["why"] for entry in inside.doit(world.mine).entries}
    assert done["quantize:a:layers.0"] == reason
    assert "quantize:a:norm" not in done


@pytest.mark.parametrize(
    ("keys", "task", "reason"),
    [
        ({"quantize": {"group_size": 32}}, "quantize:a:lm_head", "quantize.group_size 64 → 32"),
        (
            {"quantize": {"mode": "mxfp4"}},
            "quantize:a:lm_head",
            "quantize.group_size 64 → 32: lm_head.weight\n    quantize.mode affine → mxfp4",
        ),
        ({"quantize": False}, "quantize:a:lm_head", "not quantized any more"),
        ({"dtype": "float16"}, "cast:a:lm_head", "dtype the checkpoint's → float16"),
        ({"max_shard_size": 10000}, "pack:a", "max_shard_size 5368709120 → 10000"),
        ({"layout": "mlx-examples"}, "pack:a", "layout mlx-lm → mlx-examples"),
    ],
)
def test_reasons(built: World, keys: dict, task: str, reason: str) -> None:
    built.models["a"] = {"quantize": {"bits": 4}} | keys
    built.configure(built.mine)
    text = inside.doit(built.mine, "why", task).stdout
    assert f"now: run\n    {reason}" in text


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> World:
    world = World(tmp_path_factory.mktemp("built"))
    world.begin(checkpoint)
    inside.doit(world.mine)
    return world


def test_what_models_lock_refuses(tmp_path: Path) -> None:
    """Plan begins with the words of the error that doit ends with."""
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)
    project.doit()

    def refused() -> str:
        before = everything(project.folder)
        text = project.doit("plan", expect=3).stdout
        plan = json.loads(project.doit("plan", "--json", expect=3).stdout)
        why = project.doit("why", "pack:model").stdout
        assert everything(project.folder) == before
        said = text.splitlines()[0]
        assert [f"ERROR: {message}" for message in plan["refused"]] == [said]
        assert why.splitlines()[0] == said
        message = said.removeprefix("ERROR: ")
        for command in ("list", "graph"):
            assert project.doit(command).stderr == f"warning: {message}\n"
        assert project.doit(expect=1).stdout.splitlines()[-1].endswith(f": {message}")
        return message

    params = project.checkpoint / "params.json"
    before = params.read_text()
    params.write_text(json.dumps(json.loads(before) | {"norm_eps": 0.5}))
    assert "params.json is another" in refused()
    params.write_text(before)
    project.doit()

    file, data = projects.alter(project.checkpoint, "layers.2.feed_forward.w2.weight")
    told = project.doit("plan", expect=1).stdout  # nobody knows the tensors yet
    assert "is an error until doit lock accepts it" in " ".join(told.split())
    project.doit(expect=1)
    assert "tensor layers.2.feed_forward.w2.weight#0 has other contents" in refused()
    projects.restore(file, data)
    project.doit()

    lock = project.folder / "models.lock"  # somebody else locks another checkpoint
    record = json.loads(lock.read_bytes())
    record["sources"]["checkpoint"]["files"][file.name][1] = "0" * 32
    lock.write_text(json.dumps(record))
    assert f"{file.name} is another" in refused()


@pytest.mark.parametrize("keep", [["cast"], []])
def test_reports(keep: list[str], tmp_path: Path) -> None:
    """What plan says of reports is what doit does."""
    project = projects.create(tmp_path / "p", "meta", **projects.FOUR_BIT)
    project.keep = keep
    project.configure("other", **projects.FOUR_BIT | {"quantize": {"bits": 8}})

    def compare_reports(*asked: str, todo: set[str]) -> None:
        plan = json.loads(project.doit("plan", "--json", *asked, expect=None).stdout)
        done = project.doit(*asked)
        steps = {step["task"]: step for step in plan["tasks"]}
        did = {entry["task"] for entry in done.entries}
        said = {task for task, step in steps.items() if step["state"] != "up to date"}
        sure = {task for task in said if steps[task]["certain"]}
        assert sure <= did <= said
        reports = {task for task in did if steps[task]["stage"] == "report"}
        assert reports == todo

    compare_reports("measure:model", todo=set())
    compare_reports("report:model", todo={"report:model"})
    compare_reports("report:model", todo=set())
    compare_reports("report", todo={"report:model", "report:other", "report"})
    compare_reports("report", todo=set())
    project.configure("other", quantize={"bits": 6})
    compare_reports("report:model", todo=set())
    compare_reports("report:*", todo={"report:model", "report:other"})
    compare_reports("report", todo={"report"})
    assert project.doit("plan", "report").stdout == "up to date: model, other, overview\n"
    shutil.rmtree(project.folder / "reports")
    said = project.doit("why", "report:model", "report").stdout
    assert said.count("now: run\n") == 2


def test_first_build_beside_nothing(tmp_path: Path) -> None:
    """Before the first build there is no state, and afterwards neither."""
    project = projects.create(tmp_path / "p", "huggingface", **projects.FOUR_BIT)
    shutil.rmtree(project.state)
    before = everything(project.folder)
    plan = json.loads(project.doit("plan", "--json", expect=1).stdout)
    assert everything(project.folder) == before
    assert {(step["state"], step["certain"]) for step in plan["tasks"]} == {("run", True)}
    assert plan["seconds"] is None
    check(plan, project.doit().entries, lost=False, bytes_told=True)


def test_beside_a_build(project: Project) -> None:
    """Neither waits for the other."""
    with (project.state / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        project.doit("plan", expect=None)
        project.doit("why", "pack:model")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (("why", "pack:nobody"), "there is no task 'pack:nobody'"),
        (("why",), "Name a task"),
        (("plan", "lint"), "lint: that builds no model"),
    ],
)
def test_what_is_no_task(project: Project, call: tuple[str, ...], told: str) -> None:
    done = project.doit(*call, expect=3)
    assert told in done.stderr
    assert not done.stdout

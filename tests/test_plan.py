"""tests of tasks/commands.py and tasks/forecast.py: doit then does what doit plan says."""

import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import inside
import meta
import projects

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
HEADERS = 20_000  # bytes of weight files' headers, which are not foretold
STAGES = ("extract", "unshard", "cast", "quantize", "pack")


# What doit plan says is what doit does


@dataclass
class World:
    """A project whose owner edits it, and another that shares a cache or a remote with it.

    Attributes:
        folder: of both.
        models: what models.toml says of each model.
        cache: what it says of the cache.
        lost: whether entries of the action cache were deleted.
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
        self.models[pick.choice(list(self.models))]["quantize"] = pick.choice(QUANTIZE)

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

    def lost_build(self, pick: random.Random) -> None:
        for path in self.some(pick, self.mine / "build", "*"):
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
)
@given(rounds=st.lists(edits, min_size=1, max_size=4), pick=st.randoms(use_true_random=False))
def test_doit_does_what_plan_says(
    tmp_path: Path, checkpoint: Path, rounds: list, pick: random.Random
) -> None:
    world = World(tmp_path / "world")
    world.begin(checkpoint)
    for these in ([], *rounds):
        for edit in these:
            edit(world, pick)
        world.configure(world.mine)
        compare(world)


def compare(world: World) -> None:
    before = everything(world.folder)
    plan = json.loads(inside.doit(world.mine, "plan", "--json", expect=None).stdout)
    assert everything(world.folder) == before, "doit plan writes nothing"
    done = inside.doit(world.mine)
    check(plan, done.entries, lost=world.lost)
    after = json.loads(inside.doit(world.mine, "plan", "--json").stdout)
    assert {step["state"] for step in after["tasks"]} == {"up to date"}


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """All files and folders, with size and time."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def check(plan: dict, entries: list[dict], *, lost: bool) -> None:
    """Compare what was said with the build log.

    Args:
        plan: what was said.
        entries: what was done.
        lost: whether a result that is certain to be made may be on record although what it is
            made of is not.
    """
    did: dict[str, str] = {}
    for entry in entries:  # a result that was reused, but is lost, is made again
        if did.get(entry["task"]) != "computed":
            did[entry["task"]] = entry["outcome"]
    again = {entry["task"] for entry in entries if entry["why"].startswith("blob lost")}
    steps = {step["task"]: step for step in plan["tasks"]}
    assert did.keys() <= steps.keys()

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

    # Targets that share an action may swap who carries it out.
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
    if all(step["certain"] for step in steps.values()) and not again:
        # Of a layer of which one tensor changed, the others may be copied already.
        written = sum(entry["bytes_written"] for entry in entries)
        assert plan["bytes_written"] >= 0.98 * written - HEADERS


def about_lost(step: dict) -> bool:
    return any("not in the cache any more" in reason["fact"] for reason in step["why"])

"""`[build] memory`: what runs at once, and that a build comes out the same in little of it."""

import itertools
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.convert import convert

from cache.records.manifests import Tensor
from support import checkpoints, inside
from support.front_door import doit
from support.projects import FOUR_BIT, SOURCES, create
from tasks.execution.resources import MemoryBudget
from tasks.stages import unshard
from tasks.stages.unshard import Recipe, UnshardParams
from tasks.tensors import steps

calm = settings(deadline=None)
PATIENCE_SECONDS = 20  # after which threads that do not end have locked each other out

# Class Memory. A plan is what each thread's actions hold, with what actions within them hold.
ACTIONS = st.lists(st.tuples(st.integers(0, 15), st.lists(st.integers(0, 15), max_size=2)))


@settings(deadline=None, max_examples=50)
@given(limit=st.integers(1, 12), plan=st.lists(ACTIONS, min_size=1, max_size=6))
def test_never_more_than_the_limit(limit: int, plan: list[list[tuple[int, list[int]]]]) -> None:
    memory, lock, held, wrong = MemoryBudget(limit), threading.Lock(), [0], []

    def work(actions: list[tuple[int, list[int]]]) -> None:
        for need, within in actions:
            with memory.reserve(need):
                with lock:
                    held[0] += min(need, limit)
                    if held[0] > limit:
                        wrong.append(held[0])
                time.sleep(0.0002)
                for more in within:
                    with memory.reserve(more), memory.reserve(more):
                        pass
                with lock:
                    held[0] -= min(need, limit)

    threads = [threading.Thread(target=work, args=(actions,), daemon=True) for actions in plan]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    with memory.reserve(limit):  # all of it is free again
        pass


def test_what_fits_runs_together() -> None:
    memory, meet = MemoryBudget(10), threading.Barrier(2)

    def work() -> None:
        with memory.reserve(5):
            meet.wait(PATIENCE_SECONDS)  # broken, if the other may not run meanwhile

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not meet.broken


def test_who_waits_for_memory_holds_no_action(tmp_path: Path) -> None:
    """Else an action that has memory and wants the other one's result would wait for ever."""
    project = create(tmp_path, "meta", **FOUR_BIT)
    found = inside.session(project.folder)
    builder, plan = found.builder, found.plans["model"]
    node = plan.last[0]
    key = node.action(builder.inputs(plan, node)).key

    def work() -> None:
        builder.run(plan, node, "test")

    def pass_through() -> None:
        with builder.store.actions.running(key):
            pass

    with builder.memory.reserve(builder.memory.limit):
        waiting = threading.Thread(target=work, daemon=True)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        other = threading.Thread(target=pass_through, daemon=True)
        other.start()
        other.join(PATIENCE_SECONDS)
        assert not other.is_alive()
    waiting.join(PATIENCE_SECONDS)
    assert not waiting.is_alive()


def test_a_failed_action_gives_its_bytes_back() -> None:
    memory = MemoryBudget(10)
    with pytest.raises(KeyError), memory.reserve(10), memory.reserve(3):
        raise KeyError
    done = threading.Event()

    def work() -> None:
        with memory.reserve(10):
            done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(PATIENCE_SECONDS)


# Batches of what mlx-lm computes. A parameter: its size, the inputs it is made of, whether mlx-lm
# makes it.
PARAMETERS = st.lists(
    st.tuples(
        st.integers(1, 40), st.lists(st.integers(0, 7), min_size=1, max_size=3), st.booleans()
    ),
    max_size=12,
)


@calm
@given(told=PARAMETERS, inputs=st.lists(st.integers(1, 40), min_size=8, max_size=8),
       limit=st.integers(1, 150))  # fmt: skip
def test_batches(told: list[tuple[int, list[int], bool]], inputs: list[int], limit: int) -> None:
    stored = {f"i{i}": SimpleNamespace(nbytes=size) for i, size in enumerate(inputs)}
    made_by = {True: (steps.Sanitize("p"),), False: ()}
    tensors = {
        f"p{i}": Recipe("uint8", (size,), tuple(f"i{i}" for i in of), made_by[sanitized])
        for i, (size, of, sanitized) in enumerate(told)
    }
    params = UnshardParams(tensors)

    def size(names: list[str]) -> int:
        read = {key for name in names for key in tensors[name].inputs}
        return sum(tensors[n].shape[0] for n in names) + sum(stored[key].nbytes for key in read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unshard, "SANITIZE_BYTES", limit)
        batches = unshard._batches(SimpleNamespace(stored=stored), params)
    assert [name for batch in batches for name in batch] == [
        name for name, recipe in tensors.items() if recipe.steps
    ]
    assert all(len(batch) == 1 or size(batch) <= limit for batch in batches)
    for batch, after in itertools.pairwise(batches):
        assert size([*batch, after[0]]) > limit  # no smaller than need be


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which mlx-lm computes some parameters: experts stacked, kv_b_proj split."""
    return checkpoints.make("deepseek-v3", tmp_path_factory.mktemp("experts") / "checkpoint")


def test_batches_make_what_one_makes(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.toml").write_text(f'[models.model]\nsource = "{experts}"\n')
    found = inside.session(tmp_path)
    plan = found.plans["model"]
    node = next(n for n in plan.nodes("unshard") if n.layer == "layers.1")
    for need in node.needs:
        found.builder.run(plan, need, "test")

    def made() -> dict[str, Tensor]:
        shutil.rmtree(found.builder.store.actions.root)
        found.builder.run(plan, node, "test")
        return found.builder.manifest(plan, node).tensors

    told = (plan.checkpoint, node.params)
    assert len(unshard._batches(*told)) == 1
    at_once = made()
    monkeypatch.setattr(unshard, "SANITIZE_BYTES", 1)
    assert len(unshard._batches(*told)) > 1
    assert made() == at_once


def test_a_build_in_little_memory_is_what_mlx_lm_writes(experts: Path, tmp_path: Path) -> None:
    lines = ["[build]", 'memory = "1MiB"', "[models.model]", f'source = "{experts}"']
    (tmp_path / "models.toml").write_text("\n".join([*lines, "quantize = { bits = 4 }", ""]))
    doit(tmp_path)
    convert(str(experts), str(tmp_path / "peer"), quantize=True, q_bits=4)
    ours, theirs = (
        mx.load(str(folder / "model.safetensors"))
        for folder in (tmp_path / "build" / "model", tmp_path / "peer")
    )
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert raw(ours[name]) == raw(array), name


def raw(array: mx.array) -> bytes:
    return bytes(array.reshape(-1).view(mx.uint8))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("keep", [None, []], ids=["default", "nothing kept"])
def test_a_build_in_little_memory(source: str, keep: list[str] | None, tmp_path: Path) -> None:
    project = create(tmp_path, source)
    project.keep, project.memory = keep, "1MiB"
    project.configure(**FOUR_BIT)
    done = project.doit("-n", "4")
    assert {entry["task"] for entry in done.entries} == project.tasks()
    assert project.built() == project.anew()

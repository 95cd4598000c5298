"""`[build] memory`: what runs at once, and that a build comes out the same in little of it."""

import shutil
import threading
from pathlib import Path

import pytest

from cache.records.manifests import Tensor
from support import checkpoints, inside, peer
from support.differences import weight_differences
from support.front_door import doit
from support.projects import FOUR_BIT, SOURCES, create
from tasks.stages import unshard

PATIENCE_SECONDS = 20  # after which threads that do not end have locked each other out


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
    reference = peer.convert(experts, tmp_path / "peer", quantize=True, q_bits=4)
    assert [*weight_differences(tmp_path / "build" / "model", reference)] == []


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("keep", [None, []], ids=["default", "nothing kept"])
def test_a_build_in_little_memory(source: str, keep: list[str] | None, tmp_path: Path) -> None:
    project = create(tmp_path, source)
    project.keep, project.memory = keep, "1MiB"
    project.configure(**FOUR_BIT)
    done = project.doit("-n", "4")
    assert {entry["task"] for entry in done.entries} == project.tasks()
    assert project.built() == project.anew()

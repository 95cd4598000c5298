"""Every registered stage keeps the contract of `Stage`; a stage of one file is one of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from cache.digest import digest_parts
from cache.records.manifests import Manifest
from support import checkpoints, inside, projects, toy_stage
from tasks.cli.session import Session
from tasks.planning.node import Node
from tasks.planning.plan import Plan
from tasks.stages import registry
from tasks.stages.stage import LeafStage, Origin, Stage
from tasks.tensors import arrays, rows

# Between them each step of unshard, each mode, tied and sharded tensors, and what a library makes.
MODELS = {
    "meta": {"dtype": "float16", "quantize": {"bits": 4}},
    "huggingface": {
        "dtype": "float32",
        "quantize": {
            "target_bpw": 4.1,
            "candidates": [{"bits": 3}, {"bits": 4}],
            "exact": True,
            "method": "gptq",
            "rules": [{"match": "model.layers.*", "bits": 3}],
        },
    },
    "qwen3-moe": {"dtype": "float32", "quantize": {"bits": 4, "group_size": 32, "method": "awq"}},
    "deepseek-v3": {"dtype": "float16", "quantize": {"mode": "mxfp4"}},
}


SAMPLES = 2  # of the models that are run


def write_adapter(folder: Path) -> str:
    """An adapter of one weight of the checkpoint in a folder."""
    (folder / "adapter").mkdir()
    path = "model.layers.1.mlp.up_proj"
    files = [mx.load(str(file)) for file in folder.glob("checkpoint/*.safetensors")]
    (weight,) = [each[f"{path}.weight"] for each in files if f"{path}.weight" in each]
    tensors = {
        f"{path}.lora_a": checkpoints.random_array("a", (weight.shape[1], 2), dtype="float32"),
        f"{path}.lora_b": checkpoints.random_array("b", (2, weight.shape[0]), dtype="float32"),
    }
    mx.save_safetensors(str(folder / "adapter" / "adapters.safetensors"), tensors)
    config = {"lora_parameters": {"scale": 2.0}}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return "adapter"


@pytest.fixture(scope="module", params=MODELS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session on a built and measured model, the toy stage among the others."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    if kind in projects.SOURCES:
        project = projects.create(folder, kind)
        if kind == "huggingface":
            project.quality = {"samples": SAMPLES, "sequence_length": 8}
    else:
        checkpoints.make(kind, folder / "checkpoint")
        project = projects.Project(folder, kind)
        project.quality = {"samples": 1, "sequence_length": 8}
    project.models.clear()
    adapter = {"adapter": write_adapter(folder)} if kind == "huggingface" else {}
    project.configure("model", source="checkpoint", device="cpu", **MODELS[kind], **adapter)
    with toy_stage.registered():
        # MLX runs experts, and packed weights of float16, on a CPU not at all or for minutes.
        runs = ["evaluate", "activations", "sensitivity"] if kind == "huggingface" else []
        inside.doit(folder, "pack", "measure", *runs)
        yield inside.session(folder)


def nodes(session: Session) -> Iterator[tuple[Plan, Node, Manifest]]:
    plan = session.plans["model"]
    runs = plan.running if session.config.quality.samples == SAMPLES else {}
    for stage in (*plan.stages.values(), *plan.measures.values(), *runs.values()):
        for node in stage:
            yield plan, node, session.builder.manifest(plan, node)


def expected(session: Session) -> set[str]:
    """The names of the stages that the model went through."""
    target = session.config.targets["model"]
    stages = [*registry.pipeline(target.quantize.method), *registry.MEASURES]
    if session.config.quality.samples == SAMPLES:
        stages += registry.RUNNING
    names = {stage.name for stage in stages} - {"importances"}  # of a file [quality] may name
    return names - (set() if target.adapter else {"fuse"})


def test_outputs_are_what_run_makes(built: Session) -> None:
    stages = set()
    for plan, node, manifest in nodes(built):
        stages.add(node.stage.name)
        outputs = node.outputs()
        assert {name: t.spec for name, t in manifest.tensors.items()} == node.output_specs()
        assert list(outputs) == list(manifest.tensors)
        if node.is_leaf:
            continue
        inputs = built.builder.inputs(plan, node)
        for name, output in outputs.items():
            assert set(output.inputs) <= inputs.keys()
            if output.origin is Origin.PASSED_ON:
                (key,) = output.inputs
                assert manifest.tensors[name].digest == inputs[key].tensor.digest
    assert stages == expected(built)


def test_a_view_is_what_run_makes(built: Session) -> None:
    views = set()
    for plan, node, manifest in nodes(built):
        if node.is_leaf:
            continue
        read = built.builder.inputs(plan, node)
        context = built.builder.context(plan, node, read)
        inputs = {key: tensor for key, (_, tensor) in read.items()}
        for name, output in node.outputs().items():
            with mx.stream(built.builder.streams.get("cpu")):
                view = node.stage.view(node.params, inputs, context, name)
                if output.origin is Origin.STORED:
                    assert view is None
                elif node.stage.keep.value == "configured":
                    views.add(node.stage.name)
                    found = digest_parts(arrays.view(block) for block in rows.blocks(view))
                    assert found == manifest.tensors[name].digest, (node.name, name)
    assert views == set(registry.configurable()) & expected(built) - registry.leaves()


def test_a_leaf_recalls_what_it_scanned(built: Session) -> None:
    for plan, node, manifest in nodes(built):
        if isinstance(node.stage, LeafStage):
            assert built.builder.recall(plan, node) == manifest
            assert built.builder.scan(plan, node, reread=True) == manifest
            assert node.stage.explain_watched(node.stage.watched(node.spec), ["elsewhere", []])


def test_parameters_are_read_back(built: Session) -> None:
    for _, node, manifest in nodes(built):
        record = node.params.record
        assert record == manifest.action.params == json.loads(json.dumps(record))


def altered(value: Any) -> Iterator[Any]:
    """JSON that differs from `value` in one place, a few of them."""
    match value:
        case dict():
            for key in list(value)[:3]:
                yield {k: v for k, v in value.items() if k != key}
                for other in altered(value[key]):
                    yield {**value, key: other}
            yield {**value, "another": next(iter(value.values()))} if value else {}
        case list():
            for at, item in enumerate(value):
                for other in altered(item):
                    yield [*value[:at], other, *value[at + 1 :]]
        case bool():
            yield not value
        case int() | float():
            yield value + 1
        case str():
            yield value + "x"


def test_a_change_is_explained(built: Session) -> None:
    """Whatever in a stage's parameters it is, of those that both have."""
    seen: set[Stage[Any]] = set()
    for _, node, _ in nodes(built):
        record = node.params.record
        if node.stage in seen or not any(record.values()):
            continue
        seen.add(node.stage)
        for key, value in record.items():
            for other in altered(value):
                if other != value:
                    old = {**record, key: other}
                    assert node.stage.explain(old, record), (node.stage.name, old)
    assert {stage.name for stage in seen} == expected(built)


def test_memory_and_words(built: Session) -> None:
    for plan, node, _ in nodes(built):
        assert node.stage.memory(node.params, plan.checkpoint) > 0
        assert node.stage.view_memory(node.params, plan.checkpoint) >= 0
        assert isinstance(node.stage.describe(node.params), str)
        assert (node.stage.__doc__ or "").partition("\n")[0].endswith(".")

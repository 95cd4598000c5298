"""method = "gptq": weights that are rounded by what the model's layers are given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
from transformers import AutoTokenizer

from tasks.core.spec import Quality
from tasks.quality import text
from tests.support import checkpoints, projects
from tests.support.projects import Project

QUALITY = {"samples": 4, "sequence_length": 32, "seed": 1}
SETTING = {"bits": 4, "group_size": 32}
GPTQ = {**SETTING, "method": "gptq"}
MODEL = {"source": "checkpoint", "device": "cpu", "dtype": "float32"}


def create(folder: Path, architecture: str | None = None) -> Project:
    made = projects.create(folder, "huggingface", dtype="float32", device="cpu")
    if architecture:
        shutil.rmtree(made.checkpoint)
        checkpoints.make(architecture, made.checkpoint)
    made.quality = QUALITY
    made.configure(quantize=GPTQ)
    return made


def groups(tasks: set[str]) -> set[str]:
    return {":".join(task.split(":")[:2]) for task in tasks}


def test_the_model_changes_less_and_what_it_takes_is_made_once(tmp_path: Path) -> None:
    project = create(tmp_path)
    project.configure("nearest", **MODEL, quantize=SETTING)
    project.configure("plain", **MODEL, quantize=False)
    project.doit()
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "build" / "model")
    cut = text.windows(text.calibration(Quality()), tokenizer, samples=4, length=32, seed=1)
    tokens = mx.array(cut)
    logits = {
        name: mlx_lm.load(str(project.folder / "build" / name))[0](tokens)
        for name in ("model", "nearest", "plain")
    }
    changed = {name: mx.linalg.norm(each - logits["plain"]).item() for name, each in logits.items()}
    assert 0 < changed["model"] < 0.8 * changed["nearest"]
    assert not project.doit().computed
    assert "hessians:model up to date" in " ".join(project.doit("list").stdout.split())
    assert "rounded by gptq" in project.doit("verify:model").stdout
    assert " are states between blocks" in project.doit("cache", "stats").stdout
    project.configure(quantize={**GPTQ, "bits": 3})
    done = project.doit()
    assert groups(done.computed) == {"quantize:model", "pack:model"}
    project.configure(quantize=SETTING)
    assert not project.doit().computed  # it is what "nearest" is
    said = project.doit("why", "quantize:model").stdout
    assert "quantize.method gptq → rounding to nearest" in said


def test_experts_have_their_own(tmp_path: Path) -> None:
    """Bytes are the same whatever runs beside."""
    one, other = create(tmp_path / "one", "qwen3-moe"), create(tmp_path / "other", "qwen3-moe")
    one.doit("pack:model")
    other.doit("-n", "1", "pack:model")
    assert one.built() == other.built()
    manifest = json.loads(one.manifest("hessians", "layers.0").read_bytes())
    shapes = {name: shape for name, _, shape, _ in manifest["tensors"]}
    experts = shapes["model.layers.0.mlp.switch_mlp.down_proj.hessian"]
    assert experts == [4, 64, 64]
    mlx_lm.load(str(one.folder / "build" / "model"))


def test_experts_in_16_bits_on_a_cpu(tmp_path: Path) -> None:
    """MLX has no products of experts there but of float32, in which they are made."""
    project = create(tmp_path, "qwen3-moe")
    candidates = [{**SETTING, "bits": bits} for bits in (4, 6)]
    quantize = {"target_bpw": 6, "candidates": candidates, "method": "gptq"}
    project.configure(dtype="bfloat16", quantize=quantize)
    said = project.doit("pack:model", "evaluate:model").stdout
    assert "model: perplexity " in said
    manifest = json.loads(project.manifest("hessians", "layers.0").read_bytes())
    assert "model.layers.0.mlp.switch_mlp.down_proj.hessian" in {n for n, *_ in manifest["tensors"]}


def test_modules_that_are_wider_than_the_rest(tmp_path: Path) -> None:
    """All that follows them is of their type, as MLX has it."""
    project = create(tmp_path)
    wider = {**GPTQ, "rules": [{"match": "*.o_proj", "dtype": "float32"}]}
    project.configure(dtype="bfloat16", quantize=wider)
    project.doit("pack:model")
    built = project.folder / "build" / "model"
    tensors = {
        name: each
        for path in built.glob("*.safetensors")
        for name, each in mx.load(str(path)).items()
    }
    attention = "model.layers.0.self_attn"
    kinds = {name: tensors[f"{attention}.{name}.scales"].dtype for name in ("o_proj", "q_proj")}
    assert kinds == {"o_proj": mx.float32, "q_proj": mx.bfloat16}


def test_what_does_not_go_together(tmp_path: Path) -> None:
    project = create(tmp_path)
    project.configure(quantize={"mode": "mxfp4", "method": "gptq"})
    done = project.doit("plan", expect=3)
    assert "has method 'gptq' with mode 'mxfp4'" in done.stderr


def test_inputs_that_are_not_finite(tmp_path: Path) -> None:
    """What would be rounded by them would be noise."""
    project = create(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((project.checkpoint / "model.safetensors.index.json").read_bytes())
    shard = project.checkpoint / index["weight_map"][name]
    tensors = dict(mx.load(str(shard)))
    tensors[name][0, 0] = float("nan")
    mx.eval(tensors)
    shard.unlink()
    mx.save_safetensors(str(shard), tensors)
    done = project.doit("pack:model", expect=1)
    assert " cannot be rounded by gptq: what it is given" in done.stdout
    assert not (project.folder / "build" / "model").exists()

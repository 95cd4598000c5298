"""llama.cpp's importance matrices: written of what a model is given, and read to choose by."""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model
from transformers import AutoTokenizer

from support import checkpoints, inside, projects
from support.projects import Project
from tasks.core.spec import Quality
from tasks.execution import recorded
from tasks.quality import text
from tasks.stages.quantize_scheme import Setting

QUALITY = {"samples": 2, "sequence_length": 16, "seed": 3}
FILE = "model.imatrix.gguf"
SUFFIXES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def create(folder: Path, kind: str = "huggingface") -> Project:
    if kind in projects.SOURCES:
        project = projects.create(folder, kind, dtype="float32", device="cpu")
    else:
        checkpoints.make(kind, folder / "checkpoint")
        project = Project(folder, kind)
        project.configure(dtype="float32", device="cpu")
    project.quality = {**QUALITY}
    project.configure()
    return project


def given(built: Path) -> dict[str, np.ndarray]:
    """The sums of the squares that each linear layer is given, as mlx-lm's model runs whole."""
    tokenizer = AutoTokenizer.from_pretrained(built)
    cut = text.windows(text.calibration(Quality()), tokenizer, samples=2, length=16, seed=3)
    model, _ = load_model(built)
    paths = {id(module): path for path, module in model.named_modules()}
    sums: dict[str, np.ndarray] = {}
    call = nn.Linear.__call__

    def watch(module: nn.Linear, x: mx.array) -> mx.array:
        squares = np.square(np.array(x, np.float64)).reshape(-1, x.shape[-1]).sum(0)
        sums[paths[id(module)]] = sums.get(paths[id(module)], 0) + squares
        return call(module, x)

    with mock.patch.object(nn.Linear, "__call__", watch):
        for row in cut:
            mx.eval(model(mx.array([row[:-1]])))
    return sums


def llama_name(path: str) -> str:
    if path == "lm_head":
        return "output.weight"
    _, _, number, module = path.split(".", 3)
    return f"blk.{number}.{SUFFIXES[module]}.weight"


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a budget is chosen within by it, without a run of the model."""
    project = create(tmp_path)
    project.doit("pack:model")
    monkeypatch.chdir(tmp_path)
    assert "activations:model finds out" in project.doit("imatrix", "model", expect=3).stderr
    assert "no target 'other'" in project.doit("imatrix", "other", expect=3).stderr
    for output, fault in (("none/x", "no folder none"), (".", ". is a folder")):
        assert fault in project.doit("imatrix", "-o", output, "model", expect=3).stderr
    project.doit("activations:model")
    project.doit("imatrix", "model")
    assert f"{FILE} is there" in project.doit("imatrix", "model", expect=3).stderr
    read = gguf.GGUFReader(tmp_path / FILE)
    values = {name: field.contents() for name, field in read.fields.items() if "." in name}
    assert {k: v for k, v in values.items() if not k.startswith("GGUF.")} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["Python's topics"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 15,
    }
    tensors = {tensor.name: tensor for tensor in read.tensors}
    sums = given(tmp_path / "build" / "model")
    assert len(sums) == 4 * 7 + 1
    assert tensors.keys() == {
        f"{llama_name(path)}.{part}" for path in sums for part in ("in_sum2", "counts")
    }
    for path, wanted in sums.items():
        found = tensors[f"{llama_name(path)}.in_sum2"]
        assert [*found.shape] == [len(wanted), 1]  # as llama.cpp counts, the first varies fastest
        np.testing.assert_allclose(np.array(found.data).ravel(), wanted, rtol=1e-4)
        assert tensors[f"{llama_name(path)}.counts"].data.ravel().tolist() == [30]

    check_choice(project, sums)


def check_choice(project: Project, sums: dict[str, np.ndarray]) -> None:
    """A budget is chosen within by the file, once it is what it should be."""
    plain = mx.load(str(project.folder / "build" / "model" / "model.safetensors"))
    project.quality["imatrix"] = FILE
    project.configure(quantize={"target_bpw": 6.0, "group_size": 32})
    done = project.doit("pack:model")
    ran = {task.split(":")[0] for task in done.computed}
    assert ran == {"importances", "sensitivity", "quantize", "pack"}
    assert "has nothing of 1 module (model.embed_tokens)" in done.stdout
    session = inside.session(project.folder)
    costs = recorded.sensitivities(session.builder, session.plans["model"])
    assert costs is not None
    for path in ("model.layers.1.mlp.down_proj", "lm_head", "model.embed_tokens"):
        weight = plain[f"{path}.weight"]
        change = np.array(mx.dequantize(*mx.quantize(weight, 32, 3), 32, 3) - weight, np.float64)
        means = sums.get(path, np.ones(weight.shape[1]))
        lost, whole = (np.square(np.array(x, np.float64)) @ means for x in (change, weight))
        cost = costs[f"{path}.weight"][Setting(32, 3, "affine")]
        assert cost == pytest.approx(lost.sum() / whole.sum() / 2, rel=1e-4)
    lock = json.loads((project.folder / "models.lock").read_bytes())["targets"]["model"]
    assert "imatrix" in lock["chosen_for"]
    said = project.doit("diff", "--json", "model", expect=1).stdout
    divergences = {*re.findall(r'"estimated_divergence": ?([\w.]+)', said)}
    assert divergences == {"null"}  # parts of what is made are no nats
    assert not project.doit().computed

    other = project.folder / FILE
    content = other.read_bytes()
    for data, said in (
        (b"no matrix", "it does not begin as GGUF files do"),
        (content.replace(b"imatrix", b"control"), "general.type is 'control'"),
        (content[: len(content) // 2], "is no importance matrix"),
        (content.replace(b"blk.", b"blo."), "lm_head"),
    ):
        other.write_bytes(data)
        if said != "lm_head":
            assert said in project.doit("plan", expect=3).stderr
        else:  # what is left of it tells of the head alone
            assert "importances run" in " ".join(project.doit("plan", expect=1).stdout.split())
    other.unlink()  # what is locked stands without it
    assert not project.doit("--locked").computed
    shutil.rmtree(project.folder / "build")
    said = "".join(project.doit("plan", expect=1).stdout.split())  # folded after hyphens, too
    assert f"asmodels.lockhasit({other}notbeinghere)" in said, said
    (project.folder / "models.lock").unlink()
    assert "No such file" in project.doit("plan", expect=3).stderr


def test_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = create(tmp_path, "qwen3-moe")
    monkeypatch.chdir(tmp_path)
    project.doit("activations:model")
    project.doit("imatrix", "model", "-o", "moe.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "moe.gguf").tensors}
    config = json.loads((project.checkpoint / "config.json").read_text())
    experts = config["num_experts"]
    for name, width in (("gate", "hidden_size"), ("down", "moe_intermediate_size")):
        weight = f"blk.0.ffn_{name}_exps.weight"
        assert [*tensors[f"{weight}.in_sum2"].shape] == [config[width], experts]
        counts = tensors[f"{weight}.counts"]
        assert [*counts.shape] == [1, experts]
        assert counts.data.sum() == 30 * config["num_experts_per_tok"]

"""method = "awq": weights that are scaled and clipped before they are rounded."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from transformers import AutoTokenizer

from scenario.test_gptq import MODEL, QUALITY, SETTING, create, groups
from support.projects import Project
from tasks.core.spec import Quality
from tasks.quality import text

AWQ = {**SETTING, "method": "awq"}
NOT_SCALED = ".weight is not scaled: nothing that makes what it is given can undo it"


def median_errors(project: Project) -> dict[str, float]:
    """How far each token's logits are from those of the model that is not quantized."""
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "build" / "model")
    cut = {"samples": QUALITY["samples"], "length": QUALITY["sequence_length"], "seed": 1}
    tokens = mx.array(text.windows(text.calibration(Quality()), tokenizer, **cut))
    logits = {
        name: mlx_lm.load(str(project.folder / "build" / name))[0](tokens)
        for name in ("model", "nearest", "plain")
    }
    errors = {n: mx.linalg.norm(a - logits["plain"], axis=-1) for n, a in logits.items()}
    return {name: mx.median(each).item() for name, each in errors.items()}


def build(folder: Path, architecture: str | None, bits: int) -> tuple[Project, str]:
    project = create(folder, architecture)
    project.configure(quantize={**AWQ, "bits": bits})
    project.configure("nearest", **MODEL, quantize={**SETTING, "bits": bits})
    project.configure("plain", **MODEL, quantize=False)
    return project, project.doit().stdout


def test_the_model_changes_less_and_what_it_takes_is_made_once(tmp_path: Path) -> None:
    """Here heads share values."""
    project, said = build(tmp_path / "one", None, 3)
    errors = median_errors(project)
    assert 0 < errors["model"] < 0.95 * errors["nearest"]
    assert NOT_SCALED not in said
    assert not project.doit().computed
    other = create(tmp_path / "other")
    other.configure(quantize={**AWQ, "bits": 3})
    other.doit("-n", "1", "pack:model")
    assert project.built() == other.built()
    project.configure(quantize={**AWQ, "bits": 4})
    assert groups(project.doit().computed) == {"awq:model", "quantize:model", "pack:model"}
    project.configure(quantize={**SETTING, "bits": 4, "method": "gptq"})
    assert groups(project.doit().computed) == {"quantize:model", "pack:model"}


# Norms whose weight is added to one; biases of norms and layers, and what no layer makes in
# proportion; experts, each by itself, and their router.
@pytest.mark.parametrize(
    ("architecture", "left"),
    [("gemma2", ""), ("starcoder2", "mlp.c_proj"), ("qwen3-moe", "")],
)
def test_what_is_scaled_leaves_the_model_as_it_is(
    architecture: str, left: str, tmp_path: Path
) -> None:
    """To what 8 bits show of it; what cannot be scaled is named."""
    project, said = build(tmp_path, architecture, 8)
    errors = median_errors(project)
    assert 0 < errors["model"] < 1.2 * errors["nearest"]
    assert (NOT_SCALED in said) == bool(left)
    assert f"layers.0.{left}{NOT_SCALED}" in said or not left

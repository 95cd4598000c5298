"""A new stage is one file and one line: see `support/toy_stage.py`."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from support import inside, projects, toy_stage


def test_a_stage_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is planned, built, listed, drawn, reported, and a change of it is explained."""
    project = projects.create(tmp_path, "huggingface", **projects.FOUR_BIT)
    project.doit()
    before = mx.load(str(tmp_path / "build/model/model.safetensors"))
    mx.eval(list(before.values()))  # the file is replaced
    with toy_stage.registered() as toy:
        plan = inside.doit(tmp_path, "plan", expect=1).stdout
        assert "scale" in plan
        done = inside.doit(tmp_path)
        stages = {task.split(":")[0] for task in done.computed}
        assert stages == {"scale", "quantize", "pack"}
        after = mx.load(str(tmp_path / "build/model/model.safetensors"))
        assert before.keys() == after.keys()
        halved = 0
        for name, tensor in after.items():
            scaled = ".mlp." in name and name.endswith(("scales", "biases"))
            halved += scaled
            assert mx.array_equal(tensor, before[name] * 0.5 if scaled else before[name]), name
        assert halved
        assert "scale:model" in inside.doit(tmp_path, "list").stdout
        inside.doit(tmp_path, "graph", "-o", str(tmp_path / "graph.mmd"))
        assert "scale · times 0.5" in (tmp_path / "graph.mmd").read_text()
        monkeypatch.setattr(toy, "factor", 2.0)
        why = inside.doit(tmp_path, "why", "scale:model:layers.0").stdout
        assert "factor 0.5 → 2.0" in why
        inside.doit(tmp_path, "report")
        page = (tmp_path / "reports" / "model.html").read_text()
        colors = dict(re.findall(r'<li><i class="(\w+)"></i>(\w+)</li>', page))
        assert [*colors.values()] == ["extract", "unshard", "cast", "scale", "quantize", "pack"]
        assert all(f".{color} {{ fill: var(--{color}); }}" in page for color in colors)
    again = inside.doit(tmp_path)
    assert "scale" not in {task.split(":")[0] for task in again.computed}
    restored = mx.load(str(tmp_path / "build/model/model.safetensors"))
    for name, tensor in before.items():
        assert mx.array_equal(restored[name], tensor), name

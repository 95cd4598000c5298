"""Processes in which libraries are asked are understood, whatever else prints there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.checkpoints import example
from tasks.layouts import asking, llama_tokenizer

PRINTS = """
import atexit, os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("transformers", "mlx_lm"):
            os.write(1, b"no accelerator was found\\n")

sys.meta_path.insert(0, Finder())
atexit.register(os.write, 1, b"0 leaked objects\\n")
"""


@pytest.fixture(autouse=True)
def _what_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(PRINTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_tokenizer_is_made(tmp_path: Path) -> None:
    example.make(tmp_path / "llama")
    made = llama_tokenizer.make(tmp_path / "llama" / "tokenizer.model", release="3")
    assert "tokenizer.json" in made


def test_a_library_is_asked() -> None:
    question = {"files": {"config.json": "{}"}, "tensors": [], "light": False}
    said = asking._ask_process(question, "mlx-lm", Path("checkpoint"), asking.LARGE)
    assert "model_type" in said["error"]

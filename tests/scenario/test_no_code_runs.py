"""No code of a checkpoint runs: each place where some lies would leave a mark."""

from __future__ import annotations

import json
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
import torch

from support import checkpoints, projects
from support.projects import Project

# Templates are sandboxed where they are rendered; this is how people got out of jinja2's others.
TEMPLATE = "{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
MODULE = "import pathlib\npathlib.Path({mark!r}).touch()\nraise RuntimeError('it ran')\n"
MODULES = ("configuration_x.py", "modeling_x.py", "tokenization_x.py", "model.py", "x_parser.py")
AUTO = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModelForCausalLM": "modeling_x.XModel",
    "AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x.XTokenizer"],
}


def edit(path: Path, **keys: object) -> None:
    found = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps(found | keys))


def modules(folder: Path, mark: Path) -> None:
    for name in MODULES:
        (folder / name).write_text(MODULE.format(mark=str(mark)))


def auto_map(folder: Path, mark: Path) -> None:
    """transformers imports these where it is told to trust remote code."""
    modules(folder, mark)
    for name in ("config.json", "tokenizer_config.json"):
        edit(folder / name, auto_map=AUTO)
    edit(folder / "tokenizer_config.json", tokenizer_class="XTokenizer")


def model_file(folder: Path, mark: Path) -> None:
    """mlx_lm imports this where it is told to trust remote code."""
    modules(folder, mark)
    edit(folder / "config.json", model_file="model.py")


def model_type(folder: Path, mark: Path) -> None:
    """Names a module: no other than one of mlx-lm's."""
    modules(folder, mark)
    edit(folder / "config.json", model_type="../../../" + str(folder / "model"))


def parsers(folder: Path, mark: Path) -> None:
    """mlx_lm.load takes these of a tokenizer's configuration."""
    modules(folder, mark)
    keys = {"tool_parser_type": "x_parser", "tokenizer_file": "tokenization_x.py"}
    edit(folder / "tokenizer_config.json", **keys)


def templates(folder: Path, mark: Path) -> None:
    template = TEMPLATE.format(mark=mark)
    edit(folder / "tokenizer_config.json", chat_template=template)
    edit(folder / "chat_template.json", chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text(template)
    edit(folder / "generation_config.json", stop=template)
    (folder / "README.md").write_text(f'---\nlicense: "{template.replace(chr(39), "’")}"\n---\n')


class Code:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def pickles(folder: Path, mark: Path) -> None:
    """As the weights, as what torch.save writes beside them, and as a card's YAML."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": torch.ones(2), "b": Code(mark)}, folder / "pytorch_model.bin")


def pickles_beside(folder: Path, mark: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "vocab.pkl"):
        (folder / name).write_bytes(pickle.dumps(Code(mark)))
    yaml = f"license: !!python/object/apply:os.system ['touch {mark}']"
    (folder / "README.md").write_text(f"---\n{yaml}\n---\n")


# Whether it is built all the same. Refused, it is said why.
CASES: dict[Callable[[Path, Path], None], str] = {
    auto_map: "",
    model_file: "has model_file = 'model.py': code of the checkpoint's own, which is never run",
    model_type: "model_type",
    parsers: "",
    templates: "",
    pickles: "would run its author's code",
    pickles_beside: "",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_code_runs(tmp_path: Path, case: Callable[[Path, Path], None]) -> None:
    project = Project(tmp_path / "project", "huggingface")
    checkpoints.make("llama", project.checkpoint)
    project.configure(**projects.FOUR_BIT)
    mark = tmp_path / "ran"
    case(project.checkpoint, mark)
    words = CASES[case]
    # Wherever one calls it from; a report renders templates, of its own.
    for args in (["list"], ["plan"], [], ["report:model"]):
        done = project.doit(*args, expect=None)
        assert not mark.exists(), args
        assert "Traceback" not in done.stdout + done.stderr
        if not args:
            assert (done.returncode == 0) == (not words), done.stderr
            assert words in done.stdout + done.stderr
    assert (project.folder / "build" / "model").exists() == (not words)


def test_would_be_seen(tmp_path: Path) -> None:
    """Each of the marks is made where what holds it is run."""
    mark = tmp_path / "ran"
    folder = tmp_path / "folder"
    checkpoints.make("llama", folder)

    def ran() -> bool:
        found = mark.exists()
        mark.unlink(missing_ok=True)
        return found

    auto_map(folder, mark)
    for name in MODULES:
        with pytest.raises(RuntimeError, match="it ran"):
            runpy.run_path(str(folder / name))
        assert ran()
    code = (
        "import pathlib, sys; from mlx_lm.utils import load_model; "
        "load_model(pathlib.Path(sys.argv[1]), trust_remote_code=True)"
    )
    model_file(folder, mark)
    subprocess.run([sys.executable, "-c", code, folder], capture_output=True)
    assert ran()
    jinja2.Template(TEMPLATE.format(mark=mark)).render()
    assert ran()
    pickles(folder, mark)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert ran()
    pickles_beside(folder, mark)
    pickle.loads((folder / "training_args.bin").read_bytes())
    assert ran()

"""Files of people and strangers, damaged at random: read as their own libraries do, or refused."""

import json
from pathlib import Path

import pytest
from doit.exceptions import InvalidDodoFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import adapted, built_inputs, chats, checkpoints, inside
from support.built_inputs import BuiltInputs
from support.inputs import Inputs
from support.project_inputs import ProjectInputs
from tasks.core.errors import BuildError
from tasks.layouts import chats as templates
from tasks.layouts import fusions

HARMLESS = ("read right", "refused", "refused by torch alone")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(number=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
def test_a_damaged_file(files: Inputs, number: int, seed: int) -> None:
    """Of weights, models.toml or models.lock; those beside a checkpoint are planned with."""
    outcome = files.attempt(seed, [*files.kinds][number])
    assert outcome.outcome in HARMLESS, outcome.detail


def test_a_damaged_file_beside_weights(files: Inputs) -> None:
    for kind in [*files.kinds][4:]:
        for seed in range(4):
            outcome = files.attempt(seed, kind)
            assert outcome.outcome in HARMLESS, outcome.detail


def test_a_size_that_a_library_divides_by(files: Inputs) -> None:
    """By 0 it would end the process: mlx-lm tells groups from shapes, which need not fit."""
    path = files.folder / "quantized/checkpoint/config.json"
    whole = path.read_bytes()
    path.write_text(json.dumps({**json.loads(whole), "intermediate_size": 1}))
    with pytest.raises(InvalidDodoFile, match="0 is no size of a group of weights"):
        files.kinds["quantized/checkpoint/config.json"](path)
    path.write_bytes(whole)


# One of a format that reads numbers at places that a file says, and one of what PEFT trained.
BUILT = (
    "gptq-4/checkpoint/model.safetensors#layout",
    "gptq-4/checkpoint/model.safetensors#data",
    "gptq-4/checkpoint/config.json#quantization",
    "peft-lora/adapter/adapter_model.safetensors#layout",
    "peft-lora/adapter/adapter_config.json",
)


def test_a_damaged_file_that_is_built(tmp_path: Path) -> None:
    """What comes out is what PyTorch makes of the very same files."""
    files = BuiltInputs(tmp_path)
    for kind in BUILT:
        for seed in range(3):
            outcome = files.attempt(seed, kind)
            assert outcome.outcome in HARMLESS, outcome.detail


def test_a_damaged_file_of_a_project_or_answer_of_a_hub(tmp_path: Path) -> None:
    files = ProjectInputs(tmp_path)
    for kind in ("card/card.md.j2", "imatrix/model.gguf", "hub/info.json", "hub/batch.json"):
        for seed in range(2):
            outcome = files.attempt(seed, kind)
            assert outcome.outcome in HARMLESS, outcome.detail


def test_patterns_of_an_adapter_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.make("qwen3", tmp_path / "checkpoint", **built_inputs.TINY)
    adapted.write("peft-lora", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["rank_pattern"] = {"(.|..|...)*(.|..|...)*[A-Z]": 4}
    path.write_text(json.dumps(config))
    (tmp_path / "models.toml").write_text(f'{built_inputs.MODEL}adapter = "adapter"\n')
    monkeypatch.setattr(fusions, "PATTERN_SECONDS", 0.01)
    done = inside.doit(tmp_path, "plan", expect=3)
    said = " ".join((done.stdout + done.stderr).split())
    assert "rank_pattern takes over 0.01 s to match" in said


def test_a_chat_template_is_rendered_where_it_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sandbox, and in a process whose memory and time have an end."""
    monkeypatch.chdir(tmp_path)
    folder = checkpoints.make("llama", tmp_path / "checkpoint", num_hidden_layers=1)
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: (folder / name).read_bytes() for name in names}
    messages = [chats.LINES[0]["messages"]]
    code = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
    (folder / "chat_template.jinja").write_text(code)
    with pytest.raises(ValueError, match="chat 1: SecurityError"):
        templates._render(folder, messages)
    assert not (tmp_path / "ran").exists()
    files["chat_template.jinja"] = b"{{ 'x' * 10 ** 10 }}"
    with pytest.raises(BuildError, match="makes no text: ValueError: chat 1: MemoryError"):
        templates.render(files, messages)

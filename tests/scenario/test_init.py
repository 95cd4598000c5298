"""`doit init`: a models.toml that builds what is there, and never in place of another."""

import json
import shutil
from pathlib import Path

import pytest

from support import checkpoints, inside, meta


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def targets(folder: Path) -> dict[str, str]:
    """What each target of a models.toml is made of."""
    plans = inside.session(folder).plans
    return {name: plan.target.source_name for name, plan in plans.items()}


def test_builds_what_is_there(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoints.make("llama", folder / "checkpoints" / "Llama-3.1 8B")
    meta.make("llama-2", folder / "models" / "of" / "meta")
    quantized = checkpoints.make("llama", folder / "llama-3.1-8b", files=1)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization": {"bits": 4}}))
    elsewhere = checkpoints.make("llama", tmp_path_factory.mktemp("elsewhere") / "linked")
    (folder / "linked").symlink_to(elsewhere)
    for hidden in (".hidden", "build", "too/deep/for/it"):
        shutil.copytree(elsewhere, folder / hidden / "model")
    (folder / "empty").mkdir()
    (folder / "adapter").mkdir()
    shutil.copy(quantized / "model.safetensors", folder / "adapter" / "adapters.safetensors")
    shutil.copy(quantized / "config.json", folder / "adapter")

    said = inside.doit(folder, "init").stdout
    assert said.startswith(f"{folder / 'models.toml'}: 4 models: ")
    text = (folder / "models.toml").read_text()
    assert text.count("\nquantize = { bits = 4 }") == 3
    assert text.count("quantized already") == 1
    assert {*text.splitlines()} >= {
        'source = "checkpoints/Llama-3.1 8B"', 'source = "models/of/meta"', 'source = "linked"',
        '[models."Llama-3.1-8B"]', '[models."llama-3.1-8b-2"]', "[models.meta]",
    }  # fmt: skip

    (quantized / "config.json").write_text(json.dumps(config))
    assert targets(folder).keys() == {"Llama-3.1-8B", "llama-3.1-8b-2", "meta", "linked"}
    inside.doit(folder, "linked")
    built = json.loads((folder / "build" / "linked" / "config.json").read_text())
    assert built["quantization"]["bits"] == 4

    # The second model that it proposes, too.
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    at = lines.index('[models."Llama-3.1-8B".variants.8bit]')
    (folder / "models.toml").write_text("\n".join([text, *lines[at : at + 2]]))
    assert "Llama-3.1-8B-8bit" in targets(folder)


def test_only_what_is_named(folder: Path) -> None:
    for name in ("one", "two"):
        checkpoints.make("llama", folder / name)
    inside.doit(folder, "init", "two")
    assert targets(folder) == {"two": "two"}


def test_another_models_toml(folder: Path) -> None:
    """Sources that lie beside it are named as it sees them."""
    checkpoints.make("llama", folder / "here")
    (folder / "below").mkdir()
    inside.doit(folder / "below", "init")
    assert f'source = "{folder / "here"}"' in (folder / "below" / "models.toml").read_text()
    assert [*targets(folder / "below")] == ["here"]


def test_never_in_place_of_another(folder: Path) -> None:
    checkpoints.make("llama", folder / "one")
    (folder / "models.toml").write_text("mine")
    refused = inside.doit(folder, "init", expect=3).stderr
    assert "is there already, and is not changed" in refused
    assert (folder / "models.toml").read_text() == "mine"
    (folder / "models.toml").unlink()
    (folder / "models.toml").symlink_to(folder / "nowhere")
    inside.doit(folder, "init", expect=3)
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ((), "there is no checkpoint in "),
        (("nothing",), "nothing is no folder with a checkpoint: expected consolidated."),
        ((".",), ". is no folder with a checkpoint: expected "),
    ],
)
def test_nothing_there(folder: Path, args: tuple[str, ...], told: str) -> None:
    refused = inside.doit(folder, "init", *args, expect=3).stderr
    assert refused.startswith(f"ERROR: {told}")
    assert not (folder / "models.toml").exists()


def test_whose_library_has_the_model(folder: Path) -> None:
    """By the names of its models: nothing is imported for it, and it need not be installed."""
    for name, model_type in {"text": "llama", "hearer": "whisper", "embedder": "qwen3"}.items():
        checkpoints.make("llama", folder / name, files=1)
        config = json.loads((folder / name / "config.json").read_text())
        config["model_type"] = model_type
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "embedder" / "modules.json").write_text("[]")  # of sentence-transformers
    inside.doit(folder, "init")
    lines = (folder / "models.toml").read_text().splitlines()
    of = {name: next(i for i, line in enumerate(lines) if line == f"[models.{name}]") for name in (
        "embedder", "hearer", "text",
    )}  # fmt: skip
    said = {
        name: next(line for line in lines[at:] if "layout = " in line) for name, at in of.items()
    }
    assert said["embedder"].startswith('layout = "mlx-embeddings"')
    assert said["hearer"].startswith('layout = "mlx-audio"')
    assert said["text"].startswith('# layout = "mlx-vlm"')

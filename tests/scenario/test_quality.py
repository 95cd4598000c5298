"""How good a model is: what `doit evaluate` says is what mlx-lm's own model does on the text."""

import contextlib
import gc
import io
import json
import re
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.perplexity import eval_ppl
from mlx_lm.utils import load_model
from transformers import AutoTokenizer

from cache.records.manifests import Manifest
from support import inside, projects, toy_stage
from support.front_door import Finished
from support.projects import Project
from tasks.core.spec import Quality
from tasks.quality import segments, text
from tasks.report.figures import Reader
from tasks.stages import segment_runner

QUALITY = {"samples": 3, "sequence_length": 24, "seed": 1, "top_logits": 16}
RUNS = ("tokens", "teacher", "forward", "evaluate")
LOOKS = (*RUNS, "activations")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Of float32, which MLX computes quickly on a CPU."""
    made = projects.create(tmp_path, "huggingface", dtype="float32", device="cpu")
    made.quality = QUALITY
    made.configure(quantize={"bits": 4, "group_size": 32})
    return made


def numbers(done: Finished, target: str = "model") -> dict[str, float]:
    """What a run says of a target."""
    (line,) = re.findall(rf"^{target}: (perplexity .*)$", done.stdout, re.M)
    names = ("perplexity", "teacher", "mean", "median", "95 %", "99 %", "max", "token")
    return {name: float(re.search(rf"{name} ([\d.]+)", line)[1]) for name in names}


def run(done: Finished) -> set[str]:
    """What ran models in a run: group and target, without layers."""
    groups = {tuple(task.split(":")[:2]) for task in done.computed}
    return {":".join(group) for group in groups if group[0] in LOOKS}


def logits(folder: Path, tokens: mx.array) -> np.ndarray:
    model, _ = load_model(folder)
    each = [model(tokens[i : i + 1, :-1]) for i in range(len(tokens))]
    return np.array(mx.concatenate(each)).astype(np.float64)


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_weights_are_let_go_of_as_a_segment_ends(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only once Python looks for what refers to itself."""
    held: list[int] = []
    let_go = segment_runner._let_go

    def seen(model: nn.Module) -> None:
        let_go(model)
        held.append(len(model.parameters()))

    monkeypatch.setattr(segment_runner, "_let_go", seen)
    gc.disable()
    try:
        done = inside.doit(project.folder, "evaluate:model")
    finally:
        gc.enable()
    ran = [task for task in done.computed if task.startswith(("teacher", "forward", "evaluate"))]
    assert held == [0] * len(ran)


@pytest.mark.parametrize("kept", [16, 320], ids=["some", "all"])
def test_it_is_what_mlx_lm_measures(project: Project, kept: int) -> None:
    """Perplexity of both models; divergence, by all logits, or the rest of them as one."""
    project.quality = {**QUALITY, "top_logits": kept}
    project.configure("plain", quantize=False, source="checkpoint", device="cpu", dtype="float32")
    done = project.doit("pack", "evaluate:model")
    said = numbers(done)
    built, plain = project.folder / "build" / "model", project.folder / "build" / "plain"
    tokenizer = AutoTokenizer.from_pretrained(built)
    documents = text.evaluation(Quality())
    cut = text.windows(documents, tokenizer, samples=3, length=24, seed=1)
    tokens = mx.array(cut)
    for name, folder in (("perplexity", built), ("teacher", plain)):
        model, _ = load_model(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            expected, _ = eval_ppl(model, tokens, batch_size=1)
        assert said[name] == pytest.approx(expected, rel=1e-5)
    teacher, own = (log_softmax(logits(folder, tokens)) for folder in (plain, built))
    order = np.argsort(-teacher, -1, kind="stable")[..., :kept]
    p, q = (np.exp(np.take_along_axis(each, order, -1)) for each in (teacher, own))
    if kept < teacher.shape[-1]:
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    divergence = (p * np.log(p / q)).sum(-1).ravel()
    median, high, higher, most = np.quantile(divergence, (0.5, 0.95, 0.99, 1))
    wanted = {"mean": divergence.mean(), "median": median, "95 %": high, "99 %": higher}
    wanted["max"] = most
    for name, value in wanted.items():
        assert said[name] == pytest.approx(value, abs=6e-5, rel=1e-3), name
    same = (teacher.argmax(-1) == own.argmax(-1)).mean()
    assert said["token"] == pytest.approx(100 * same, abs=6e-3)


def test_the_teacher_runs_once(project: Project) -> None:
    """For all variants; of another text or more of it, anew."""
    first = project.doit("evaluate:model")
    assert run(first) == {f"{group}:model" for group in RUNS}
    project.configure(
        "other", source="checkpoint", device="cpu", dtype="float32",
        quantize={"bits": 8, "group_size": 32},
    )  # fmt: skip
    second = project.doit("evaluate:other")
    assert run(second) == {"forward:other", "evaluate:other"}
    assert numbers(second, "other")["mean"] < numbers(first)["mean"]
    assert project.doit("evaluate").computed == set()
    project.quality = {**QUALITY, "seed": 2}
    project.configure()
    assert run(project.doit("evaluate:model")) == {f"{group}:model" for group in RUNS}


def test_a_segment_runs_again_where_it_changed(project: Project) -> None:
    project.doit("evaluate:model")
    rule = {"match": "model.layers.2.mlp.down_proj", "bits": 8}
    project.configure(quantize={"bits": 4, "group_size": 32, "rules": [rule]})
    done = project.doit("evaluate:model")
    ran = {task for task in done.computed if task.split(":")[0] in RUNS}
    assert ran == {*(f"forward:model:layers.{i}" for i in (2, 3)), "evaluate:model:logits"}


def test_a_state_that_is_lost_is_made_again(project: Project) -> None:
    said = numbers(project.doit("evaluate:model"))
    for layer in ("layers.1", "layers.2", "layers.3"):
        project.stored("forward", layer, "state").lose()
    project.manifest("evaluate", "logits").unlink()
    for entry in project.actions_of("evaluate"):
        entry.unlink()
    assert numbers(project.doit("evaluate:model")) == said


def test_what_is_not_quantized_is_its_own_teacher(project: Project) -> None:
    project.configure(quantize=None)
    done = project.doit("evaluate:model")
    assert run(done) == {"tokens:model", "teacher:model", "evaluate:model"}
    said = numbers(done)
    assert said["perplexity"] == said["teacher"]
    assert (said["max"], said["token"]) == (0.0, 100.0)


def test_a_model_that_runs_whole_says_so(project: Project) -> None:
    said = numbers(project.doit("evaluate:model"))

    def refuse(*_: object) -> None:
        raise segments.CannotSplit("it is a test's")

    elsewhere = projects.create(
        project.folder / "elsewhere", "huggingface", dtype="float32", device="cpu"
    )
    elsewhere.quality = QUALITY
    elsewhere.configure(quantize={"bits": 4, "group_size": 32})
    with mock.patch.object(segments, "_trace", refuse):
        done = elsewhere.doit("evaluate:model")
    assert numbers(done) == said
    assert "runs whole, not block by block: it is a test's" in done.stdout
    assert {t for t in done.computed if t.startswith("teacher:")} == {"teacher:model:logits"}


def test_a_text_of_ones_own(project: Project) -> None:
    chat = [{"role": "user", "content": "Is it so? " * 30}]
    lines = [{"text": "It was a dark and stormy night. " * 40}, {"messages": chat}]
    path = project.folder / "held-out.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    project.quality = {**QUALITY, "evaluate_text": path.name}
    project.configure()
    done = project.doit("evaluate:model", expect=None)
    if "has no chat template" in done.stdout + done.stderr:
        path.write_text(json.dumps(lines[0]), encoding="utf-8")
        done = project.doit("evaluate:model")
    own = numbers(done)
    path.write_text(json.dumps({"text": "Call me Ishmael. " * 100}), encoding="utf-8")
    assert numbers(project.doit("evaluate:model")) != own


def test_what_is_calibrated_on_is_not_evaluated_on(project: Project) -> None:
    shared = {"text": "Call me Ishmael. " * 100}
    for name in ("a", "b"):
        own = {"text": f"It was a dark and stormy night, {name}. " * 40}
        lines = map(json.dumps, [own, shared])
        (project.folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    project.quality = {**QUALITY, "text": ["a.jsonl"], "evaluate_text": "b.jsonl"}
    project.configure()
    status, out, err = inside.run(project.folder, "evaluate:model")
    assert status
    assert "documents in common (1, the first begins 'Call me Ishmael." in out + err
    assert text.calibration(Quality()) != text.evaluation(Quality())


def test_a_tokenizer_of_another_model(project: Project) -> None:
    """MLX reads whatever lies beyond an array's end."""
    path = project.checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    token = {**tokenizer["added_tokens"][0], "id": 1 << 20, "content": "zzz"}
    tokenizer["added_tokens"].append(token)
    tokenizer["model"]["vocab"]["zzz"] = 1 << 20
    path.write_text(json.dumps(tokenizer))
    (project.folder / "held-out.txt").write_text("zzz " * 100)
    project.quality = {**QUALITY, "evaluate_text": "held-out.txt"}
    project.configure()
    said = project.doit("evaluate:model", expect=1).stdout
    assert f"makes token {1 << 20} of the text of [quality], and the model has 320" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ('{"text": "a"}\n{"txt": "b"}', "line 2: neither"),
        ('{"text": "a"}\n{', "line 2: no JSON"),
        ('{"text": "too short"}', "samples of [quality] asks for 3"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(
    project: Project, content: str | None, said: str
) -> None:
    path = project.folder / "held-out.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    project.quality = {**QUALITY, "evaluate_text": path.name}
    project.configure()
    status, out, err = inside.run(project.folder, "evaluate:model")
    assert status
    assert said in out + err


def test_a_plain_build_runs_no_model(project: Project) -> None:
    done = project.doit()
    assert not run(done)
    assert "evaluate" in project.doit("list").stdout
    assert "evaluate:model:logits" in project.doit("plan", "evaluate:model", expect=None).stdout + (
        project.doit("list", "--all", "evaluate:model").stdout
    )


def test_reports_and_summaries_show_it(project: Project) -> None:
    """Of what is packed, as long as it is what was evaluated."""
    project.configure(
        "coarse", source="checkpoint", device="cpu", dtype="float32",
        quantize={"bits": 2, "group_size": 32},
    )  # fmt: skip
    project.doit("report:model")
    page = project.folder / "reports" / "model.html"
    assert "KL" not in page.read_text(encoding="utf-8")
    done = project.doit("pack", "evaluate")
    said = {name: numbers(done, name) for name in ("model", "coarse")}
    summary = project.doit("summary").stdout
    project.doit("report")
    overview = (project.folder / "reports" / "index.html").read_text(encoding="utf-8")
    shown = page.read_text(encoding="utf-8")
    for name, figures in said.items():
        assert f"{figures['token']:.2f} %" in shown
        row = next(line for line in summary.splitlines() if line.startswith(f"| {name} "))
        assert f"{figures['perplexity']:.4g}" in row
        assert f"{figures['token']:.2f} %" in row
    assert "mean KL divergence from the model before quantizing" in shown
    assert "mean KL divergence from the model before quantizing" in overview
    project.configure(quantize={"bits": 8, "group_size": 32})
    project.doit("model", "report:model")
    stale = page.read_text(encoding="utf-8")
    assert f"{said['model']['token']:.2f} %" not in stale
    assert f"{said['coarse']['token']:.2f} %" in stale


def test_what_no_library_runs_is_left_out_and_named(project: Project) -> None:
    project.configure("examples", source="checkpoint", layout="mlx-examples")
    done = project.doit("evaluate")
    assert run(done) == {f"{group}:model" for group in RUNS}
    assert "note: examples is not run: models of layout 'mlx-examples'" in done.stderr
    failed = project.doit("evaluate:examples", expect=1)
    assert "ERROR: evaluate:examples: examples is not run" in failed.stdout + failed.stderr


def test_what_is_told_is_of_what_is_packed(project: Project) -> None:
    """Also where another stage comes after the one that quantizes."""
    project.configure("plain", source="checkpoint", device="cpu", dtype="float32", quantize=False)
    with toy_stage.registered(last=toy_stage.ScalePacked(2.0)):
        done = inside.doit(project.folder, "pack", "evaluate", "measure", "report")
        session = inside.session(project.folder)
        for name, plan in session.plans.items():
            built = project.folder / "build" / name
            tokenizer = AutoTokenizer.from_pretrained(built)
            documents = text.evaluation(Quality())
            cut = text.windows(documents, tokenizer, samples=3, length=24, seed=1)
            model, _ = load_model(built)
            with contextlib.redirect_stdout(io.StringIO()):
                expected, _ = eval_ppl(model, mx.array(cut), batch_size=1)
            said = numbers(done, name)
            assert said["perplexity"] == pytest.approx(expected, rel=1e-5)
            assert said["perplexity"] != said["teacher"]
            reader = Reader(session.builder)
            shown = reader.read(plan)
            assert shown.quality is not None
            packed = Manifest.at(session.builder.workspace.packed(name))
            errors = reader.errors(plan, packed)
            assert bool(errors) == (name == "model")
            for error in errors.values():  # of the model that is twice what it was
                assert error.norm == pytest.approx(error.error_norm, rel=0.2)


def given_to_modules(folder: Path, tokens: mx.array) -> dict[str, np.ndarray]:
    """Mean squares of what linear layers are given, by channel, as mlx-lm's model runs whole."""
    model, _ = load_model(folder)
    given: dict[str, list[np.ndarray]] = {}
    linear = nn.Linear.__call__

    def watch(module: nn.Linear, x: mx.array) -> mx.array:
        given.setdefault(paths[id(module)], []).append(np.array(x.astype(mx.float32))[0])
        return linear(module, x)

    paths = {id(module): path for path, module in model.named_modules()}
    with mock.patch.object(nn.Linear, "__call__", watch):
        for row in tokens:
            mx.eval(model(row[None, :-1]))
    return {p: np.square(np.concatenate(x).astype(np.float64)).mean(0) for p, x in given.items()}


def activations(project: Project) -> dict[str, np.ndarray]:
    """What is on record of a target's modules."""
    session = inside.session(project.folder)
    plan, found = session.plans["model"], {}
    for node in plan.nodes("activations"):
        manifest = session.builder.manifest(plan, node)
        contents = session.builder.contents(plan, node, manifest)
        for name, tensor in manifest.tensors.items():
            if name != "state":
                found[name] = np.frombuffer(contents[name], tensor.dtype).reshape(tensor.shape)
    return found


def test_activations_are_what_modules_are_given(project: Project) -> None:
    """Once for all variants; each block resumes, and the text that is evaluated on has no say."""
    project.configure("plain", source="checkpoint", device="cpu", dtype="float32", quantize=False)
    done = project.doit("pack:plain", "activations:model")
    assert run(done) == {"tokens:model", "activations:model"}
    assert not run(project.doit("activations"))
    built = project.folder / "build" / "plain"
    tokenizer = AutoTokenizer.from_pretrained(built)
    documents = text.calibration(Quality())
    tokens = mx.array(text.windows(documents, tokenizer, samples=3, length=24, seed=1))
    expected = given_to_modules(built, tokens)
    found = activations(project)
    means = {n.removesuffix(".mean_square"): a for n, a in found.items() if "mean_square" in n}
    assert means.keys() >= expected.keys()
    assert len(expected) == 4 * 7 + 1
    for path, mean in expected.items():
        np.testing.assert_allclose(means[path], mean, rtol=1e-5, err_msg=path)
        assert found[f"{path}.count"].tolist() == [3 * 23]
    lookups = np.bincount(np.array(tokens[:, :-1]).ravel(), minlength=320)
    assert found["model.embed_tokens.lookups"].tolist() == lookups.tolist()
    project.quality = {**QUALITY, "evaluate_text": "other.txt"}
    (project.folder / "other.txt").write_text("Call me Ishmael. " * 100, encoding="utf-8")
    assert "activations:model" not in run(project.doit("activations:model"))

"""A budget in place of bits: each module's setting is chosen, to least total sensitivity."""

import itertools
import json
import math
import random
import shutil
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import compute_bits_per_weight, load_model
from transformers import AutoTokenizer

from support import inside, projects
from support.projects import Project
from tasks.core.spec import Quality
from tasks.execution import recorded
from tasks.planning import knapsack
from tasks.planning.knapsack import Option
from tasks.planning.plan import Plan
from tasks.quality import divergence as compared
from tasks.quality import text
from tasks.stages.divergence import Baseline, Divergence, mean_of
from tasks.stages.quantize_scheme import Setting

QUALITY = {"samples": 3, "sequence_length": 24, "seed": 1, "top_logits": 16}
LOOKS = {"tokens", "activations", "gradients", "sensitivity"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = projects.create(tmp_path, "huggingface", dtype="float32", device="cpu")
    made.quality = QUALITY
    return made


def groups(tasks: set[str]) -> set[str]:
    return {task.split(":")[0] for task in tasks}


def settings_of(project: Project) -> dict[str, dict]:
    config = json.loads((project.folder / "build" / "model" / "config.json").read_text())
    return {k: v for k, v in config["quantization"].items() if isinstance(v, dict)}


def test_another_budget_looks_at_nothing_again(project: Project) -> None:
    """And quantizes the layers whose modules' settings changed; a new candidate alone is tried."""
    project.configure(quantize={"target_bpw": 5.0, "group_size": 32})
    said = json.loads(project.doit("plan", "--json", expect=1).stdout)
    assert said["budgets"]["model"]["state"] == "to be chosen"
    first = project.doit()
    assert groups(first.computed) >= LOOKS | {"quantize", "pack"}
    before = {task for task in first.computed if task.split(":")[0] not in ("quantize", "pack")}
    assert {task["task"] for task in said["tasks"] if task["state"] == "run"} == before
    chosen = settings_of(project)
    assert len({tuple(each.values()) for each in chosen.values()}) > 1
    locked = json.loads((project.folder / "models.lock").read_bytes())["targets"]["model"]
    assert locked["chosen"] == {path: [*each.values()] for path, each in chosen.items()}
    model, _ = load_model(project.folder / "build" / "model")
    assert 4.7 < compute_bits_per_weight(model) <= 5.0
    mx.eval(model(mx.array([[1, 2, 3]])))
    assert not project.doit().computed
    assert "up to date: model" in project.doit("plan").stdout

    project.configure(quantize={"target_bpw": 4.5, "group_size": 32})
    plan = json.loads(project.doit("plan", "--json", expect=1).stdout)["budgets"]["model"]
    assert plan["state"] == "chosen"
    assert plan["anew"] == "target_bpw is 4.5, and 5.0 in models.lock"
    assert "quantize.bits" in project.doit("why", "quantize:model:layers.0").stdout
    second = project.doit()
    assert groups(second.computed) == {"quantize", "pack"}
    assert f"settings are chosen anew: {plan['anew']}" in second.stdout
    assert plan["settings"] == settings_of(project)
    changed = {p for p, each in settings_of(project).items() if each != chosen[p]}
    layers = {path.split(".")[2] for path in changed if ".layers." in path}
    ran = {task.split(":")[2] for task in second.computed if task.startswith("quantize")}
    assert {name.removeprefix("layers.") for name in ran if "layers" in name} == layers

    candidates = [{"bits": bits} for bits in (2, 3, 4, 5, 6, 8)]
    project.configure(
        quantize={
            "target_bpw": 4.5,
            "group_size": 32,
            "candidates": [*candidates, {"mode": "mxfp4"}],
        }
    )
    third = project.doit("sensitivity:model")
    assert {task.split(".")[-1] for task in third.computed} == {"4bit-32-mxfp4"}


def test_rules_and_least_bits_stand(project: Project) -> None:
    rules = [
        {"match": "*.down_proj", "bits": 8, "group_size": 32},
        {"match": "lm_head", "skip": True},
    ]
    project.configure(
        quantize={"fit": "1114kB", "context": 64, "group_size": 32, "min_bits": 3, "rules": rules}
    )
    project.doit()
    chosen = settings_of(project)
    assert "lm_head" not in chosen
    assert {e["bits"] for p, e in chosen.items() if p.endswith("down_proj")} == {8}
    assert min(each["bits"] for each in chosen.values()) == 3
    weights = sum(
        a.nbytes for a in mx.load(str(project.folder / "build/model/model.safetensors")).values()
    )
    config = json.loads((project.checkpoint / "config.json").read_text())
    heads = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    cache = 2 * 4 * 256 * heads * 4  # keys and values, layers, tokens, heads' width, float32
    assert 1_080_000 < weights + cache <= 1_114_000


def importances(folder: Path, tokens: mx.array) -> dict[str, np.ndarray]:
    """What `gradients` says of linear layers, as mlx-lm's model runs whole."""
    model, _ = load_model(folder)
    model.train()
    paths = {id(module): path for path, module in model.named_modules()}
    linear, given, found = nn.Linear.__call__, {}, {}
    added: dict[str, mx.array] = {}

    def watch(module: nn.Linear, x: mx.array) -> mx.array:
        path = paths[id(module)]
        given[path] = x
        y = linear(module, x)
        return y + added.setdefault(path, mx.zeros(y.shape))

    with mock.patch.object(nn.Linear, "__call__", watch):
        for index, row in enumerate(tokens):
            added.clear()
            logits = model(row[None, :-1])
            drawn = mx.random.categorical(logits, key=mx.random.key(index))
            zeros = dict(added)

            def loss(perturbed: dict[str, mx.array], row=row, drawn=drawn) -> mx.array:
                added.update(perturbed)
                return nn.losses.cross_entropy(model(row[None, :-1]), drawn).sum()

            for path, gradient in mx.grad(loss)(zeros).items():
                squares = np.square(np.array(gradient[0]).astype(np.float64)).mean(-1)
                x = np.square(np.array(given[path][0]).astype(np.float64))
                found[path] = found.get(path, 0) + (squares[:, None] * x).sum(0)
    return {path: total / (len(tokens) * (tokens.shape[1] - 1)) for path, total in found.items()}


def test_sensitivities_are_the_divergence(project: Project) -> None:
    """To the second order: by gradients of the whole model, and by the real divergence."""
    project.configure("plain", source="checkpoint", device="cpu", dtype="float32", quantize=False)
    project.configure(
        quantize={"target_bpw": 9.0, "group_size": 32, "candidates": [{"bits": 6}, {"bits": 8}]}
    )
    project.doit("pack:plain", "sensitivity:model")
    session = inside.session(project.folder)
    plan = session.plans["model"]
    contents = {
        name: (np.frombuffer(read[name], np.float32), each.shape)
        for node in plan.nodes("gradients")
        for manifest in [session.builder.manifest(plan, node)]
        for read in [session.builder.contents(plan, node, manifest)]
        for name, each in manifest.tensors.items()
        if name != "gradient"
    }
    built = project.folder / "build" / "plain"
    tokenizer = AutoTokenizer.from_pretrained(built)
    documents = text.calibration(Quality())
    tokens = mx.array(text.windows(documents, tokenizer, samples=3, length=24, seed=1))
    expected = importances(built, tokens)
    assert len(expected) == 4 * 7 + 1
    for path, wanted in expected.items():
        found, _ = contents[f"{path}.importance"]
        np.testing.assert_allclose(found, wanted, rtol=1e-3, err_msg=path)

    found = recorded.sensitivities(session.builder, plan)
    assert found is not None
    weights = mx.load(str(built / "model.safetensors"))
    for name in ("model.layers.1.mlp.down_proj", "model.embed_tokens"):
        weight = weights[f"{name}.weight"]
        change = np.array(mx.dequantize(*mx.quantize(weight, 32, 8), 32, 8) - weight)
        squares = np.square(change.astype(np.float64))
        by_channel, _ = contents.get(f"{name}.importance", (None, None))
        if by_channel is not None:
            wanted = (squares @ by_channel).sum() / 2
        else:
            wanted = squares.sum(-1) @ contents[f"{name}.row_importance"][0] / 2
        eight = found[f"{name}.weight"][Setting(32, 8, "affine")]
        assert eight == pytest.approx(wanted, rel=1e-3)


def divergence(model: nn.Module, plain: np.ndarray, tokens: mx.array) -> float:
    """Mean KL divergence of what a whole model says from what it said before, nats a token."""
    found = np.array(mx.concatenate([model(row[None, :-1]) for row in tokens]), np.float64)
    p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (plain, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def check_memory(plan: Plan) -> None:
    """Beside the weights of a segment is the rounded one, of float32, to the last."""
    for params in (node.params for node in plan.nodes("divergence")):
        held = Divergence().memory(params, plan.checkpoint) - 2 * params.state_nbytes
        ((name, _),) = params.settings.items()
        weight = 4 * math.prod(plan.checkpoint.tensors[name].shape)
        assert held - Baseline().memory(params, plan.checkpoint) == weight


def test_exact_is_the_divergence_of_the_whole_model(project: Project) -> None:
    """With one module alone quantized; each is measured once, and a budget chooses by it."""
    project.quality = {**QUALITY, "top_logits": 320}
    candidates = [{"bits": bits, "group_size": 32} for bits in (2, 4)]
    rules = [{"match": "model.layers.[123].*", "bits": 8, "group_size": 32}]
    asked = {"target_bpw": 8.2, "candidates": candidates, "rules": rules, "exact": True}
    project.configure("plain", source="checkpoint", device="cpu", dtype="float32", quantize=False)
    project.configure(quantize=asked)
    first = project.doit("pack")
    ran = {task for task in first.computed if task.startswith("divergence:")}
    assert len(ran) == 2 * (7 + 2)  # of what is not ruled
    assert "gradients" not in groups(first.computed)

    session = inside.session(project.folder)
    check_memory(session.plans["model"])
    found = recorded.sensitivities(session.builder, session.plans["model"])
    built = project.folder / "build" / "plain"
    documents = text.calibration(Quality())
    tokenizer = AutoTokenizer.from_pretrained(built)
    tokens = mx.array(text.windows(documents, tokenizer, samples=3, length=24, seed=1))
    model, _ = load_model(built)
    plain = np.array(mx.concatenate([model(row[None, :-1]) for row in tokens]), np.float64)
    weights = mx.load(str(built / "model.safetensors"))
    for path in ("model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"):
        name = f"{path}.weight"
        for bits in (2, 4):
            rounded = mx.dequantize(*mx.quantize(weights[name], 32, bits), 32, bits)
            model.load_weights([(name, rounded)], strict=False)
            expected = divergence(model, plain, tokens)
            assert found[name][Setting(32, bits, "affine")] == pytest.approx(expected, rel=2e-3)
        model.load_weights([(name, weights[name])], strict=False)

    assert {each["bits"] for each in settings_of(project).values()} == {2, 4, 8}
    project.configure(quantize={**asked, "target_bpw": 8.4})
    assert groups(project.doit().computed) == {"quantize", "pack"}
    project.configure(
        quantize={**asked, "candidates": [*candidates, {"bits": 3, "group_size": 32}]}
    )
    third = project.doit("sensitivity:model")
    assert {task.split(".")[-1] for task in third.computed} == {"3bit-32"}
    project.quality = {**QUALITY, "top_logits": 319}
    project.configure(quantize={**asked, "target_bpw": 8.4})
    said = json.loads(project.doit("plan", "--json", expect=1).stdout)["budgets"]["model"]["anew"]
    assert said == "top_logits is 319, and 320 in models.lock"
    project.quality = {**QUALITY, "top_logits": 320}
    project.configure(quantize={**asked, "exact": False})
    said = json.loads(project.doit("plan", "--json", expect=1).stdout)["budgets"]["model"]["anew"]
    assert (
        said == "target_bpw is 8.2, and 8.4 in models.lock; exact is none, and true in models.lock"
    )


def test_what_a_broken_model_says_costs_more_than_all() -> None:
    """Not nothing, as the larger of 0 and NaN would have it."""
    logits, following = mx.random.normal((4, 8)), mx.arange(4)
    teacher = compared.top_predictions(logits, following, 8)
    broken = mx.where(mx.arange(8) == 3, mx.nan, logits)
    nats = compared.compare(broken, following, teacher).divergence.tolist()
    assert mean_of(nats, 4) == math.inf


@pytest.mark.parametrize(
    ("quantize", "said"),
    [
        ({"target_bpw": 2.0, "group_size": 32}, "target_bpw = 2.0 cannot be"),
        ({"fit": "100kB", "group_size": 32}, "fit = 100 kB"),
        ({"target_bpw": 4.5, "min_bits": 9}, "min_bits = 9 leaves none"),
        ({"target_bpw": 4.5, "bits": 4}, "which both say how many bits"),
        ({"bits": 4, "candidates": [{"bits": 4}]}, "nothing to choose for"),
        ({"target_bpw": 4.5, "candidates": []}, "quantize.candidates is [], must be a list"),
        ({"target_bpw": 400, "group_size": 32}, "target_bpw = 400.0 leaves nothing to choose"),
    ],
)
def test_what_cannot_be_is_said(project: Project, quantize: dict, said: str) -> None:
    project.configure(quantize=quantize)
    done = project.doit(expect=None)
    assert done.returncode
    assert said in done.stdout + done.stderr
    assert not done.entries  # sizes are known before any model is run


def test_before_it_is_known_what_to_choose(project: Project) -> None:
    project.configure(quantize={"target_bpw": 4.5, "group_size": 32})
    said = " ".join(project.doit("plan", expect=1).stdout.split())
    assert "then 30 modules are each given one of 6 settings" in said
    project.configure(quantize={"target_bpw": 4.5})  # then of all groups, too
    said = " ".join(project.doit("plan", expect=1).stdout.split())
    assert "then 30 modules are each given one of 18 settings" in said
    assert "once settings are chosen" in project.doit("list").stdout
    assert "sensitivity:model finds out" in project.doit("why", "pack:model").stdout
    project.accept()
    assert not (project.folder / "build").exists()


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_to_a_thousandth(seed: int) -> None:
    chance = random.Random(seed)
    items = []
    for _ in range(7):
        size, loss = chance.choice([64, 64, 256, 1024]), chance.lognormvariate(0, 2)
        bits = chance.sample([2, 3, 4, 5, 6, 8], chance.randint(1, 5))
        items.append([Option(size * b, loss * 4.0**-b * chance.uniform(0.5, 2)) for b in bits])
    least, most = (sum(pick(o.nbytes for o in each) for each in items) for pick in (min, max))
    budget = chance.randint(least - 100, most)
    ways = (
        way for way in itertools.product(*items) if sum(option.nbytes for option in way) <= budget
    )
    best = min((sum(option.loss for option in way) for way in ways), default=None)
    chosen = knapsack.choose(items, budget)
    if best is None:
        assert chosen is None
        return
    assert chosen is not None
    taken = [each[at] for each, at in zip(items, chosen, strict=True)]
    assert sum(option.nbytes for option in taken) <= budget
    assert sum(option.loss for option in taken) <= best * (1 + knapsack.TOLERANCE)


def test_what_is_locked_is_built(project: Project) -> None:
    """No model is run where a choice is locked; without it is what was chosen chosen again."""
    asked = {"target_bpw": 5.0, "group_size": 32}
    project.configure(quantize=asked)
    project.doit()
    built, lock = project.built(), project.folder / "models.lock"
    for there in (project.state, project.folder / "build"):
        shutil.rmtree(there)
    assert groups(project.doit("--locked").computed) == {
        "extract",
        "unshard",
        "cast",
        "quantize",
        "pack",
    }
    assert project.built() == built
    whole = lock.read_bytes()
    for path, setting in (("lm_head", [32, 7, "affine"]), ("model.norm", [32, 4, "affine"])):
        record = json.loads(whole)
        record["targets"]["model"]["chosen"][path] = setting
        lock.write_text(json.dumps(record))
        assert "is no choice of these candidates" in project.doit("--locked", expect=3).stderr
    project.configure(
        quantize={**asked, "target_bpw": 4.5, "rules": [{"match": "lm_head", "bits": 8}]}
    )
    said = project.doit("--locked", expect=3).stderr
    assert "target_bpw is 4.5, and 5.0 in models.lock; the rules are not what is locked" in said

    project.configure(quantize=asked)
    project.doit("lock")
    assert "chosen" not in json.loads(lock.read_bytes())["targets"]["model"]
    assert groups(project.doit().computed) >= LOOKS
    assert project.built() == built
    locked = json.loads(lock.read_bytes())["targets"]
    record = json.loads(lock.read_bytes())
    chosen = record["targets"]["model"]["chosen"]
    chosen["lm_head"] = [32, 2 if chosen["lm_head"][1] > 2 else 3, "affine"]  # which would fit, too
    lock.write_text(json.dumps(record))
    assert "is not what was chosen" in project.doit("--locked", expect=3).stderr
    project.doit()
    assert project.built() == built
    assert json.loads(lock.read_bytes())["targets"] == locked

    project.configure(quantize={**asked, "target_bpw": 4.5})
    sensitivities = project.manifest("sensitivity", "any").parent
    project.blob("sensitivity", min(sensitivities.iterdir()).stem, "sensitivity").unlink()
    plan = project.doit("plan", expect=None)  # which makes nothing again
    assert "modules are each given one of" in " ".join(plan.stdout.split())
    assert not plan.entries
    assert groups(project.doit().computed) <= LOOKS | {"quantize", "pack"}


def test_a_text_that_is_another_while_what_is_held_out_is_gone(tmp_path: Path) -> None:
    project = projects.create(
        tmp_path, "huggingface", quantize={"target_bpw": 5.0, "group_size": 32}
    )
    words = {"a.txt": "one two three " * 60, "b.txt": "four five six " * 60}
    for name, said in words.items():
        (project.folder / name).write_text(said)
    models = project.folder / "models.toml"
    models.write_text(
        '[quality]\ntext = "a.txt"\nevaluate_text = "b.txt"\nsamples = 2\nsequence_length = 16\n'
        + models.read_text()
    )
    project.doit()
    (project.folder / "b.txt").unlink()
    assert project.doit("--locked").computed == set()
    (project.folder / "a.txt").write_text("seven eight nine " * 60)
    said = project.doit("--locked", expect=3).stderr
    assert "the text to calibrate on is not what is locked" in said
    (project.folder / "a.txt").unlink()
    assert project.doit("--locked").computed == set()  # nothing tells that it is another

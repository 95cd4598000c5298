"""tests of tasks/cli/commands/list.py: `doit list`."""

from pathlib import Path

from support import projects
from support.projects import LAYERS, STAGES

KIND = "huggingface"
OTHERS = ["report", "lock", "lint", "test", "bench", "evaluate", "activations", "sensitivity"]


def said(done: projects.front_door.Finished) -> dict[str, str]:
    """What each line says, by its first word, in their order."""
    split = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    return {name: " ".join(rest).strip() for name, *rest in split}


def test_states(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", KIND, **projects.FOUR_BIT)
    project.configure("other", dtype="float16", quantize={"bits": 8})
    last = {"pack": "to run", "measure": "6 of 6 layers to run", "report": "to run"}
    all_run = dict.fromkeys(STAGES, "7 of 7 layers to run") | last
    # Another target's tasks will have made all but what is quantized: not of norm.
    shared = dict.fromkeys(STAGES, "7 of 7 layers to reuse")
    shared |= {"quantize": "6 of 7 layers to run, 1 to reuse"} | last
    up_to_date = dict.fromkeys([*STAGES, "pack"], "up to date")
    built = up_to_date | {name: last[name] for name in ("measure", "report")}

    def expect(model: dict[str, str], other: dict[str, str]) -> None:
        done = project.doit("list")
        found = said(done)
        expected = {f"{stage}:model": state for stage, state in model.items()}
        expected |= {f"{stage}:other": state for stage, state in other.items()}
        assert list(found) == [*expected, *OTHERS]
        assert found | expected == found
        assert found["lint"] == "Check this project's code: ruff, mypy and import-linter."
        assert not done.stderr

    expect(all_run, shared)
    project.doit("quantize:model:layers.3")
    # What the other layers will be made of, nobody knows: the results may be on record.
    may = last | {"pack": "to run?"}
    reuse = dict.fromkeys(STAGES, "7 of 7 layers to reuse?")
    reuse |= {"quantize": "6 of 7 layers to run?, 1 to reuse?"}
    expect(dict.fromkeys(STAGES, "6 of 7 layers to run?") | may, reuse | may)
    project.doit("pack:model")
    expect(built, shared)
    project.doit()
    project.doit("report:model")
    all_done = dict.fromkeys(last | up_to_date, "up to date")
    expect(up_to_date | all_done, built)
    project.configure(quantize={"bits": 6})
    expect(built | last | {"quantize": "6 of 7 layers to run"}, built)
    project.configure(**projects.FOUR_BIT)
    expect(up_to_date | all_done, built)
    project.doit("ignore", "pack:other")
    expect(up_to_date | all_done, built | {"pack": "ignored", "report": "ignored"})
    plan = project.doit("plan")
    assert plan.stdout.split()[:2] == ["other", "extract"]
    assert " ".join(plan.stdout.split()).endswith("pack ignored up to date: model")


def test_changed_checkpoint(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", KIND, **projects.FOUR_BIT)
    project.doit()
    projects.alter(project.checkpoint, "model.layers.2.mlp.down_proj.weight")
    found = said(project.doit("list"))
    assert found["pack:model"] == "to run?"
    assert " to run?" in found["extract:model"]
    project.doit("lock")
    found = said(project.doit("list"))
    assert found["cast:model"] == "1 of 7 layers to run"


def test_options_of_doit(tmp_path: Path) -> None:
    project = projects.create(tmp_path / "project", KIND)
    project.doit("cast:model")
    stages = [f"{stage}:model" for stage in STAGES]
    lines = [*stages, "pack:model", "report:model", *OTHERS]

    assert project.doit("list", "-q").stdout.split() == lines
    assert list(said(project.doit("list", "--sort", "name"))) == sorted(lines)
    assert list(said(project.doit("list", "-p"))) == lines

    found = [line.split()[:2] for line in project.doit("list", "-s").stdout.splitlines()]
    assert found[:5] == [[s, n] for s, n in zip("UUURR", lines[:5], strict=True)]

    template = project.doit("list", "--template", "{status}|{name}|{doc}", "-s", "cast:model")
    assert template.stdout == "U|cast:model|up to date\n"

    manifests = {str(project.manifest("quantize", layer)) for layer in LAYERS[KIND]}
    found = project.doit("list", "--deps", "pack:model").stdout.splitlines()
    assert found[0].split() == ["pack:model", "to", "run"]
    assert manifests < {line.removeprefix(" -  ") for line in found[1:] if line}

    layers = [f"quantize:model:{layer}" for layer in LAYERS[KIND]]
    assert list(said(project.doit("list", "--all", "quantize:model"))) == [
        "quantize:model",
        *layers,
    ]
    everything = said(project.doit("list", "--all"))
    assert list(everything)[:2] == ["extract:model", "extract:model:embed_tokens"]
    assert {
        *project.tasks(),
        *lines,
        *STAGES,
        "pack",
        "measure",
        "publish",
        "lock:model",
    } == {*everything}
    assert everything["cast:model:layers.0"] == "up to date"
    assert everything["quantize:model:layers.0"] == "to run"
    assert everything["quantize"] == "Quantize each layer."

    assert "'nothing'" in project.doit("list", "nothing", expect=3).stderr

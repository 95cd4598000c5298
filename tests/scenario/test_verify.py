"""doit verify: whether a model is what its source makes: ours, mlx_lm.convert's, an altered one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support import adapters, checkpoints, hub_server, inside, packed, projects
from support.projects import Project
from tasks.checkpoints import safetensors_file


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    keys = {"dtype": "float16", "quantize": {"recipe": "mixed_3_6", "bits": 4}}
    project = projects.create(tmp_path_factory.mktemp("verify") / "p", "huggingface", **keys)
    project.configure("plain")
    project.configure("fp4", quantize={"mode": "mxfp4"})
    project.doit()
    return project


@pytest.fixture(scope="module")
def converted(project: Project) -> Path:
    """What mlx_lm.convert makes itself."""
    from mlx_lm import convert

    folder = project.folder / "converted"
    convert(str(project.checkpoint), str(folder), quantize=True, q_bits=4, dtype="bfloat16")
    return folder


def verify(project: Project, *args: str, expect: int = 0) -> dict:
    status, out, err = inside.run(project.folder, "verify", "--json", *args)
    assert status == expect, out + err
    return json.loads(out)


def flip(folder: Path, name: str, *, at: int, bit: int = 1) -> None:
    """Flip a bit of a tensor, whatever else is there."""
    for path in folder.glob("*.safetensors"):
        for stored in safetensors_file.read(path):
            if stored.name == name:
                path.chmod(0o644)
                with path.open("r+b") as file:
                    file.seek(stored.offset + at)
                    byte = file.read(1)[0]
                    file.seek(stored.offset + at)
                    file.write(bytes([byte ^ bit]))
                return
    raise KeyError(name)


@pytest.mark.parametrize("target", ["model", "plain", "fp4"])
def test_what_was_built_here(project: Project, target: str) -> None:
    found = verify(project, "--all", target)
    assert found["verdict"] == "equal"
    assert found["layers"]["made"] == found["layers"]["all"] == len(projects.LAYERS["huggingface"])
    assert {each["verdict"] for each in found["tensors"]} == {"equal"}
    some = verify(project, target)
    assert some["layers"]["made"] == 3


def test_what_mlx_lm_converts(project: Project, converted: Path, tmp_path: Path) -> None:
    found = verify(project, "--all", "--source", str(project.checkpoint), str(converted))
    assert found["verdict"] == "equal"
    names = {each["tensor"] for each in found["tensors"]}
    stored = [
        s.name for path in converted.glob("*.safetensors") for s in safetensors_file.read(path)
    ]
    assert names == {*stored}

    # Any one bit of one weight is found, and its tensor named.
    weight = "model.layers.1.mlp.down_proj.weight"
    for at, bit in ((5, 1), (77, 16), (400, 128)):
        altered = tmp_path / f"altered-{at}"
        shutil.copytree(converted, altered)
        flip(altered, weight, at=at, bit=bit)
        found = verify(
            project, "--all", "--source", str(project.checkpoint), str(altered), expect=1
        )
        odd = [each for each in found["tensors"] if each["verdict"] != "equal"]
        assert [each["tensor"] for each in odd] == [weight]
        assert "1 of " in odd[0]["detail"]
        assert odd[0]["verdict"] == "different"

    norm = "model.norm.weight"
    flip(altered, norm, at=3, bit=8)
    status, out, err = inside.run(
        project.folder, "verify", "--all", "--source", str(project.checkpoint), str(altered)
    )
    assert status == 1, err
    assert f"{norm}: different: 1 of " in out
    assert f"{altered}: different, by " in out


def test_another_checkpoint_and_other_tensors(project: Project, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(project.checkpoint, checkpoint)
    projects.alter(checkpoint, "model.layers.1.self_attn.q_proj.weight")
    built = str(project.folder / "build" / "plain")
    found = verify(project, "--all", "--source", str(checkpoint), built, expect=1)
    odd = {each["tensor"] for each in found["tensors"] if each["verdict"] == "different"}
    assert odd == {"model.layers.1.self_attn.q_proj.weight"}


CARDS = {
    "no text": (b"\xff\xfe\x00", "does not say what it was made from"),
    "no name": (b'```toml\n[models.a]\nsource = "hf:a/\\u001b[2J"\n```\n', "is no name on the hub"),
    "lines without end": (b"```toml\n" * 200_000, "does not say what it was made from"),
}
QUANTIZATIONS = (
    [], {"bits": "x"}, {"mode": "\ud800"}, {"bits": 4, "group_size": 0}, {"mode": []},
    {"mode": "mxfp4", "bits": 5}, {"bits": 10**30},
    {"bits": 4, "group_size": 64, "lm_head": {"bits": [], "group_size": 64}},
)  # fmt: skip


def test_what_anybody_can_say_of_a_model(project: Project, tmp_path: Path) -> None:
    folder = shutil.copytree(project.folder / "build" / "model", tmp_path / "model")
    for path in folder.iterdir():
        path.chmod(0o644)
    for data, said in CARDS.values():
        (folder / "README.md").write_bytes(data)
        status, _, err = inside.run(project.folder, "verify", str(folder))
        assert (status, said in err, "\x1b" in err) == (3, True, False), err
    config = json.loads((folder / "config.json").read_text())
    for said in QUANTIZATIONS:
        (folder / "config.json").write_text(json.dumps({**config, "quantization": said}))
        source = ("--source", str(project.checkpoint))
        status, _, err = inside.run(project.folder, "verify", *source, str(folder))
        assert status == 3
        assert "Traceback" not in err


def test_as_a_task(project: Project, tmp_path: Path) -> None:
    said = project.doit("verify:plain").stdout
    assert "build/plain: equal, by 3 of " in said
    copy = tmp_path / "copy"
    shutil.copytree(project.folder, copy)
    altered = Project(copy, "huggingface", project.models)
    projects.alter(altered.checkpoint, "model.layers.1.self_attn.q_proj.weight")
    status, _, err = inside.run(copy, "verify", "--all", "plain")
    assert status == 1, err


def test_from_the_hub(project: Project, converted: Path, tmp_path: Path) -> None:
    """A stranger's model, by what its card says; and what is published here."""
    with hub_server.serve(tmp_path / "storage") as hub, hub.inside(tmp_path / "home"):
        source = hub.repository("some/Model")
        source.add_folder(project.checkpoint)
        theirs = hub.repository("org/Model-4bit")
        theirs.add_folder(converted)
        theirs.add({"README.md": b"---\nbase_model: some/Model\n---\n"})
        found = verify(project, "hf:org/Model-4bit")
        assert (found["verdict"], found["source"]) == ("equal", "hf:some/Model")

        ours = Project(project.folder / "ours", "huggingface")
        ours.folder.mkdir()
        ours.configure(source="hf:some/Model", publish="org/ours", quantize={"bits": 8})
        ours.doit("publish")
        source.add({"config.json": b"{}"})  # the card has the commit
        commit = found["source"] + "@" + [*source.commits][1]
        found = verify(ours, "--all", "hf:org/ours")
        assert (found["verdict"], found["source"]) == ("equal", commit)

        theirs.add({"README.md": b"no card"})
        status, _, err = inside.run(project.folder, "verify", "hf:org/Model-4bit")
        assert status == 3
        assert "--source" in err


def test_what_its_author_packed(tmp_path: Path) -> None:
    """Of which floats may be of several dtypes, and words are repacked."""
    plain = checkpoints.make("qwen3", tmp_path / "plain")
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
    packed.repack(plain, tmp_path / "gptq", packed.gptq(4), gptq)
    fp4 = packed.compressed("mxfp4-pack-quantized", type="float")
    packed.repack(plain, tmp_path / "mxfp4", packed.mxfp4(), fp4)
    lines = [f'[models.{kind}]\nsource = "{kind}"\n' for kind in ("gptq", "mxfp4")]
    (tmp_path / "models.toml").write_text("".join(lines))
    inside.doit(tmp_path)
    for name in ("gptq", "mxfp4"):
        built = str(tmp_path / "build" / name)
        for args in ([name], ["--source", str(tmp_path / name), built]):
            status, out, err = inside.run(tmp_path, "verify", "--all", *args)
            assert status == 0, out + err
            assert f"{args[-1]}: equal, by" in out


def test_what_is_not_built(project: Project, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_bytes((project.folder / "models.toml").read_bytes())
    status, _, err = inside.run(tmp_path, "verify", "plain")
    assert status == 3
    assert f"plain is not built: there is no {tmp_path / 'build' / 'plain'}" in err


def test_a_model_of_another_layout(project: Project, tmp_path: Path) -> None:
    (tmp_path / "weights.00.npz").write_bytes(b"PK")
    (tmp_path / "config.json").write_text("{}")
    status, _, err = inside.run(project.folder, "verify", str(tmp_path))
    assert status == 3
    assert f"{tmp_path} is of layout mlx-examples" in err


def test_what_its_files_do_not_say(tmp_path: Path) -> None:
    """An adapter, a text to round on, what a budget chose: of a target, and by a card alone."""
    project = projects.create(tmp_path, "huggingface", dtype="float32", device="cpu")
    project.models.clear()
    project.quality = {"samples": 2, "sequence_length": 12}
    adapters.make(project.checkpoint, tmp_path / "adapter", "lora")
    rounded = {"target_bpw": 5.0, "group_size": 32, "method": "awq"}
    with hub_server.serve(tmp_path / "storage") as hub, hub.inside(tmp_path / "home"):
        source, trained = hub.repository("some/Model"), hub.repository("some/Adapter")
        source.add_folder(project.checkpoint)
        trained.add_folder(tmp_path / "adapter")
        for name, keys in {
            "fused": {"adapter": "hf:some/Adapter", "quantize": {"bits": 4}},
            "rounded": {"quantize": rounded},
        }.items():
            project.configure(name, source="hf:some/Model", publish="org/{target}", **keys)
        project.doit("publish")
        for moved_on, file in (source, "config.json"), (trained, "adapter_config.json"):
            moved_on.add({file: b"{}"})
        for name in project.models:
            for named in (name, f"hf:org/{name}"):
                found = verify(project, "--all", named)
                assert found["verdict"] == "equal"
                assert found["layers"]["made"] == found["layers"]["all"]
        said = project.doit("verify:rounded").stdout
        assert "build/rounded: equal, by 3 of" in said
        assert "rounded by awq" in said

        altered = tmp_path / "altered"
        shutil.copytree(project.folder / "build" / "rounded", altered)
        weight = "model.layers.2.mlp.down_proj.weight"
        flip(altered, weight, at=5)
        found = verify(project, "--all", str(altered), expect=1)
        odd = [each for each in found["tensors"] if each["verdict"] != "equal"]
        assert [each["tensor"] for each in odd] == [weight]

        card = altered / "README.md"
        for was, now, fact in (
            ("Python ", "Python 2.", "and this is Python 3"),
            ("\nsamples", '\ntext = "secret.txt"\nsamples', "rounded by awq on secret.txt"),
            ("\ndevice", '\nadapter = "mine"\ndevice', "an adapter is fused with it"),
        ):
            text = card.read_text()
            assert was in text
            card.write_text(text.replace(was, now))
            status, _, err = inside.run(project.folder, "verify", str(altered))
            card.write_text(text)
            assert status == 3
            assert fact in err

"""A source, a loader, a layout and a library that are registered from one file each, and built."""

import json
import os
import tarfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from support import inside, projects, raw_layout, raw_loader, tar_source, toy_library
from support.projects import FOUR_BIT, Project
from tasks.checkpoints import headers
from tasks.checkpoints.loaders import LOADERS
from tasks.checkpoints.sources import SOURCES
from tasks.layouts import asking
from tasks.layouts.libraries import LIBRARIES
from tasks.layouts.registry import LAYOUTS

QUANTIZED = {"bits": 4, "group_size": 32}


def built(folder: Path) -> dict[str, mx.array]:
    """The tensors of a model in the mlx-lm layout."""
    found: dict[str, mx.array] = {}
    for path in folder.glob("model*.safetensors"):
        found |= mx.load(str(path))
    return found


def equal(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and bool(mx.array_equal(one[name], other[name]))
        for name in one
    )


def raw(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a model in the raw layout, as bytes."""
    found = {}
    for path in sorted(folder.glob("part-*.raw")):
        head, _, data = path.read_bytes().partition(b"\n")
        for name, dtype, *shape in json.loads(head):
            array = mx.zeros(shape, getattr(mx, dtype))
            found[name] = np.frombuffer(data[: array.nbytes], np.uint8)
            data = data[array.nbytes :]
        assert not data
    return found


# A source.


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return projects.create(tmp_path / "project", "huggingface", **FOUR_BIT)


@pytest.fixture
def archived(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project, its checkpoint in an archive, and one target more that has the folder."""
    monkeypatch.setitem(SOURCES, tar_source.PREFIX, tar_source)
    with tarfile.open(project.folder / "checkpoint.tar", "w") as archive:
        for path in sorted(project.checkpoint.iterdir()):
            archive.add(path, path.name)
    project.configure("folder", **FOUR_BIT)
    project.configure(source="tar:checkpoint.tar")
    return project


def test_a_source_that_is_no_folder(archived: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    first = inside.doit(archived.folder, "pack:model")
    assert "extract:model:norm" in first.computed
    inside.doit(archived.folder, "pack:folder")
    assert archived.built() == archived.built("folder")
    assert inside.doit(archived.folder).entries == []

    monkeypatch.chdir(archived.folder)
    status, out, err = inside.run(
        archived.folder, "verify", "--all", "--source", "tar:checkpoint.tar", "build/folder"
    )
    assert (status, err) == (0, "")
    assert out.endswith("made anew from tar:checkpoint.tar\n")

    archived.configure(quantize={"bits": 8})
    assert inside.doit(archived.folder, "pack:model").computed == archived.quantizing()

    (archived.folder / "models.toml").unlink()
    inside.doit(archived.folder, "init", f"tar:{archived.folder / 'checkpoint.tar'}")
    assert 'source = "tar:checkpoint.tar"\n' in (archived.folder / "models.toml").read_text()


def test_what_a_source_lost(archived: Project) -> None:
    """Its tensors are copies in the cache: what is gone from there is read again."""
    inside.doit(archived.folder)
    before = archived.built()
    archived.configure(dtype="bfloat16", quantize={"bits": 8})
    for layer in ("norm", "layers.0"):
        for path in (archived.store / "blobs").rglob("*"):
            if path.is_file() and path.parent.name != "packs":
                path.unlink()
        inside.doit(archived.folder, f"quantize:model:{layer}")
    archived.configure(**FOUR_BIT)
    inside.doit(archived.folder)
    assert archived.built() == before


def test_a_source_that_changes(archived: Project) -> None:
    inside.doit(archived.folder)
    tar = archived.folder / "checkpoint.tar"
    with tarfile.open(tar) as archive:
        member = next(m for m in archive if m.name.endswith(".safetensors"))
    projects.flip(tar, member.offset_data + member.size - 1)
    before = archived.built()
    inside.doit(archived.folder, "pack:model", expect=1)  # it is not what models.lock has
    assert archived.built() == before
    inside.doit(archived.folder, "lock")
    done = inside.doit(archived.folder, "pack:model")
    # One layer, from extract on, which is fetched again if it had gone by then; and pack.
    assert len(done.computed) in (3, 4, 5)
    assert archived.built() != archived.built("folder")


# A loader.


def write_raw(path: Path, tensors: dict[str, mx.array]) -> None:
    header = [
        [name, str(a.dtype).removeprefix("mlx.core."), *a.shape] for name, a in tensors.items()
    ]
    data = b"".join(map(data_of, tensors.values()))
    path.write_bytes(json.dumps(header).encode() + b"\n" + data)


def data_of(array: mx.array) -> bytes:
    return bytes(memoryview(array.view(mx.uint8).flatten()))


def test_a_loader_and_file_format_of_another_kind_of_checkpoint(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOADERS, "raw", raw_loader)
    formats = (*headers.FILE_FORMATS, raw_loader.RawFile())
    monkeypatch.setattr(headers, "FILE_FORMATS", formats)
    other = project.folder / "other"
    other.mkdir()
    for path in project.checkpoint.iterdir():
        if path.suffix == ".safetensors":
            tensors = mx.load(str(path))
            renamed = {raw_loader.PREFIX + key: value for key, value in tensors.items()}
            write_raw(other / f"{path.stem}.raw", renamed)
        elif path.name == "config.json":
            (other / "raw.json").write_bytes(path.read_bytes())
        elif not path.name.endswith(".index.json"):
            (other / path.name).write_bytes(path.read_bytes())
    project.configure("other", source="other", **FOUR_BIT)
    project.configure("named", source="other", loader="raw", **FOUR_BIT)
    inside.doit(project.folder)
    for target in ("other", "named"):
        folder = project.folder / "build" / target
        assert equal(built(folder), built(project.folder / "build" / "model"))
    assert inside.doit(project.folder).entries == []

    (other / "consolidated.00.pth").touch()
    refused = inside.doit(project.folder, expect=None)
    assert 'loader = "llama" or loader = "raw"' in refused.stdout + refused.stderr


# A layout.


def test_a_layout_with_a_weight_format_of_its_own(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYOUTS, "raw", raw_layout)
    project.configure("raw", layout="raw", quantize=QUANTIZED)
    project.configure("whole", layout="raw", quantize=QUANTIZED, max_shard_size="1GB")
    project.configure(dtype="float32", quantize=QUANTIZED)
    inside.doit(project.folder)
    folder = project.folder / "build" / "raw"
    expected = built(project.folder / "build" / "model")
    for target in ("raw", "whole"):
        found = raw(project.folder / "build" / target)
        assert found.keys() == expected.keys()
        for name, data in found.items():
            assert data.tobytes() == data_of(expected[name])
    parts = sorted(folder.glob("*.raw"))
    assert len(parts) > 2
    assert [path.name for path in sorted((folder.parent / "whole").glob("*.raw"))] == ["part-0.raw"]
    small = {path.name for path in folder.iterdir()} - {path.name for path in parts}
    assert small == {"config.json", "words.json", "count"}
    assert json.loads((folder / "config.json").read_bytes())["raw"] is True
    assert inside.doit(project.folder).entries == []

    (folder / "stray.raw").touch()  # a weight file that is not of the build
    done = inside.doit(project.folder)
    assert {entry["task"] for entry in done.entries} == {"pack:raw"}


# A library.


@pytest.fixture
def toy_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose model is the library's."""
    site, checkpoint = tmp_path / "site", tmp_path / "checkpoint"
    site.mkdir()
    checkpoint.mkdir()
    toy_library.install(site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setitem(LIBRARIES, "toy-lm", toy_library)
    asking.versions.cache_clear()
    monkeypatch.setitem(LAYOUTS, "toy", toy_library)
    config = {"model_type": "toy", "vocabulary": 96, "width": 64, "layers": 3}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "tokenizer.json").write_text("{}")
    mx.random.seed(0)
    shapes = {"embed.weight": (96, 64), "gate.weight": (64, 64)}
    for i in range(3):
        shapes |= {f"layers.{i}.weight": (64, 64), f"layers.{i}.bias": (64,)}
    shapes |= {f"expert.{i}.weight": (64, 64) for i in range(2)}
    tensors = {name: mx.random.normal(shape).astype(mx.bfloat16) for name, shape in shapes.items()}
    tensors["unknown.rotary_emb.inv_freq"] = mx.zeros(4)
    mx.save_safetensors(str(checkpoint / "model.safetensors"), tensors)
    (tmp_path / "models.toml").write_text(
        '[models.a]\nsource = "checkpoint"\nlayout = "toy"\nquantize = { bits = 4 }\n'
        'dtype = "float16"\n'
    )
    return tmp_path


def test_a_library_with_its_own_models(toy_model: Path) -> None:
    inside.doit(toy_model)
    found = raw(toy_model / "build" / "a")
    given = mx.load(str(toy_model / "checkpoint" / "model.safetensors"))

    stacked = mx.stack([given[f"expert.{i}.weight"] for i in range(2)])
    assert found["experts.weight"].tobytes() == data_of(stacked.astype(mx.float16))
    with mx.stream(mx.default_device()):
        layer = mx.quantize(given["layers.1.weight"].astype(mx.float16), 64, 4)
        gate = mx.quantize(given["gate.weight"], 32, 8)  # never cast
    for name, arrays in (("layers.1", layer), ("gate", gate)):
        for part, array in zip(("weight", "scales", "biases"), arrays, strict=True):
            assert found[f"{name}.{part}"].tobytes() == data_of(array)
    assert json.loads((toy_model / "build" / "a" / "config.json").read_bytes())["by"] == "toy-lm"
    assert inside.doit(toy_model).entries == []


def test_a_library_that_decides_by_values(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes depends on them: another sign, other weights, and nothing else anew."""
    command, environment = asking.command("toy-lm")
    # Of that process, which knows of no other libraries than its own.
    told = (
        "from support import toy_library; from tasks.layouts import libraries, probe; "
        "libraries.LIBRARIES['toy-lm'] = toy_library; probe.main()"
    )
    start = [*command[: command.index("-m")], "-c", told, "toy-lm"]
    folders = [str(Path(toy_library.__file__).parents[1]), str(toy_model / "site")]
    environment["PYTHONPATH"] += os.pathsep + os.pathsep.join(folders)
    monkeypatch.setattr(asking, "command", lambda library: (start, environment))
    path, weights = toy_model / "site" / "toy_lm" / "models.py", toy_model / "checkpoint"
    text = path.read_text()
    looks = """
    sign = weights.pop("sign")
    mx.eval(sign)
    if sign.item() < 0:
        weights["layers.1.weight"] = -weights["layers.1.weight"]
    weights["layers.2.weight"] = weights["layers.2.weight"] * sign
    model.load_weights"""
    path.write_text(text.replace("\n    model.load_weights", looks))
    given = mx.load(str(weights / "model.safetensors"))
    models = toy_model / "models.toml"
    models.write_text(models.read_text().replace("quantize = { bits = 4 }\n", ""))
    for sign in (-1.0, 1.0):
        tensors = {**given, "sign": mx.array(sign, mx.bfloat16)}
        mx.save_safetensors(str(weights / "new.safetensors"), tensors)
        (weights / "new.safetensors").rename(weights / "model.safetensors")
        inside.doit(toy_model, "lock")
        done = inside.doit(toy_model)
        found = raw(toy_model / "build" / "a")
        for i, factor in enumerate((1, sign, sign)):
            expected = (given[f"layers.{i}.weight"] * factor).astype(mx.float16)
            assert found[f"layers.{i}.weight"].tobytes() == data_of(expected)
    assert "unshard:a:layers.2" in done.computed
    assert "unshard:a:layers.0" not in done.computed
    assert inside.doit(toy_model).entries == []


def test_a_library_that_is_not_installed(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_library, "DISTRIBUTION", "no-such-lm")
    asking.versions.cache_clear()
    done = inside.doit(toy_model, expect=None)
    assert "no-such-lm is not installed: pip install no-such-lm" in done.stdout + done.stderr

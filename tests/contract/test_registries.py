"""What every registered source, loader, file format, layout and library keeps to."""

import json
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest

from cache.records.memos import Memos
from cache.store import Store
from support import hub_server, projects, tar_source
from support.hub_repositories import Repository
from support.hub_server import Hub
from tasks.checkpoints import headers, loaders, record, sources
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.folder import FolderSource
from tasks.checkpoints.loaders import LOADERS
from tasks.checkpoints.source import Opening
from tasks.checkpoints.sources import SOURCES
from tasks.core.errors import ArchitectureError, CheckpointError
from tasks.core.quantization import Quantize
from tasks.core.spec import SourceSpec, Target
from tasks.layouts import asking
from tasks.layouts.libraries import LIBRARIES
from tasks.layouts.registry import LAYOUTS, is_read

# A checkpoint for each loader: of which project's kind, and what its weight files are called.
KINDS = {
    "llama": ("meta", ""),
    "transformers": ("huggingface", ""),
    "mistral": ("huggingface", "consolidated"),
}


@pytest.fixture(scope="module", params=["meta", "huggingface"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's folder."""
    return projects.create(tmp_path_factory.mktemp("project"), request.param).checkpoint


@pytest.fixture
def memos(tmp_path: Path) -> Memos:
    return Store.at(tmp_path / "cache").memos


def read(folder: Path, memos: Memos) -> Checkpoint:
    return loaders.read(FolderSource(folder), None, memos)


# Sources.


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub without models, which the client of this process talks to."""
    with hub_server.serve(tmp_path / "uploaded") as hub, hub.inside(tmp_path / "home"):
        yield hub


@pytest.fixture
def spelled(
    kept: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """How models.toml, in `tmp_path`, spells the checkpoint as each type of source."""
    monkeypatch.setitem(SOURCES, tar_source.PREFIX, tar_source)
    with tarfile.open(tmp_path / "checkpoint.tar", "w") as archive:
        for path in kept.iterdir():
            archive.add(path, path.name)
    hub.repositories["org/model"] = Repository("org/model")
    hub.repositories["org/model"].add_folder(kept)
    return {"": str(kept), "tar:": "tar:checkpoint.tar", "hf:": "hf:org/model"}


@pytest.fixture
def opening(tmp_path: Path, memos: Memos) -> Opening:
    return Opening(is_read, memos, str(tmp_path))


@pytest.mark.parametrize("prefix", [*SOURCES, tar_source.PREFIX])
def test_a_source_gives_the_files_bytes(
    prefix: str, kept: Path, spelled: dict[str, str], tmp_path: Path, opening: Opening
) -> None:
    spec = sources.spec(spelled[prefix], tmp_path)
    assert spec.prefix == prefix
    assert sources.spec(str(spec), Path("/elsewhere")) == spec
    again = sources.spelled(spec, tmp_path)
    assert sources.spec(again, tmp_path) == spec
    assert Path(again.removeprefix(prefix)) == Path(spelled[prefix].removeprefix(prefix))
    assert sources.folder_of(spec) == (None if prefix else kept)
    source = sources.open_source(spec, opening)
    assert source.available
    assert source.names("*") == sorted(path.name for path in kept.iterdir())
    for path in kept.iterdir():
        data = path.read_bytes()
        assert source.has(path.name)
        assert not source.has(f"{path.name}.other")
        for start, nbytes in ((0, len(data)), (3, 5), (len(data) - 7, 7), (11, 0)):
            assert b"".join(source.read(path.name, start, nbytes)) == data[start:][:nbytes]
        with pytest.raises(CheckpointError):
            list(source.read(path.name, len(data) - 1, 2))
        local = source.path(path.name)
        assert local is None or local.read_bytes() == data
        if not any(path.match(pattern) for pattern in loaders.weight_patterns()):
            assert (source.small_files / path.name).read_bytes() == data


@pytest.mark.parametrize("prefix", [*SOURCES, tar_source.PREFIX])
def test_a_source_that_is_not_there(
    prefix: str, tmp_path: Path, hub: Hub, opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be named, opened and asked whether it is there; models.lock may know it still."""
    monkeypatch.setitem(SOURCES, tar_source.PREFIX, tar_source)
    spec = sources.spec(f"{prefix}nowhere/it", tmp_path)
    assert not sources.open_source(spec, opening).available


def test_what_is_no_type_of_source_is_a_folder(tmp_path: Path) -> None:
    for text in ("a:b", "folder:x", "./tar:x", "c"):
        assert sources.spec(text, tmp_path) == SourceSpec("", str(tmp_path / text))


def test_a_record_is_a_source_without_weights(kept: Path, tmp_path: Path, memos: Memos) -> None:
    store = Store.at(tmp_path / "cache")
    checkpoint = read(kept, memos)
    digests = dict.fromkeys(checkpoint.stored, "0" * 32)
    small = {checkpoint.config_file: (kept / checkpoint.config_file).read_bytes()}
    name, nbytes = record.keep(store, checkpoint, digests, small)
    recalled = record.recall(store, name, nbytes)
    assert recalled is not None
    source = recalled.source
    assert (source.identity, source.available, source.digests) == (name, False, digests)
    assert (recalled.stored, recalled.tensors) == (checkpoint.stored, checkpoint.tensors)
    assert (source.small_files / checkpoint.config_file).read_bytes() in small.values()
    key, stored = next(iter(recalled.stored.items()))
    assert recalled.part(key) is None
    assert recalled.fingerprint([key]) == name
    with pytest.raises(CheckpointError, match="is not here"):
        list(source.read(stored.file, 0, 1))
    assert record.recall(store, "f" * 64, 10) is None


# Loaders and file formats.


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_reads_its_kind_alone(name: str, tmp_path: Path, memos: Memos) -> None:
    kind, called = KINDS[name]
    source = FolderSource(projects.create(tmp_path / "project", kind).checkpoint)
    if called:
        (source.small_files / "model.safetensors.index.json").unlink(missing_ok=True)
        for file in source.names("model*"):
            source.path(file).rename(source.path(file.replace("model", called)))
    assert [each for each, loader in LOADERS.items() if loader.fits(source)] == [name]
    checkpoint = LOADERS[name].read(source, memos)
    assert checkpoint.source is source
    assert source.has(checkpoint.config_file)
    assert checkpoint.files.keys() <= {*source.names("*")}
    for file, stamp in checkpoint.stamps.items():
        assert any(Path(file).match(pattern) for pattern in LOADERS[name].WEIGHTS)
        assert stamp.size == source.path(file).stat().st_size
    for key, stored in checkpoint.stored.items():
        part = checkpoint.part(key)
        assert part is not None
        assert part.length == stored.nbytes
        assert 0 < stored.offset <= checkpoint.stamps[stored.file].size - stored.nbytes
    for tensor in checkpoint.tensors.values():
        parts = [checkpoint.stored[key] for key in tensor.inputs]
        assert {part.dtype for part in parts} == {tensor.dtype}
        if not tensor.steps:
            assert [part.shape for part in parts] == [tensor.shape]
    used = {key for tensor in checkpoint.tensors.values() for key in tensor.inputs}
    assert used == checkpoint.stored.keys()
    assert LOADERS[name].HOLDS in _refusal(tmp_path / "empty", memos)


def _refusal(folder: Path, memos: Memos) -> str:
    folder.mkdir()
    with pytest.raises(CheckpointError) as refused:
        read(folder, memos)
    return str(refused.value)


def test_each_weight_file_has_one_format() -> None:
    suffixes = [suffix for each in headers.FILE_FORMATS for suffix in each.SUFFIXES]
    assert len({*suffixes}) == len(suffixes)
    for pattern in loaders.weight_patterns():
        assert Path(pattern).suffix in suffixes


# Layouts.


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_of_weight_files(name: str) -> None:
    layout = LAYOUTS[name]
    for count in (1, 2, 11, 101):
        names = layout.shard_names(count)
        assert len({*names}) == count
        assert all(file.endswith(layout.weight_format.suffix) for file in names)
        assert all(fnmatchcase(file, layout.loaded) for file in names)
        if count < 100:
            assert names == sorted(names)
    assert layout.default_shard_bytes > 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_a_layout(name: str, kept: Path, memos: Memos) -> None:
    layout = LAYOUTS[name]
    checkpoint = read(kept, memos)
    if name in LIBRARIES and find_spec(LIBRARIES[name].PACKAGE) is None:
        extra = rf"pip install 'mlx-make\[{LIBRARIES[name].EXTRA}\]'"
        with pytest.raises(ArchitectureError, match=extra):
            layout.model(checkpoint, memos)
        return
    if name == "mlx-vlm-mtp":
        with pytest.raises(ArchitectureError, match="has no drafter for model_type = 'llama'"):
            layout.model(checkpoint, memos)
        return
    if name in LIBRARIES and "llama" not in asking.model_types(LIBRARIES[name]):
        with pytest.raises(ArchitectureError, match=r'layout = "mlx-lm".* a class for it'):
            layout.model(checkpoint, memos)
        return
    if name == "mlx-examples" and not (kept / "tokenizer.model").exists():
        with pytest.raises(CheckpointError, match="reads no other tokenizer"):
            layout.sources(checkpoint)
        return
    model = layout.model(checkpoint, memos)
    assert {path.parent for path in layout.sources(checkpoint)} == {kept}
    assert all(path.is_file() for path in layout.sources(checkpoint))
    shards = [[(parameter, 10)] for parameter in list(model.parameters)[:3]]
    small = layout.files(checkpoint, memos, shards, 30)
    assert not small.keys() & {*layout.shard_names(len(shards)), "config.json"}
    for file, data in small.items():
        assert Path(file).name == file
        assert isinstance(data, bytes)
    tokenizer = layout.tokenizer_files(checkpoint, memos)
    assert tokenizer.items() <= small.items()
    assert ("tokenizer.json" in tokenizer) == bool(model.library)

    held = {f"{m.path}.{part}" for m in model.modules for part in m.names}
    assert held == model.parameters.keys()
    assert {key for p in model.parameters.values() for key in p.inputs} <= checkpoint.stored.keys()
    for parameter in model.parameters.values():
        assert parameter.size == prod(parameter.shape)

    spec = Target(
        name="a",
        source=SourceSpec("", str(kept)),
        source_name="checkpoint",
        layout=name,
        quantize=Quantize(bits=4, group_size=32),
        max_shard_bytes=layout.default_shard_bytes,
        where="",
    )
    layout.check(spec, model)
    plain = layout.config(spec, model, None)
    quantized = layout.config(spec, model, {"group_size": 32, "bits": 4, "mode": "affine"})
    assert json.loads(json.dumps(plain)) == plain
    assert "quantization" not in plain
    assert quantized["quantization"]["bits"] == 4
    assert {**quantized, **plain} == quantized


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_is_said_of_a_library(name: str) -> None:
    library = LIBRARIES[name]
    assert name.startswith(library.DISTRIBUTION)
    for module in library.MODULES:
        assert module.partition(".")[0] == library.PACKAGE
    assert name in LAYOUTS
    if spec := find_spec(library.PACKAGE):
        (folder,) = map(Path, spec.submodule_search_locations)
        modules = {path.stem for each in library.MODELS for path in (folder / each).iterdir()}
        code = "".join(path.read_text() for path in folder.glob("**/utils.py"))
        assert [name for name in {*library.KNOWS} - modules if f'"{name}": ' not in code] == []
    assert all(one != other for one, other in pairwise(sorted(library.STUBS)))

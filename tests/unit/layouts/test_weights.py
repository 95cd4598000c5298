"""Weight files, read by the clients that will read them."""

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import cache.blobs
from cache.blobs import Blobs, Part, Place
from cache.digest import digest
from cache.errors import BlobLost, FileChanged
from cache.files import atomic, space
from cache.files.stamp import Stamp
from cache.records.manifests import DTYPE_BYTES, Tensor
from tasks.layouts import npz_format, weight_file
from tasks.layouts.npz_format import NPZ
from tasks.layouts.safetensors_format import SAFETENSORS
from tasks.layouts.weight_file import WeightFormat

NUMPY_HAS = [dtype for dtype in DTYPE_BYTES if dtype not in ("bfloat16", "complex64", "bool_")]
TENSORS = st.lists(
    st.tuples(st.sampled_from(NUMPY_HAS), st.lists(st.integers(0, 5), max_size=3)), min_size=1
)


def keep(blobs: Blobs, made: dict[str, np.ndarray]) -> tuple[weight_file.Shard, weight_file.Find]:
    """Return arrays as tensors whose bytes are in the store, and what finds these."""
    tensors = {}
    for name, array in made.items():
        with blobs.writing() as writer:
            writer.write(memoryview(array.tobytes()))
        tensors[name] = Tensor(str(array.dtype), array.shape, writer.digest)
    found = {n: (t.digest, blobs.locate(t.digest, t.nbytes)) for n, t in tensors.items()}
    return list(tensors.items()), found.__getitem__


def arrays(told: list[tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        f"layers.{i}.ä.weight": random.integers(0, 100, shape).astype(dtype)
        for i, (dtype, shape) in enumerate(told)
    }


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=TENSORS, limit=st.sampled_from([npz_format.ZIP32_LIMIT, 300, 0]))
def test_npz_is_what_numpy_and_zipfile_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list, limit: int
) -> None:
    """Also with ZIP64 records, which the limit brings on where it is small."""
    monkeypatch.setattr(npz_format, "ZIP32_LIMIT", limit)
    blobs, path = Blobs(tmp_path / "blobs"), tmp_path / "weights.npz"
    made = arrays(told)
    shard, find = keep(blobs, made)
    weight_file.write(path, shard, NPZ, blobs, find, 2)

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{name}.npy" for name in made]
    with np.load(path) as read:
        for name, array in made.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=TENSORS, limit=st.sampled_from([npz_format.ZIP32_LIMIT, 300, 0]), data=st.data())
@pytest.mark.parametrize("form", [SAFETENSORS, NPZ], ids=lambda form: form.name)
def test_what_lies_in_its_place_is_left_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: WeightFormat,
    told: list,
    limit: int,
    data: st.DataObject,
) -> None:
    """Any of the tensors, written before all else, make the same file."""
    monkeypatch.setattr(npz_format, "ZIP32_LIMIT", limit)
    blobs, path = Blobs(tmp_path / "blobs"), tmp_path / "weights"
    made = arrays(told)
    shard, find = keep(blobs, made)
    expected = weight_file.write(path, shard, form, blobs, find, 2)
    whole = path.read_bytes()

    offsets = weight_file.offsets(shard, form)
    for name, array in made.items():
        assert whole[offsets[name] :][: array.nbytes] == array.tobytes()
    (pack,) = blobs.new_containers(1, len(whole))
    there = {name: Place(pack, offsets[name], made[name].nbytes) for name in made}
    chosen = data.draw(st.sets(st.sampled_from([*made]))) if made else set()
    for name in chosen:
        with blobs.writing_at(there[name]) as writer:
            writer.write(memoryview(made[name].tobytes()))
        assert writer.digest == find(name)[0]

    def find_there(name: str) -> tuple[str, Sequence[Part]]:
        digest, parts = find(name)
        return digest, [there[name].part] if name in chosen else parts

    assert weight_file.write(pack, shard, form, blobs, find_there, 2) == expected
    assert pack.read_bytes() == whole


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=TENSORS)
def test_safetensors_is_what_safetensors_and_mlx_read(tmp_path: Path, told: list) -> None:
    blobs, path = Blobs(tmp_path / "blobs"), tmp_path / "model.safetensors"
    made = arrays(told)
    shard, find = keep(blobs, made)
    weight_file.write(path, shard, SAFETENSORS, blobs, find, 2)

    with safe_open(path, "numpy") as read:
        assert read.metadata() == {"format": "mlx"}
        for name, array in made.items():
            np.testing.assert_array_equal(read.get_tensor(name), array)
    loaded = mx.load(str(path))
    assert {name: array.shape for name, array in made.items()} == {
        name: tuple(array.shape) for name, array in loaded.items()
    }


def test_long_runs_go_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = Blobs(tmp_path / "blobs")
    made = {"a": np.arange(12345, dtype=np.uint8), "b": np.arange(777, dtype=np.float32)}
    shard, find = keep(blobs, made)
    forms = [(form, f"w{form.suffix}") for form in (NPZ, SAFETENSORS)]
    for form, name in forms:
        weight_file.write(tmp_path / name, shard, form, blobs, find, 3)

    for module in (weight_file, cache.blobs):
        monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(atomic, "WRITE_BYTES", 300)
    # The same comes out where the file system sets nothing aside, and where no system does.
    for libc in (SimpleNamespace(fallocate=lambda *_: -1), object()):
        monkeypatch.setattr(space, "_libc", libc)
        for form, name in forms:
            file = weight_file.write(tmp_path / f"other-{name}", shard, form, blobs, find, 3)
            data = (tmp_path / name).read_bytes()
            assert (tmp_path / f"other-{name}").read_bytes() == data
            assert (file.shape, file.digest) == ((len(data),), digest(data))
    loaded = mx.load(str(tmp_path / "w.safetensors"))
    assert all(np.array_equal(np.array(loaded[name]), array) for name, array in made.items())


def test_bfloat16_goes_through_npz(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    array = mx.random.normal((3, 64)).astype(mx.bfloat16)
    raw = np.array(array.view(mx.uint16))
    [(name, tensor)], find = keep(blobs, {"w": raw})
    shard = [(name, replace(tensor, dtype="bfloat16"))]
    weight_file.write(tmp_path / "w.npz", shard, NPZ, blobs, find, 1)
    read = mx.load(str(tmp_path / "w.npz"))["w"]
    assert read.dtype == mx.bfloat16
    assert mx.array_equal(read, array).item()


@pytest.mark.parametrize("change", ["overwritten", "cut"])
def test_a_file_that_changes_after_it_was_found(tmp_path: Path, change: str) -> None:
    """Bytes of a changed checkpoint must not be taken for those that its digest names."""
    blobs, checkpoint = Blobs(tmp_path / "blobs"), tmp_path / "checkpoint"
    checkpoint.write_bytes(b"a" * 1000)
    part = Part(str(checkpoint), 0, 1000, Stamp.of(checkpoint))
    blobs.refer(digest(b"a" * 1000), [part])
    found = blobs.locate(digest(b"a" * 1000), 1000)
    checkpoint.write_bytes(b"b" * (1000 if change == "overwritten" else 10))
    shard = [("w", Tensor("uint8", (1000,), ""))]
    with pytest.raises(FileChanged, match="changed while it was read"):
        blobs.read_into(found, memoryview(bytearray(1000)))
    with pytest.raises(FileChanged, match="changed while it was read"):
        weight_file.write(
            tmp_path / "w.safetensors", shard, SAFETENSORS, blobs,
            lambda _: (digest(b"a" * 1000), found), 1,
        )  # fmt: skip
    with pytest.raises(BlobLost, match="changed since it was read"):
        blobs.locate(digest(b"a" * 1000), 1000)

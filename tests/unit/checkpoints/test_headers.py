"""Files made to be misread, or to take the machine: read as MLX and torch do, or refused."""

import io
import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import torch

from cache.records.memos import Memos
from tasks.checkpoints import headers, safetensors_file, small_files, torch_file
from tasks.checkpoints.folder import FolderSource
from tasks.core.errors import CheckpointError

# Safetensors: what MLX loads, and no more.

PLAIN = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def entry(dtype: str, shape: list, end: int) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()


def with_metadata(value: object) -> bytes:
    return json.dumps({"__metadata__": value, **json.loads(PLAIN)}).encode()


TAKEN = {
    "plain": (PLAIN.encode(), 8),
    "bytes after the last tensor": (PLAIN.encode(), 13),
    "space around": (f"  {PLAIN}  ".encode(), 8),
    "a byte order mark": (b"\xef\xbb\xbf" + PLAIN.encode(), 8),
    "metadata of text": (with_metadata({"format": "pt"}), 8),
    "metadata that is text": (with_metadata("pt"), 8),
    "no axis": (entry("F32", [], 4), 4),
    "no element": (entry("F32", [0, 5], 0), 0),
    **{
        dtype: (entry(dtype, [8], 8 * size), 8 * size)
        for dtype, size in (
            ("F8_E4M3", 1), ("F8_E8M0", 1), ("BOOL", 1), ("U8", 1), ("I8", 1), ("U16", 2),
            ("I16", 2), ("U32", 4), ("I32", 4), ("U64", 8), ("I64", 8), ("F16", 2), ("BF16", 2),
            ("F32", 4), ("C64", 8),
        )
    },
}  # fmt: skip
REFUSED = {
    "too short": (PLAIN.encode(), 7),
    "metadata of numbers": (with_metadata({"a": 1}), 8),
    "metadata of lists": (with_metadata({"a": ["b"]}), 8),
    "no number": (PLAIN.replace("}}", ',"x":NaN}}').encode(), 8),
    "UTF-16": (PLAIN.encode("utf-16"), 8),
    "no UTF-8": (PLAIN.replace("a", "b").encode().replace(b"b", b"\xff", 1), 8),
    "half a character": (PLAIN.replace("a", r"\ud800", 1).encode(), 8),
    "a control character": (PLAIN.replace("a", "\x01", 1).encode(), 8),
    "less than nothing": (entry("F32", [-2], 8), 8),
    "bytes for another shape": (entry("F32", [3], 8), 8),
    **{
        dtype: (entry(dtype, [8], nbytes), nbytes)
        for dtype, nbytes in (("F8_E5M2", 8), ("F4", 4), ("F6_E2M3", 6), ("F64", 64))
    },
}


def safetensors(folder: Path, header: bytes, nbytes: int) -> Path:
    path = folder / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(nbytes)))
    return path


@pytest.mark.parametrize("case", TAKEN)
def test_a_header_that_mlx_takes(case: str, tmp_path: Path) -> None:
    path = safetensors(tmp_path, *TAKEN[case])
    (stored,) = safetensors_file.read(path)
    ((name, array),) = mx.load(str(path)).items()
    dtype = str(array.dtype).removeprefix("mlx.core.").replace("bool", "bool_")
    assert (stored.name, stored.dtype, stored.shape) == (name, dtype, array.shape)
    data = path.read_bytes()[stored.offset :][: stored.nbytes]
    assert data == (bytes(memoryview(array.flatten().view(mx.uint8))) if array.size else b"")


@pytest.mark.parametrize("case", REFUSED)
def test_a_header_that_mlx_refuses(case: str, tmp_path: Path) -> None:
    path = safetensors(tmp_path, *REFUSED[case])
    with pytest.raises((RuntimeError, ValueError)):
        mx.load(str(path))
    with pytest.raises(CheckpointError) as refused:
        safetensors_file.read(path)
    assert len(str(refused.value)) < 600


def test_an_axis_that_mlx_wraps_around(tmp_path: Path) -> None:
    path = safetensors(tmp_path, entry("F32", [2**31, 0], 0), 0)
    assert mx.load(str(path))["a"].shape[0] < 0
    with pytest.raises(CheckpointError, match="shape"):
        safetensors_file.read(path)


@pytest.mark.parametrize(
    ("name", "shape"), [("a" * 5000, [1]), ("\n.lora_a" * 1000, [1]), ("a", [1] * 65)]
)
def test_names_and_shapes_without_end(name: str, shape: list, tmp_path: Path) -> None:
    """What looks through a name, or multiplies sizes, takes the square of how many there are."""
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    path = safetensors(tmp_path, json.dumps(header).encode(), 4)
    with pytest.raises(CheckpointError, match=r"over (4,096|64)"):
        safetensors_file.read(path)
    torch.save({name: torch.ones(shape)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"over (4,096|64)|dim"):
        torch_file.read(tmp_path / "a.pth")


def test_values_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON of some bytes is ten times as many once it is read."""
    monkeypatch.setattr(safetensors_file, "MOST_VALUES", 50)
    names = {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(9)}
    path = safetensors(tmp_path, json.dumps(names).encode(), 0)
    with pytest.raises(CheckpointError, match="it has 99 values, names and commas, over 50"):
        safetensors_file.read(path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"a": [[]] * 50}))
    monkeypatch.setattr(small_files.check_values, "__defaults__", (50,))
    with pytest.raises(CheckpointError, match="is no JSON: it has 102 values"):
        small_files.read_json(config, "")


def test_a_name_twice(tmp_path: Path) -> None:
    """Of two, some readers take the first, some the last, some none."""
    path = safetensors(tmp_path, entry("F32", [1], 4), 4)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = (
        data[8 : 8 + length].rstrip()[:-1]
        + b',"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert mx.load(str(path)).keys() == {"a"}
    with pytest.raises(CheckpointError, match="a comes twice"):
        safetensors_file.read(path)


# Archives of torch.


def archive(path: Path, data: bytes, *members: tuple[str, bytes]) -> Path:
    """A file as torch.save writes it, with that pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), *members):
            file.writestr(f"archive/{name}", content)
    return path


def test_a_member_twice(tmp_path: Path) -> None:
    """Torch reads the first: to read the last would be to build other weights."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(4)}, path)
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("a/data/0", torch.zeros(4).numpy().tobytes())
    with pytest.raises(CheckpointError, match="data/0 is in the archive twice"):
        torch_file.read(path)


def test_a_pickle_larger_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 1 << 20)
    path = archive(tmp_path / "a.pth", bytes(2 << 20))
    assert path.stat().st_size < 10_000  # a bomb
    with pytest.raises(CheckpointError, match=r"data.pkl has 2,097,152 bytes, over 1,048,576"):
        torch_file.read(path)


def doubled(times: int) -> bytes:
    """A key of 2**times values: whoever hashes it never comes back."""
    start = b"\x80\x02}" + b")q\x00"
    twice = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(times))
    return start + twice + b"K\x01s."


PICKLES = {
    "repeated": (doubled(60), "values"),
    "deep": (b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".", "within each other"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 200_000 + b".", "within each other"),
    "a memo of gigabytes": (b"\x80\x02}r\xff\xff\xff\x7f.", "remembers value 2,147,483,647"),
}


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_wants_the_machine(case: str, legacy: bool, tmp_path: Path) -> None:
    data, words = PICKLES[case]
    path = tmp_path / "a.pth"
    if legacy:
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + data)
    else:
        archive(path, data)
    with pytest.raises(CheckpointError, match=words):
        torch_file.read(path)


def test_pickles_of_real_kinds_pass(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.ones(2, 2) for i in range(2000)}
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    for number, (state, new) in enumerate(
        [(tensors, True), (tensors, False), (model.state_dict(), True), (model.state_dict(), False)]
    ):
        path = tmp_path / f"{number}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=new)
        assert [stored.name for stored in torch_file.read(path)] == [*state]
    torch_file.check_pickle(path, io.BytesIO(pickle.dumps({"a": [(1, 2.0), {"b": None}]})))


def test_a_meta_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.ones(2), "b": torch.empty(2, device="meta")}, path)
    with pytest.raises(CheckpointError, match="'b' is a meta tensor, a shape without weights"):
        torch_file.read(path)


# Files that are none.


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Opening a pipe waits for ever, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)
        server.bind("socket.safetensors")
        for kind in ("pipe", "device", "folder", "socket"):
            path = tmp_path / f"{kind}.safetensors"
            with pytest.raises(CheckpointError, match=f"is no file but a {kind}"):
                headers.headers([path], Memos(tmp_path / "memos"))
            with pytest.raises(CheckpointError, match=f"is no file but a {kind}"):
                small_files.read_json(path, "")
            assert not small_files.is_pointer(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        small_files.read_bytes(tmp_path / "nothing")


def test_a_small_file_that_is_not_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "MAX_SMALL_BYTES", 10)
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").write_bytes(bytes(11))
    assert small_files.read_bytes(tmp_path / "a") == bytes(10)
    with pytest.raises(CheckpointError, match="has over 10 bytes, more than any configuration"):
        small_files.read_bytes(tmp_path / "b")


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert small_files.read_json(path, "") == {"a": 1}


def packed(path: Path) -> None:
    torch.save({"a": torch.zeros(3 << 20)}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
    ):
        for info in whole.infolist():
            file.writestr(info.filename, whole.read(info))


def over_and_over(path: Path) -> None:
    torch.save({"a": torch.zeros(1, 1).expand(1 << 20, 1 << 20)}, path)


def over_and_over_before_torch_1_6(path: Path) -> None:
    tensors = {"a": torch.zeros(1, 1).expand(1 << 20, 1 << 20)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [packed, over_and_over, over_and_over_before_torch_1_6])
def test_a_few_bytes_that_would_be_many(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"its [\d,]+ bytes would be [\d,]+\."):
        torch_file.read(tmp_path / "a.pth")


def test_a_pipe_in_place_of_what_a_download_notes(tmp_path: Path) -> None:
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    os.mkfifo(notes / "a.metadata")
    (notes / "b.metadata").symlink_to("/dev/zero")
    (notes / "c.metadata").write_text("a" * 40 + "\n")
    assert FolderSource(tmp_path).revision == "a" * 40

"""GGUF files made to take the machine are refused; what llama.cpp's package writes is read."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from tasks.quality import gguf_file


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def file(*parts: bytes, tensors: int = 0, settings: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, settings) + b"".join(parts)


def array(kind: int, count: int) -> bytes:
    return text(b"x") + struct.pack("<IIQ", 9, kind, count)


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


WRONG = {
    "elements without end": (file(array(0, 1 << 60), settings=1), "ends in its header"),
    "texts without end": (file(array(8, 1 << 60), settings=1), "ends in its header"),
    "arrays in arrays": (file(array(9, 1), bytes(12), settings=1), "a value of type 9"),
    "settings without end": (file(settings=1 << 60), "ends in its header"),
    "a long text": (file(struct.pack("<Q", 1 << 62), settings=1), "ends in its header"),
    "axes without end": (file(text(b"a"), struct.pack("<I", 1 << 31), tensors=1), "has 2147483648"),
    "a large tensor": (file(tensor(b"a", [1 << 40, 1 << 40]), tensors=1), "more bytes than all"),
    "one tensor's bytes often": (
        file(*(tensor(b"%d" % n, [64]) for n in range(9)), bytes(256), tensors=9),
        "more bytes than all",
    ),
    "past the end": (file(tensor(b"a", [8], offset=1 << 62), bytes(64), tensors=1), "past the end"),
    "other numbers": (file(tensor(b"a", [8], kind=8), bytes(64), tensors=1), "is of type 8"),
    "a name twice": (file(tensor(b"a", [0]), tensor(b"a", [0]), tensors=2), "comes twice"),
    "alignment": (
        file(text(b"general.alignment"), struct.pack("<II", 4, 0), settings=1), "alignment is 0"
    ),
    "version": (file(version=1), "of version 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    data, said = WRONG[case]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        gguf_file.read(tmp_path / "a.gguf")


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_array("texts", ["a", "b"])
    writer.add_array("numbers", [1, 2])
    writer.add_float64("number", 0.5)
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said, found = gguf_file.read(path)
    assert said["general.type"] == "imatrix"
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values)

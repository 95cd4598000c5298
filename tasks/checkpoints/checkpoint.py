"""checkpoint: what a checkpoint holds, told from its files' headers alone."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

from cache.files.atomic import Stamp
from cache.records.manifests import DTYPE_BYTES
from cache.records.memos import Memos
from tasks.core.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # as the safetensors library allows

LFS = b"version https://git-lfs"
LFS_BYTES = 1024  # a pointer has fewer
ZIP = b"PK\x03\x04"  # what a zip archive, and each of its members, begins with
HEADERS_VERSION = 1  # raised when what is read of a header changes
TORCH = -1  # offset of a tensor that does not lie in its file as plain bytes: torch must read it

# Both spelled as mx.load gives them back; MLX has no eight-bit floats, models unpack the bytes.
SAFETENSORS_DTYPES = {
    "BOOL": "bool_", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "C64": "complex64", "F8_E4M3": "uint8",
    "F8_E8M0": "uint8", "F8_E5M2": "uint8", "F4": "uint8",
}  # fmt: skip
TORCH_DTYPES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool_",
    "ComplexFloatStorage": "complex64",
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor as it lies in one of the checkpoint's files.

    Attributes:
        name: its name there.
        dtype: as MLX spells it.
        shape: of what is stored: one shard's part, where the checkpoint is sharded.
        file: the file's name in the checkpoint's folder.
        offset: first byte in the file, or ``TORCH``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Whole(NamedTuple):
    """A whole tensor of the model, and how it is made from stored ones.

    Attributes:
        dtype: as MLX spells it.
        shape: when made.
        inputs: keys of stored tensors (``Checkpoint.stored``), in order.
        steps: what to do with them, see ``tasks.stages.unshard``; none for one tensor as it is.
    """

    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    steps: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read by a loader.

    Attributes:
        folder: where it lies.
        names: whose tensor names it has, ``huggingface`` or ``meta``.
        config: config.json or params.json.
        files: the other small files that tell how the model is built, text by name.
        stored: the tensors in its files, by key: the name, with ``#N`` for shard N if sharded.
        wholes: the model's tensors, by name.
        stamps: of each weight file.
        notes: what people should know, e.g. files that were left out.
        record: BLAKE3 of what the checkpoint is known by, if it is not here itself: ``folder``
            then holds its small files alone, and ``stamps`` are none.
        digests: of stored tensors, by key, as the record has them.
    """

    folder: Path
    names: str
    config: dict[str, Any]
    files: dict[str, str]
    stored: dict[str, Stored]
    wholes: dict[str, Whole]
    stamps: dict[str, Stamp]
    notes: tuple[str, ...] = field(default=())
    record: str | None = None
    digests: dict[str, str] = field(default_factory=dict)

    @cached_property
    def table(self) -> list[Any]:
        """The whole tensors as JSON: what the plan of a model depends on."""
        return [[name, w.dtype, list(w.shape)] for name, w in self.wholes.items()]


def headers(paths: Iterable[Path], memos: Memos) -> dict[str, tuple[Stamp, list[Stored]]]:
    """Read the headers of weight files, or recall them while a file's stamp stays.

    Raises:
        CheckpointError: a file is damaged, or of a kind that must not be read.
    """
    found = {}
    for path in paths:
        try:
            stamp = Stamp.of(path)
        except OSError as error:  # a link to nowhere, as a moved download cache leaves
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        question = [HEADERS_VERSION, str(path.absolute()), *stamp]
        answer = memos.get("headers", question)
        if answer is None:
            read = read_safetensors if path.suffix == ".safetensors" else read_torch
            try:
                answer = [[s.name, s.dtype, s.shape, s.offset] for s in read(path)]
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            memos.put("headers", question, answer)
        tensors = [
            Stored(sys.intern(name), sys.intern(dtype), tuple(shape), path.name, offset)
            for name, dtype, shape, offset in answer
        ]
        found[path.name] = (stamp, tensors)
    return found


def read_safetensors(path: Path) -> list[Stored]:
    """Read a safetensors file's header (https://github.com/huggingface/safetensors).

    Raises:
        CheckpointError: it is truncated, corrupt, or holds a dtype that MLX has not.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"its header should have {length:,} bytes, the file has {size:,}")
        raw = file.read(length)
    begin = 8 + length
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = []
        filled = 0  # as the format asks: one tensor after the other, nothing between or after
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if start != filled:
                raise _damaged(path, f"{name} begins at byte {start:,} of the data, not {filled:,}")
            filled = end
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{path}: {name} has dtype {entry['dtype']}, which MLX does not have. "
                    "Convert the checkpoint to one that it has: bfloat16, float16, float32."
                )
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            shape = tuple(entry["shape"])
            if entry["dtype"] == "F4":  # two to a byte
                shape = (*shape[:-1], shape[-1] // 2)
            stored = Stored(name, dtype, _sizes(shape), path.name, begin + start)
            if stored.nbytes != end - start:
                raise _damaged(path, f"{name} has {end - start:,} bytes for shape {shape}")
            tensors.append(stored)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON of that format ({error!r})") from error
    if begin + filled != size:
        raise _damaged(path, f"its tensors end at byte {begin + filled:,}, the file at {size:,}")
    order = {name: number for number, name in enumerate(header)}
    return sorted(tensors, key=lambda tensor: order[tensor.name])


def read_torch(path: Path) -> list[Stored]:
    """Read where the tensors of a ``torch.save`` file lie.

    The usual file, a zip archive of uncompressed storages, is read here without torch, whose
    import takes longer than most layers; nothing in its pickle is called but three stand-ins.
    Anything else is left to ``torch.load(weights_only=True)``.

    Raises:
        CheckpointError: it is damaged, or wants to run code.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != ZIP:
        return _read_with_torch(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_zip(path, archive)
    except (CheckpointError, OSError):
        raise
    except _NotPlain:
        return _read_with_torch(path)
    except Exception as error:  # whatever a damaged archive or pickle leads to
        raise _damaged(path, _cause(error)) from error


class _NotPlain(Exception):
    """The file is not the plain kind that is read here."""


class _Tensor(NamedTuple):
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # in the storage, elements
    plain: bool  # row-major, nothing between


def _read_zip(path: Path, archive: zipfile.ZipFile) -> list[Stored]:
    members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
    if "data.pkl" not in members:
        raise _damaged(path, "a zip archive without data.pkl")
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise _NotPlain
    state = _Unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
    if not isinstance(state, dict) or not all(isinstance(t, _Tensor) for t in state.values()):
        raise _NotPlain
    starts: dict[str, int] = {}
    tensors = []
    with path.open("rb") as file:
        for name, tensor in state.items():
            info = members[f"data/{tensor.key}"]
            if tensor.key not in starts:
                starts[tensor.key] = _storage_start(path, file, info)
            start = tensor.offset * DTYPE_BYTES[tensor.dtype]
            plain = tensor.plain and info.compress_type == zipfile.ZIP_STORED
            offset = starts[tensor.key] + start if plain else TORCH
            stored = Stored(str(name), tensor.dtype, tensor.shape, path.name, offset)
            if plain and not 0 <= start <= info.file_size - stored.nbytes:
                raise _damaged(path, f"{name} reaches past the end of its storage")
            tensors.append(stored)
    return tensors


def _storage_start(path: Path, file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a member of the archive begin."""
    file.seek(info.header_offset)
    local = file.read(30)  # the local header has its own lengths of name and extra
    lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    start = info.header_offset + 30 + sum(lengths)
    if local[:4] != ZIP or start + info.compress_size > path.stat().st_size:
        raise _damaged(path, f"{info.filename} is not where the archive says")
    return start


def _sizes(shape: Iterable[Any]) -> tuple[int, ...]:
    """Return a shape; raise ValueError for what is none."""
    shape = tuple(shape)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {shape}")
    return shape


class _Unpickler(pickle.Unpickler):
    """Unpickles a state dict without running anything that the file names."""

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, key, _location, _count = pid
        if kind != "storage":
            raise _NotPlain
        return storage, key

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) not in known:
            raise _NotPlain(f"{module}.{name}")
        return known[module, name]


def _rebuild_tensor(
    storage: tuple[str, str], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _Tensor:
    expected, step = [], 1
    for size in reversed(shape):
        expected.append(step)
        step *= size
    contiguous = all(
        size <= 1 or have == want
        for size, have, want in zip(shape, stride, reversed(expected), strict=True)
    )
    return _Tensor(storage[1], storage[0], _sizes(shape), offset, contiguous)


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


def _read_with_torch(path: Path) -> list[Stored]:
    tensors = []
    for name, tensor in load_with_torch(path).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtype = {"bool": "bool_"}.get(dtype, dtype)
        if str(tensor.layout) != "torch.strided":
            dtype = f"{dtype} ({tensor.layout})"
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{path}: {name} has dtype {dtype}, which MLX does not have. "
                "Convert the checkpoint to one that it has: bfloat16, float16, float32."
            )
        tensors.append(Stored(name, dtype, tuple(tensor.shape), path.name, TORCH))
    return tensors


def load_with_torch(path: Path) -> dict[str, Any]:
    """Load a ``torch.save`` file's tensors, by name.

    Raises:
        CheckpointError: it is damaged, holds no tensors, or wants to run code.
    """
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of how the file was once written
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if not refused:
            raise _damaged(path, "it is no plain pickle of tensors, all that is read") from error
        raise CheckpointError(
            f"{path} is refused: its pickle asks for more than tensors ({refused[1]}), which would "
            "run its author's code on this machine; nothing of it was run. Get the checkpoint as "
            "safetensors, or save its state_dict alone."
        ) from error
    except Exception as error:  # whatever a damaged file leads to
        raise _damaged(path, _cause(error)) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of tensors.")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} is no plain dict of tensors: {name!r} is a {type(value).__name__}. "
                "Save the model's state_dict alone."
            )
    return {str(name): value for name, value in state.items()}


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_pointer(path: Path) -> bool:
    """Tell whether a file is a Git LFS pointer, which stands for one that was not fetched.

    Weights are not opened for it: a pointer is smaller (git-lfs, docs/spec.md).
    """
    if path.stat().st_size >= LFS_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _damaged(path: Path, fact: str) -> CheckpointError:
    if is_pointer(path):
        return CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself. Run git lfs pull in its folder."
        )
    return CheckpointError(f"{path} is damaged or incomplete: {fact}. Fetch it again.")

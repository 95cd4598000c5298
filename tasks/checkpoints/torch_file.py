"""torch_file: where the tensors of a file by ``torch.save`` lie, by its pickle, never run."""

from __future__ import annotations

import errno
import io
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from cache.records.manifests import DTYPE_BYTES
from tasks.checkpoints.small_files import damaged
from tasks.checkpoints.stored import TORCH, Stored, WeightFile, checked_name, checked_shape
from tasks.core import pytorch
from tasks.core.errors import CheckpointError

SUFFIXES: tuple[str, ...] = (".pth", ".bin")
MAX_PICKLE_BYTES = 256 << 20  # of the largest checkpoints a shard's pickle has under one MiB
MAX_EXPANSION = 4  # times the file's size: torch packs nothing, and tensors may share bytes
SLACK_BYTES = 1 << 20
MAX_DEPTH = 100  # of values within values; a state dict has six
MAX_VALUES = 20_000_000  # written out, with what is repeated
LEGACY_PICKLES = 5  # of a file older than torch 1.6, one after the other
ZIP = b"PK\x03\x04"  # what a zip archive, and each of its members, begins with
ALIGNMENT = 64  # of storages in an archive by torch
DESCRIBED = 8  # flag of a member whose sizes stand behind its bytes


TORCH_DTYPES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool_",
    "ComplexFloatStorage": "complex64",
}  # fmt: skip


def read(path: WeightFile) -> list[Stored]:
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
        _check_legacy(path)
        return _read_with_torch(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _read_zip(path, archive)
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # as of a place before the file's first byte
            raise
        raise damaged(path, "its directory names places that it does not have") from error
    except _NotPlain:
        return _read_with_torch(path)
    except Exception as error:  # whatever a damaged archive or pickle leads to
        raise damaged(path, _cause(error)) from error


class _NotPlain(Exception):
    """The file is not the plain kind that is read here."""


class _Tensor(NamedTuple):
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # in the storage, elements
    plain: bool  # row-major, nothing between


def _read_zip(path: WeightFile, archive: zipfile.ZipFile) -> list[Stored]:
    members = _members(path, archive)
    _check_size(path, sum(info.file_size for info in archive.infolist()))
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise _NotPlain
    data = io.BytesIO(archive.read(members["data.pkl"]))
    check_pickle(path, data)
    data.seek(0)
    state = _Unpickler(data).load()
    ends = _ends(archive)
    if not isinstance(state, dict) or not all(isinstance(t, _Tensor) for t in state.values()):
        raise _NotPlain
    starts: dict[str, int] = {}
    tensors = []
    with path.open("rb") as file:
        for name, tensor in state.items():
            info = members[f"data/{tensor.key}"]
            if tensor.key not in starts:
                starts[tensor.key] = _storage_start(path, file, info, ends[info.header_offset])
            start = tensor.offset * DTYPE_BYTES[tensor.dtype]
            plain = tensor.plain and info.compress_type == zipfile.ZIP_STORED
            offset = starts[tensor.key] + start if plain else TORCH
            stored = Stored(checked_name(str(name)), tensor.dtype, tensor.shape, path.name, offset)
            if plain and not 0 <= start <= info.file_size - stored.nbytes:
                raise damaged(path, f"{name} reaches past the end of its storage")
            tensors.append(stored)
    _check_expansion(path, tensors)
    if any(stored.offset == TORCH for stored in tensors):
        if not isinstance(path, Path):
            raise _NotPlain
        _torch(path)  # wanted as they are extracted: an error before any work
    return tensors


def _check_expansion(path: WeightFile, tensors: Iterable[Stored]) -> None:
    _check_size(path, sum(stored.nbytes for stored in tensors if stored.offset == TORCH))


def _check_size(path: WeightFile, nbytes: int) -> None:
    """Refuse a file of a few bytes that would be gigabytes: packed, or one number over and over.

    Raises:
        CheckpointError: it is one.
    """
    size = path.stat().st_size
    if nbytes > MAX_EXPANSION * size + SLACK_BYTES:
        raise damaged(path, f"its {size:,} bytes would be {nbytes:,}")


def _members(path: WeightFile, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's members by name, without the folder that torch puts them in."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.split("/", 1)[-1]
        if members.setdefault(name, info) is not info:  # torch reads the first, others the last
            raise damaged(path, f"{name} is in the archive twice")
    if "data.pkl" not in members:
        raise damaged(path, "a zip archive without data.pkl")
    for name in ("data.pkl", "byteorder"):
        if name in members and members[name].file_size > MAX_PICKLE_BYTES:
            size = members[name].file_size
            raise damaged(path, f"{name} has {size:,} bytes, over {MAX_PICKLE_BYTES:,}")
    return members


def _ends(archive: zipfile.ZipFile) -> dict[int, int]:
    """Return where each member ends, with all that belongs to it, by where it begins."""
    begins = sorted(info.header_offset for info in archive.infolist())
    return dict(zip(begins, [*begins[1:], archive.start_dir], strict=True))


def _storage_start(path: WeightFile, file: IO[bytes], info: zipfile.ZipInfo, end: int) -> int:
    """Return where the bytes of a member of the archive begin, which ends at ``end``."""
    if not isinstance(path, Path):  # a look at each local header would be a request
        described = 0 if not info.flag_bits & DESCRIBED else 24 if info.compress_size >> 32 else 16
        start = end - info.compress_size - described
        gap = start - (info.header_offset + 30 + len(info.filename.encode()))
        if gap == 0 or (start % ALIGNMENT == 0 and 0 < gap < 2 * ALIGNMENT):
            return start  # it fills what is between its name and the next member, but for padding
    file.seek(info.header_offset)
    local = file.read(30)  # the local header has its own lengths of name and extra
    lengths = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    start = info.header_offset + 30 + sum(lengths)
    if local[:4] != ZIP or start + info.compress_size > path.stat().st_size:
        raise damaged(path, f"{info.filename} is not where the archive says")
    return start


def check_pickle(path: WeightFile, data: IO[bytes]) -> None:
    """Refuse a pickle of values that take more memory, time or stack than a checkpoint's do.

    A few hundred bytes can stand for 2**100 values, each within another, or ask for a memo of
    gigabytes. So it is followed without making a value: of each, how deep it is and how many values
    it would be written out.

    Raises:
        CheckpointError: it is such.
        Exception: it is no pickle.
    """
    import pickletools  # 4 ms, wanted for .pth files alone

    stack: list[tuple[int, int] | None] = []  # (depth, values), None for a mark
    memo: dict[int, tuple[int, int]] = {}
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            index = len(memo) if argument is None else int(argument)
            if index > len(memo):  # every pickler counts up
                raise damaged(path, f"its pickle remembers value {index:,} after {len(memo):,}")
            memo[index] = stack[-1] or (0, 0)
            continue
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument or 0)])
            continue
        taken: list[tuple[int, int]] = []
        for kind in reversed(opcode.stack_before):
            if kind is pickletools.markobject:
                continue
            if kind is pickletools.stackslice:
                while (value := stack.pop()) is not None:
                    taken.append(value)
            else:
                taken.append(stack.pop() or (0, 0))
        depth = 1 + max((depth for depth, _ in taken), default=0)
        values = 1 + sum(values for _, values in taken)
        if depth > MAX_DEPTH or values > MAX_VALUES:
            raise damaged(
                path, f"its pickle has {values:,} values, {depth} within each other: no weights do"
            )
        pushed = opcode.stack_after
        stack += [None if kind is pickletools.markobject else (depth, values) for kind in pushed]


def _check_legacy(path: WeightFile) -> None:
    """Check the pickles that a file older than torch 1.6 begins with."""
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            try:
                check_pickle(path, file)
            except CheckpointError:
                raise
            except Exception:  # no such file: torch says what is wrong with it
                return


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
    shape, expected, step = checked_shape(shape), [], 1
    for size in reversed(shape):
        expected.append(step)
        step *= size
    contiguous = all(
        size <= 1 or have == want
        for size, have, want in zip(shape, stride, reversed(expected), strict=True)
    )
    return _Tensor(storage[1], storage[0], shape, offset, contiguous)


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


def _read_with_torch(path: WeightFile) -> list[Stored]:
    if not isinstance(path, Path):
        raise CheckpointError(
            f"{path} is not the usual file of torch.save (a zip archive of plain tensors): only "
            "torch can read it, and that as a file of this machine. Take the model's safetensors, "
            "or download it into a folder and name that."
        )
    tensors = []
    for name, tensor in load_with_torch(path).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtype = {"bool": "bool_"}.get(dtype, dtype)
        if str(tensor.layout) != "torch.strided" or tensor.is_nested:
            dtype = f"{dtype} ({'nested' if tensor.is_nested else tensor.layout})"
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{path}: {name} has dtype {dtype}, which MLX does not have. "
                "Convert the checkpoint to one that it has: bfloat16, float16, float32."
            )
        try:
            stored = Stored(checked_name(name), dtype, tuple(tensor.shape), path.name, TORCH)
        except ValueError as error:
            raise damaged(path, f"it has {error}") from error
        tensors.append(stored)
    _check_expansion(path, tensors)
    return tensors


def _torch(path: Path) -> Any:
    try:
        return pytorch.module()
    except ImportError as error:
        raise CheckpointError(
            f"{path} is not the usual file of torch.save (a zip archive of plain tensors): only "
            "torch can read it. Install that: pip install 'mlx-make[torch]'"
        ) from error


def load_with_torch(path: Path) -> dict[str, Any]:
    """Load a ``torch.save`` file's tensors, by name.

    Raises:
        CheckpointError: it is damaged, holds no tensors, or wants to run code; or torch is not
            installed.
    """
    torch = _torch(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of how the file was once written
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if not refused:
            raise damaged(path, "it is no plain pickle of tensors, all that is read") from error
        raise CheckpointError(
            f"{path} is refused: its pickle asks for more than tensors ({refused[1]}), which would "
            "run its author's code on this machine; nothing of it was run. Get the checkpoint as "
            "safetensors, or save its state_dict alone."
        ) from error
    except Exception as error:  # whatever a damaged file leads to
        if not zipfile.is_zipfile(path):  # torch advises to trust it, of bytes that are no pickle
            raise damaged(path, "it holds nothing that torch.save wrote") from error
        raise damaged(path, _cause(error)) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of tensors.")
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise CheckpointError(
                f"{path}: {name!r} is a meta tensor, a shape without weights: the model was saved "
                "before they were loaded. Save it once they are."
            )
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} is no plain dict of tensors: {name!r} is a {type(value).__name__}. "
                "Save the model's state_dict alone."
            )
    return {str(name): value for name, value in state.items()}


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

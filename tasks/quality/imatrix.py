"""imatrix: llama.cpp's importance matrices: GGUF files of what each weight's channels are given.

Of a weight, ``NAME.in_sum2`` is the sum over tokens of each input channel's squares, (matrices,
channels), and ``NAME.counts`` how many tokens that were, (matrices, 1): experts by themselves.
Names are llama.cpp's (``blk.0.attn_q.weight``), as the package ``gguf`` maps them, per
architecture. Format: https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cache.digest import digest_file, digest_record
from cache.records.memos import Memos
from tasks.checkpoints.small_files import check_regular
from tasks.core.errors import BuildError, CheckpointError
from tasks.layouts.model import Model, Module
from tasks.quality import gguf_file

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1  # of what is remembered of names
SUMS, COUNTS = ".in_sum2", ".counts"
EXTRA = "gguf"
KIND = "imatrix"
_NAMED = "imatrix of [quality] names it: mend it, or name another."


class Entry(NamedTuple):
    """What the channels of a weight are given.

    Attributes:
        sums: of squares, float32: (matrices, channels).
        counts: of tokens, float32: (matrices,).
    """

    sums: np.ndarray
    counts: np.ndarray


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise _no_gguf() from error
    return gguf


def _version() -> str:
    """Return the package's version, without importing it: what it names may be known already."""
    try:
        return metadata.version("gguf")
    except metadata.PackageNotFoundError as error:
        raise _no_gguf() from error


def _no_gguf() -> BuildError:
    return BuildError(
        "Importance matrices are read and written by the package gguf, which is not installed: "
        f"pip install 'mlx-make[{EXTRA}]'"
    )


def names(memos: Memos, model: Model) -> dict[str, str]:
    """Return what llama.cpp calls the weights of a model's modules, by path, as far as it does.

    Of architectures that it knows by a name like the model's own, or else of that which has names
    for the most modules. They are asked once: ``memos`` keeps the answer.
    """
    modules = [module for module in model.modules if module.quantized_names is not None]
    called = {module.path: _called(model, module) for module in modules}
    kind = re.sub(r"[_-]|text$", "", str(model.config.get("model_type", "")).lower())
    question = [SCHEMA, _version(), kind, digest_record([*called.items()])]
    answer = memos.get("llama names", question, dict[str, str])
    if answer is None:
        answer = _names(kind, called)
        memos.put("llama names", question, answer)
    return answer


def _names(kind: str, called: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the same of a kind of model, and of what its modules' weights may be called."""
    gguf = _gguf()
    numbers = [int(n) for path in called for n in re.findall(r"\.(\d+)\.", f".{path}.")]
    blocks = max(numbers, default=0) + 1
    known = {name.replace("-", "").replace("_", ""): a for a, name in gguf.MODEL_ARCH_NAMES.items()}
    best: dict[str, str] = {}
    for arch in [known[kind]] if kind in known else known.values():
        table = gguf.get_tensor_name_map(arch, blocks)
        found = {}
        for path, words in called.items():
            name = next(filter(None, (table.get_name(w, (".weight",)) for w in words)), None)
            if name is not None:
                found[path] = name
        best = max(best, found, key=len)
    return best


def _called(model: Model, module: Module) -> list[str]:
    """Return what a module's weight may be called in llama.cpp's tables: theirs, then ours."""
    weight = f"{module.path}.weight" if module.path else "weight"
    inputs = [key.partition("#")[0] for key in model.parameters[weight].inputs]
    theirs = {re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in inputs}
    named = [*theirs] if len(theirs) == 1 else []
    return [*named, weight, weight.replace(".switch_mlp.", ".experts.")]


def write(
    path: Path, entries: Mapping[str, Entry], texts: Sequence[str], chunks: int, chunk_size: int
) -> None:
    """Write a file.

    Args:
        path: the file's.
        entries: by llama.cpp's names.
        texts: what they were made of.
        chunks: how many sequences that was.
        chunk_size: tokens of each.
    """
    gguf = _gguf()

    keys = gguf.Keys
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        there = Path(folder) / path.name
        # It is no model, and has no architecture.
        writer = type("Writer", (gguf.GGUFWriter,), {"add_architecture": lambda _: None})(there, "")
        writer.add_type(KIND)
        writer.add_array(keys.IMatrix.DATASETS, [*texts])
        writer.add_uint32(keys.IMatrix.CHUNK_COUNT, chunks)
        writer.add_uint32(keys.IMatrix.CHUNK_SIZE, chunk_size)
        for name, entry in entries.items():
            writer.add_tensor(f"{name}{SUMS}", entry.sums)
            writer.add_tensor(f"{name}{COUNTS}", entry.counts.reshape(-1, 1))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        there.replace(path)  # as a whole, or not at all


def content(path: Path) -> str:
    """Return a file's digest.

    Raises:
        BuildError: it cannot be read.
    """
    _check_file(path)
    try:
        return digest_file(path)
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error


def _check_file(path: Path) -> None:
    """Refuse a pipe or a device, of which there may be no end, and what is larger than any such.

    Raises:
        BuildError: it is one, or cannot be read.
    """
    try:
        check_regular(path)
        size = path.stat().st_size
    except CheckpointError as error:  # which begins with the path
        raise BuildError(f"{error} {_NAMED}") from error
    if size > gguf_file.MAX_BYTES:
        raise _unreadable(path, f"it has {size:,} bytes, over {gguf_file.MAX_BYTES:,}")


def _unreadable(path: Path, cause: str) -> BuildError:
    return BuildError(f"{path} cannot be read: {cause}. {_NAMED}")


def read(path: Path) -> dict[str, Entry]:
    """Return what a file has of weights, by llama.cpp's names.

    Raises:
        BuildError: it is no importance matrix, or damaged.
    """
    _check_file(path)
    try:
        said, tensors = gguf_file.read(path)
        if (kind := said.get("general.type")) != KIND:
            raise ValueError(f"general.type is {kind!r}")
        entries = {}
        for name, sums in tensors.items():
            if name.endswith(SUMS):
                counts = tensors[name.removesuffix(SUMS) + COUNTS]
                entry = Entry(sums.reshape(-1, sums.shape[-1]), counts.reshape(-1))
                _check(name, entry)
                entries[name.removesuffix(SUMS)] = entry
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    except (ValueError, KeyError, IndexError) as error:
        raise BuildError(
            f"{path}, which imatrix of [quality] names, is no importance matrix of llama.cpp's as "
            f"GGUF: {error}. Those of old (.dat) its own tools convert."
        ) from error
    return entries


def _check(name: str, entry: Entry) -> None:
    import numpy as np

    if len(entry.sums) != len(entry.counts):
        raise ValueError(f"{name} has {len(entry.sums)} matrices, and {len(entry.counts)} counts")
    if not all(np.isfinite(each).all() and (each >= 0).all() for each in entry):
        raise ValueError(f"{name} has numbers that are no sums of squares")


def mean_squares(entry: Entry) -> np.ndarray:
    """Return the mean of each channel's squares, float32: 0 of experts that were given nothing."""
    import numpy as np

    means = entry.sums / np.maximum(entry.counts, 1)[:, None]
    return np.asarray(means, np.float32)

"""headers: reads the headers of weight files, each by its format, and remembers them.

A new format is one module and one name in ``FILE_FORMATS``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from cache.files.stamp import Stamp, changed_at
from cache.records.memos import Memos
from tasks.checkpoints import safetensors_file, torch_file
from tasks.checkpoints.small_files import check_regular, unreadable
from tasks.checkpoints.stored import Stored, WeightFile
from tasks.core.errors import CheckpointError

HEADERS_VERSION = 2  # raised when what is read of a header changes
KIND = "headers"  # of memos
_Answer = list[tuple[str, str, tuple[int, ...], int]]  # name, dtype, shape, offset


class FileFormat(Protocol):
    """What the module of a format has.

    Attributes:
        SUFFIXES: what the names of its files end with.
    """

    SUFFIXES: tuple[str, ...]

    def read(self, path: WeightFile) -> list[Stored]:
        """Return a file's tensors, in its own order, without their data.

        Raises:
            CheckpointError: it is damaged, or of a kind that must not be read.
        """


FILE_FORMATS: tuple[FileFormat, ...] = (safetensors_file, torch_file)


def headers(paths: Iterable[Path], memos: Memos) -> dict[str, tuple[Stamp, list[Stored]]]:
    """Read the headers of weight files, or recall them while a file's stamp stays.

    Raises:
        CheckpointError: a file is damaged, or of a kind that must not be read.
    """
    tables = {}
    for path in paths:
        check_regular(path)
        try:
            stamp = Stamp.of(path)
            identity = _identity(path)
        except OSError as error:  # a link to nowhere, as a moved download cache leaves
            raise unreadable(path, error) from error
        known = recall(path.name, identity, memos)
        tables[path.name] = stamp, read(path, identity, memos) if known is None else known
    return tables


def forget(paths: Iterable[Path], memos: Memos) -> None:
    """Remember nothing of files as they are now."""
    for path in paths:
        memos.forget(KIND, [HEADERS_VERSION, *_identity(path)])


def _identity(path: Path) -> list[Any]:
    return [str(path.absolute()), *Stamp.of(path), changed_at(path)]


def recall(name: str, identity: list[Any], memos: Memos) -> list[Stored] | None:
    """Return the tensors of a weight file whose header was read before, or None.

    Args:
        name: the file's.
        identity: JSON that is another wherever the header may be.
        memos: where headers are remembered.
    """
    answer = memos.get(KIND, [HEADERS_VERSION, *identity], _Answer)
    if answer is None:
        return None
    return [
        Stored(sys.intern(tensor), sys.intern(dtype), shape, name, offset)
        for tensor, dtype, shape, offset in answer
    ]


def read(path: WeightFile, identity: list[Any], memos: Memos) -> list[Stored]:
    """Read a weight file's header, and remember it.

    Args:
        path: the file.
        identity: as for ``recall``.
        memos: where headers are remembered.

    Raises:
        CheckpointError: it is damaged, or of a kind that must not be read.
    """
    formats = (f for f in FILE_FORMATS if path.suffix in f.SUFFIXES)
    file_format = next(formats, torch_file)  # which finds out itself what it is
    try:
        tensors = file_format.read(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    answer = [(s.name, s.dtype, s.shape, s.offset) for s in tensors]
    memos.put(KIND, [HEADERS_VERSION, *identity], answer)
    return tensors

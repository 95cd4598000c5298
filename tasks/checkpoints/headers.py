"""headers: ."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from cache.files.stamp import Stamp
from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Stored
from tasks.checkpoints.safetensors_file import read_safetensors
from tasks.checkpoints.torch_file import read_torch
from tasks.core.errors import CheckpointError

HEADERS_VERSION = 1  # raised when what is read of a header changes


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

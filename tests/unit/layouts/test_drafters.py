"""What wrote a drafter's tensors is asked of its own files, and never guessed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.record import RecordSource
from tasks.checkpoints.stored import Stored
from tasks.core.errors import CheckpointError
from tasks.layouts import mlx_vlm_mtp

NORM, FILE = "mtp.norm.weight", "model.safetensors"


class Folder(Struct):
    """A folder of a repository at its one commit."""

    location: str
    kind: str
    available: bool = True
    identity: str = "commit"
    unreachable: None = None

    def read(self, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        header = json.dumps({"__metadata__": {"format": self.kind}}).encode()
        yield (len(header).to_bytes(8, "little") + header)[start : start + nbytes]


def _format(source: Any, memos: Memos, file: str = FILE) -> str:
    stored = {NORM: Stored(NORM, "float32", (4,), file, 100)}
    tensors = {NORM: LogicalTensor("float32", (4,), (NORM,))}
    checkpoint = Checkpoint(source, "huggingface", {}, {}, stored, tensors, {})
    return mlx_vlm_mtp.written_by(checkpoint, memos)


def test_two_folders_of_one_commit_share_no_answer(tmp_path: Path) -> None:
    memos = Memos(tmp_path)
    assert _format(Folder("org/m/pt", "pt"), memos) == ""
    assert _format(Folder("org/m/mlx", "mlx"), memos) == "mlx"
    away = Folder("org/m/mlx", "", available=False)  # what was said before is known
    assert _format(away, memos) == "mlx"


def test_a_record_alone_is_refused(tmp_path: Path) -> None:
    record = RecordSource(tmp_path / "files", "digest", {})
    with pytest.raises(CheckpointError, match=r"said by model.safetensors alone.* Get the checkp"):
        _format(record, Memos(tmp_path))
    assert _format(record, Memos(tmp_path), "pytorch_model.bin") == ""  # MLX writes none

"""What mlx_audio.convert reads or copies of weight files, and is not read here, is told."""

from pathlib import Path

import pytest

from cache.records.memos import Memos
from support import checkpoints
from tasks.checkpoints import loaders
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.folder import FolderSource
from tasks.core.errors import CheckpointError
from tasks.layouts import leftovers, mlx_audio


def test_weight_files_of_which_mlx_audio_reads_others(tmp_path: Path) -> None:
    folder = checkpoints.make("llama", tmp_path / "checkpoint")
    weights = min(folder.glob("*.safetensors"))

    def read() -> Checkpoint:
        return loaders.read(FolderSource(folder), None, Memos(tmp_path / "memos"))

    assert leftovers.of_weights(read(), "mlx_audio.convert") == []
    (folder / "voices.safetensors").write_bytes(weights.read_bytes())
    (note,) = leftovers.of_weights(read(), "mlx_audio.convert")
    assert "reads or copies (voices.safetensors)" in note
    mlx_audio._refuse_two_kinds(read())
    (folder / "voices.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"has consolidated\.safetensors, which .* alone"):
        mlx_audio.model(read(), Memos(tmp_path / "memos"))
    for path in folder.glob("model*"):
        path.unlink()
    mlx_audio._refuse_two_kinds(read())

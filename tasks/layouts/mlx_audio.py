"""mlx_audio: the layout that mlx_audio.convert writes, for what speaks, hears and makes music.

The tokenizer's files are the author's own, as in layout mlx-lm; so are the processors'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError
from tasks.core.spec import Target
from tasks.core.text import listed
from tasks.layouts import leftovers, mlx_lm
from tasks.layouts.libraries import MLX_AUDIO
from tasks.layouts.model import Model
from tasks.layouts.safetensors_format import SAFETENSORS

weight_format = SAFETENSORS
default_shard_bytes = 5 << 30  # the peer's own limit
loaded = "model*.safetensors"
loading = """\
from mlx_audio.utils import load_model

model = load_model("{model}")
"""
pipeline_tag = ""  # it may speak, or hear
# What makes sounds ready, and what models read beside their tokenizers.
BESIDE = ("*processor*.json", "normalizer.json", "*.yaml", "*.wav")
COPIED = (".json", ".pt", ".txt", ".model", ".tiktoken")  # what the peer copies, whatever it is
CONSOLIDATED = "consolidated"  # as names of Mistral's own weight files begin
DTYPES = ("float16", "bfloat16", "float32")  # that the peer takes over from config.json


def model(checkpoint: Checkpoint, memos: Memos) -> Model:
    """Return the model by mlx-audio's names.

    Raises:
        CheckpointError: mlx-audio has no class for it, or would take one of the checkpoint's own,
            or other weight files.
    """
    _refuse_two_kinds(checkpoint)
    made = mlx_lm.model(checkpoint, memos, MLX_AUDIO, BESIDE)
    notes = leftovers.of_convert(checkpoint, takes, "mlx_audio.convert", COPIED)
    notes += leftovers.of_weights(checkpoint, "mlx_audio.convert")
    return structs.replace(made, notes=(*made.notes, *notes))


def _refuse_two_kinds(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of which mlx_audio.convert reads other files than were read.

    Where there are files of Mistral's names, it takes these alone.
    """
    read, names = leftovers.weight_files(checkpoint)
    mistral = {name for name in (*read, *names) if name.startswith(CONSOLIDATED)}
    if mistral and mistral != read:
        raise CheckpointError(
            f"{checkpoint.source.location} has {listed(sorted(mistral))}, which mlx_audio.convert "
            f"reads alone, and here {listed(sorted(read))} would be read: they may hold other "
            "tensors. Put config.json, the tokenizer's files and either kind into a folder of "
            "their own, and name that as source."
        )


shard_names = mlx_lm.shard_names
tokenizer_files = mlx_lm.tokenizer_files
programs = mlx_lm.programs


def default_dtype(checkpoint: Checkpoint, model: Model) -> str | None:
    """Return what mlx_audio.convert casts to by default: ``torch_dtype`` in config.json, if any."""
    dtype = model.config.get("torch_dtype")
    return dtype if dtype in DTYPES else None


def check(target: Target, model: Model) -> None:
    """Every setting is possible in this layout."""


config = mlx_lm.config


def takes(name: str) -> bool:
    """Tell whether the layout takes over a checkpoint's small file of that name."""
    return mlx_lm.takes(name, BESIDE)


def sources(checkpoint: Checkpoint) -> list[Path]:
    """Return the checkpoint's small files that go into the built model, as they are or changed.

    Raises:
        CheckpointError: it has neither a tokenizer nor another processor, or what must not be
            copied.
    """
    return mlx_lm.sources(checkpoint, BESIDE)


def files(
    checkpoint: Checkpoint,
    memos: Memos,
    shards: Sequence[Sequence[tuple[str, int]]],
    parameters: int,
) -> dict[str, bytes]:
    """Return the files that the layout has besides config.json and the weights."""
    return mlx_lm.files(checkpoint, memos, shards, None, BESIDE)

"""mistral: Hugging Face's config.json with Mistral's own weight files, consolidated*.safetensors.

Beside these there may be the same model by Hugging Face's names, which ``transformers`` reads.
"""

from __future__ import annotations

from cache.records.memos import Memos
from tasks.checkpoints import transformers
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.source import ReadableSource
from tasks.core.errors import CheckpointError
from tasks.core.text import listed, some

WEIGHTS: tuple[str, ...] = (transformers.MISTRAL,)
SMALL_FILES = transformers.SMALL_FILES
HOLDS = f"{transformers.MISTRAL} with config.json (Mistral)"
ROW = r"consolidated-(\d+)-of-(\d+)\.safetensors"


def fits(source: ReadableSource) -> bool:
    """Tell whether a source has weights of no other names."""
    return transformers.is_mistral(source)


def read(source: ReadableSource, memos: Memos) -> Checkpoint:
    """Read the checkpoint's headers.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return transformers.read_files(source, memos, _weight_files)


def _weight_files(source: ReadableSource) -> transformers.WeightFiles:
    names = source.names(transformers.MISTRAL)
    if not names:
        raise CheckpointError(
            f"{source.location} has no {transformers.MISTRAL} (it has "
            f"{some(source.names('*'), 5)}). Drop loader: it is then told from what the folder "
            "holds."
        )
    transformers.refuse_gaps(source.location, names, ROW)
    beside = [name for name in source.names("*.safetensors") if name not in names]
    note = f"{listed(beside)} left out: {transformers.MISTRAL} alone is read"
    return names, {}, (note,) if beside else ()

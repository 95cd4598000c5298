"""registry: the layouts. A new one is a module and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from cache.records.memos import Memos
from tasks.checkpoints import loaders
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.small_files import matches
from tasks.core.spec import Target
from tasks.layouts import mlx_audio, mlx_embeddings, mlx_examples, mlx_lm, mlx_vlm, mlx_vlm_mtp
from tasks.layouts.model import Model
from tasks.layouts.weight_file import WeightFormat


class Layout(Protocol):
    """How a built model's files are laid out.

    Attributes:
        weight_format: what its weight files are written as.
        default_shard_bytes: largest size of a weight file, where models.toml does not say it.
        loaded: a shell pattern: what lies in the folder by such a name, clients load.
        loading: the Python code that loads ``{model}``, for its card; "", it has no card.
        pipeline_tag: what its card says that such a model is for, by the hub's words; "", nothing.
    """

    weight_format: WeightFormat
    default_shard_bytes: int
    loaded: str
    loading: str
    pipeline_tag: str

    def model(self, checkpoint: Checkpoint, memos: Memos) -> Model:
        """Return the model by the layout's names.

        Raises:
            CheckpointError: the layout has no place for such a model.
        """

    def default_dtype(self, checkpoint: Checkpoint, model: Model) -> str | None:
        """Return what floating tensors are cast to if models.toml does not say; None: nothing."""

    def check(self, target: Target, model: Model) -> None:
        """Refuse settings that the layout cannot express.

        Raises:
            ConfigError: there are such.
        """

    def config(
        self, target: Target, model: Model, quantization: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return config.json.

        Raises:
            ConfigError: what reads the layout could not load such a model.
        """

    def takes(self, name: str) -> bool:
        """Tell whether it takes over a checkpoint's small file of that name, as it is or not."""

    def sources(self, checkpoint: Checkpoint) -> list[Path]:
        """Return the checkpoint's small files that go into the built model, changed or not.

        Raises:
            CheckpointError: one is missing without which nothing can load the model.
        """

    def files(
        self,
        checkpoint: Checkpoint,
        memos: Memos,
        shards: Sequence[Sequence[tuple[str, int]]],
        parameters: int,
    ) -> dict[str, bytes]:
        """Return the small files besides config.json, by name.

        Args:
            checkpoint: what the model is built from.
            memos: where a tokenizer is remembered that had to be made.
            shards: the tensors of each weight file: name and size in bytes.
            parameters: weights of the model, as mlx-lm counts them.
        """

    def tokenizer_files(self, checkpoint: Checkpoint, memos: Memos) -> dict[str, bytes]:
        """Return what transformers makes the built model's tokenizer of, by its own file names.

        None where it cannot. As ``files`` otherwise.
        """

    def programs(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Return the versions of what makes any of ``files``, by name; none that copy alone."""

    def shard_names(self, count: int) -> list[str]:
        """Return the names of ``count`` weight files, in order."""


LAYOUTS: dict[str, Layout] = {
    "mlx-lm": mlx_lm,
    "mlx-examples": mlx_examples,
    "mlx-vlm": mlx_vlm,
    "mlx-vlm-mtp": mlx_vlm_mtp,
    "mlx-embeddings": mlx_embeddings,
    "mlx-audio": mlx_audio,
}


def is_read(name: str) -> bool:
    """Tell whether a loader or a layout reads a checkpoint's small file of that name."""
    return any(matches(name, loader.SMALL_FILES) for loader in loaders.LOADERS.values()) or any(
        layout.takes(name) for layout in LAYOUTS.values()
    )


def is_loaded(name: str) -> bool:
    """Tell whether clients of any layout load what lies in a built folder by that name."""
    return "/" not in name and any(fnmatchcase(name, each.loaded) for each in LAYOUTS.values())

"""loaders: each reads one kind of checkpoint. A new one is one module and one line here."""

from __future__ import annotations

import os
from typing import Protocol

from cache.records.memos import Memos
from tasks.checkpoints import llama, mistral, transformers
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.hub_name import hint
from tasks.checkpoints.source import ReadableSource
from tasks.core.errors import CheckpointError
from tasks.core.text import some


class Loader(Protocol):
    """What a loader's module has.

    Attributes:
        WEIGHTS: shell patterns of the weight files that it reads.
        SMALL_FILES: shell patterns of the files beside them that it reads.
        HOLDS: what it reads, for messages: the weight files, and the file beside them.
    """

    WEIGHTS: tuple[str, ...]
    SMALL_FILES: tuple[str, ...]
    HOLDS: str

    def fits(self, source: ReadableSource) -> bool:
        """Tell whether a source looks like a checkpoint of this kind."""

    def read(self, source: ReadableSource, memos: Memos) -> Checkpoint:
        """Read a checkpoint's headers and small files.

        Raises:
            CheckpointError: a file is missing or damaged.
        """


LOADERS: dict[str, Loader] = {"llama": llama, "transformers": transformers, "mistral": mistral}


def weight_patterns() -> tuple[str, ...]:
    """Return the shell patterns of all weight files, whatever the loader."""
    return tuple(pattern for loader in LOADERS.values() for pattern in loader.WEIGHTS)


def no_checkpoint(source: ReadableSource) -> str:
    """Return what there is to say of a source that is none: what is near, and what is not read."""
    depths = ("*/", "*/*/")
    configs = ("config.json", "params.json")
    found = [n for depth in depths for name in configs for n in source.names(depth + name)]
    if inner := sorted({name.rpartition("/")[0] for name in found}):
        return f" There is one in {some(inner, 3)}: name that folder."
    return f" {transformers.GGUF}" if source.names("*.gguf") else ""


def read(
    source: ReadableSource, loader: str | None, memos: Memos, *, named: str = ""
) -> Checkpoint:
    """Read a checkpoint, by the loader named or by the one that knows it.

    Args:
        source: where it is.
        loader: its name; None, the one that knows the checkpoint.
        memos: where headers are remembered.
        named: what models.toml calls the source.

    Raises:
        CheckpointError: it is missing, incomplete or damaged, or no loader knows it.
    """
    try:
        return _read(source, loader, memos, named)
    except CheckpointError as error:
        cause = source.unreachable
        if cause is None or isinstance(error, type(cause)):
            raise
        raise CheckpointError(
            f"{cause} What is on this machine of it is no whole checkpoint: {error}"
        ) from error


def _read(source: ReadableSource, loader: str | None, memos: Memos, named: str) -> Checkpoint:
    folder = source.small_files
    if not os.path.isdir(folder):  # Path.is_dir raises for a name too long
        if os.path.exists(folder):
            raise CheckpointError(
                f"source {folder} is a file. Name the folder of a checkpoint, with its config.json "
                "(or params.json) and all of its weight files."
            )
        raise CheckpointError(
            f"source {folder} does not exist. Name the checkpoint's folder{hint(named)}."
        )
    if not loader:
        fit = [name for name, module in LOADERS.items() if module.fits(source)]
        if not fit:
            names = source.names("*")
            raise CheckpointError(
                f"source {source.location} "
                + ("is empty" if not names else f"holds no checkpoint (it has {some(names, 5)})")
                + f": expected {', or '.join(module.HOLDS for module in LOADERS.values())}."
                + no_checkpoint(source)
            )
        if len(fit) > 1:
            raise CheckpointError(
                f"source {source.location} holds checkpoints of {len(fit)} kinds. Say which: "
                + " or ".join(f'loader = "{name}"' for name in fit)
            )
        loader = fit[0]
    return LOADERS[loader].read(source, memos)

"""loaders: each reads one kind of checkpoint. A new one is one module and one line here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from cache.records.memos import Memos
from tasks.checkpoints import llama, transformers
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import CheckpointError


class Loader(Protocol):
    """What a loader's module has.

    Attributes:
        WEIGHTS: patterns of the weight files that it reads.
    """

    WEIGHTS: tuple[str, ...]

    def fits(self, folder: Path) -> bool: ...
    def read(self, folder: Path, memos: Memos) -> Checkpoint: ...


LOADERS: dict[str, Loader] = {"llama": llama, "transformers": transformers}
WEIGHTS = tuple(pattern for loader in LOADERS.values() for pattern in loader.WEIGHTS)


def read(folder: Path, loader: str | None, memos: Memos) -> Checkpoint:
    """Read the checkpoint in ``folder``, by the loader named or by the one that knows it.

    Raises:
        CheckpointError: it is missing, incomplete or damaged, or no loader knows it.
    """
    if not os.path.isdir(folder):  # Path.is_dir raises for a name too long
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise CheckpointError(f"source {folder} {what}. Name the checkpoint's folder.")
    if not loader:
        fit = [name for name, module in LOADERS.items() if module.fits(folder)]
        if not fit:
            names = sorted(path.name for path in folder.iterdir())
            raise CheckpointError(
                f"source {folder} "
                + ("is empty" if not names else f"holds no checkpoint (it has {_some(names)})")
                + ": expected consolidated.NN.pth with params.json (Meta), or *.safetensors or "
                "pytorch_model*.bin with config.json (Hugging Face)."
            )
        if len(fit) > 1:
            raise CheckpointError(
                f"source {folder} holds checkpoints of {len(fit)} kinds. Say which: "
                + " or ".join(f'loader = "{name}"' for name in fit)
            )
        loader = fit[0]
    return LOADERS[loader].read(folder, memos)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""layouts: how a built model's files are laid out. A new one is one module and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.spec import Target
from tasks.layouts import mlx_examples, mlx_lm
from tasks.layouts.model import Model


class Layout(Protocol):
    """What a layout's module has; the modules say what each does."""

    FORMAT: str

    def model(self, checkpoint: Checkpoint, memos: Memos) -> Model: ...
    def default_dtype(self, checkpoint: Checkpoint, model: Model) -> str | None: ...
    def check(self, target: Target, model: Model) -> None: ...
    def config(
        self, target: Target, model: Model, quantization: dict[str, Any] | None
    ) -> dict[str, Any]: ...
    def sources(self, checkpoint: Checkpoint) -> list[Path]: ...
    def files(
        self,
        checkpoint: Checkpoint,
        memos: Memos,
        shards: Sequence[Sequence[tuple[str, int]]],
        parameters: int,
    ) -> dict[str, bytes]: ...
    def shard_names(self, count: int) -> list[str]: ...


LAYOUTS: dict[str, Layout] = {"mlx-lm": mlx_lm, "mlx-examples": mlx_examples}

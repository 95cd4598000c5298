"""checkpoint: what a checkpoint holds, known from its files' headers and small files alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cache.blobs import Part
from cache.files.stamp import Stamp, changed_at
from tasks.checkpoints.source import Source
from tasks.checkpoints.stored import TORCH, Stored


class LogicalTensor(NamedTuple):
    """A tensor of the model, and how it is made from stored ones: a sharded one from its parts.

    Attributes:
        dtype: as MLX spells it.
        shape: when made.
        inputs: keys of stored tensors (``Checkpoint.stored``), in order.
        steps: what to do with them, see ``tasks.stages.unshard``; none for one tensor as it is.
    """

    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    steps: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, read by a loader.

    Attributes:
        source: where its bytes come from.
        names: whose tensor names it has, ``huggingface`` or ``meta``.
        config: what its configuration says, such as config.json.
        files: the other small files that say how the model is built, text by name.
        stored: the tensors in its files, by key: the name, with ``#N`` for shard N if sharded.
        tensors: the model's tensors, by name.
        stamps: of each weight file; none if the weights are not available.
        notes: what people should know, e.g. files that were left out.
        config_file: the file that ``config`` is from; unknown of a record.
        written_by: what wrote the tensors that predict further tokens, ``mlx`` or any other: "", as
            models.lock has it of a record; None, the weight files are to be asked.
    """

    source: Source
    names: str
    config: dict[str, Any]
    files: dict[str, str]
    stored: dict[str, Stored]
    tensors: dict[str, LogicalTensor]
    stamps: dict[str, Stamp]
    notes: tuple[str, ...] = field(default=())
    config_file: str = ""
    written_by: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of its small files."""
        return self.source.small_files

    @cached_property
    def table(self) -> list[Any]:
        """The model's tensors as JSON: what the plan of a model depends on."""
        return [[name, t.dtype, list(t.shape)] for name, t in self.tensors.items()]

    def sha256(self, file: str) -> str | None:
        """Return what a weight file's sha256 is said to be, if the source says it."""
        said = self.source.hashes.get(file)
        kind, _, digest = said.digest.partition(":") if said else ("", "", "")
        return digest if kind == "sha256" else None

    @cached_property
    def changed_at(self) -> dict[str, int]:
        """When each weight file of this machine was last changed before this was first asked."""
        return self.changes()

    def changes(self) -> dict[str, int]:
        """Return when each weight file of this machine was last changed, as the system saw it."""
        paths = {file: self.source.path(file) for file in self.stamps}
        return {file: changed_at(path) for file, path in paths.items() if path}

    def part(self, key: str) -> Part | None:
        """Return where a stored tensor's bytes lie, if they lie in a file of this machine."""
        stored = self.stored[key]
        path = self.source.path(stored.file)
        if path is None:
            return None
        return Part(str(path), stored.offset, stored.nbytes, self.stamps[stored.file])

    @cached_property
    def fetched(self) -> frozenset[str]:
        """The keys of the stored tensors whose bytes come from elsewhere, and are then here."""
        if not self.source.available:
            return frozenset()
        stored = self.stored.items() if self._elsewhere else ()
        return frozenset(k for k, s in stored if s.file in self._elsewhere and s.offset != TORCH)

    @cached_property
    def _elsewhere(self) -> frozenset[str]:
        """The weight files that are on no disk of this machine."""
        files = {stored.file for stored in self.stored.values()}
        return frozenset(file for file in files if self.source.path(file) is None)

    def must_copy(self, key: str) -> bool:
        """Tell whether a stored tensor's bytes are only had as a copy in the cache."""
        stored = self.stored[key]
        return stored.offset == TORCH or stored.file in self._elsewhere

    def fingerprint(self, keys: Iterable[str]) -> Any:
        """Return JSON that is another wherever stored tensors may have other bytes."""
        if not self.source.available:
            return self.source.identity
        keys = list(keys)
        stored = [self.stored[key] for key in keys]
        return [
            self.source.location,
            [self._state(file) for file in sorted({s.file for s in stored})],
            [[key, s.file, s.offset] for key, s in zip(keys, stored, strict=True)],
        ]

    def _state(self, file: str) -> list[Any]:
        changed = self.changed_at.get(file)
        return [file, *self.stamps[file], *([] if changed is None else [changed])]

"""raw_loader: a loader and its file format in one file: as `raw_layout` writes, names prefixed."""

import json
from pathlib import Path

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.small_files import read_json
from tasks.checkpoints.source import ReadableSource
from tasks.checkpoints.stored import Stored

WEIGHTS = ("*.raw",)
SMALL_FILES = ("raw.json",)
HOLDS = "*.raw with raw.json"
PREFIX = "trainer.module."


class RawFile:
    """The format: a line of JSON, then the tensors' bytes."""

    SUFFIXES: tuple[str, ...] = (".raw",)

    def read(self, path: Path) -> list[Stored]:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            at = file.tell()
        tensors = []
        for name, dtype, *shape in header:
            tensors.append(Stored(name, dtype, tuple(shape), path.name, at))
            at += tensors[-1].nbytes
        return tensors


def fits(source: ReadableSource) -> bool:
    return source.has("raw.json")


def read(source: ReadableSource, memos: Memos) -> Checkpoint:
    config = read_json(source.small_files / "raw.json", "it is the configuration")
    tables = source.headers(source.names(WEIGHTS[0]), memos)
    stored = {s.name: s for _, header in tables.values() for s in header}
    tensors = {
        name.removeprefix(PREFIX): LogicalTensor(s.dtype, s.shape, (name,))
        for name, s in stored.items()
    }
    stamps = {name: stamp for name, (stamp, _) in tables.items()}
    return Checkpoint(
        source, "huggingface", config, {}, stored, tensors, stamps, config_file="raw.json"
    )

"""tar_source: a type of source in one file: a checkpoint in a tar archive, read by ranges.

As with a hub, small files are copied out, and weights are no files of this machine.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from cache.files.stamp import Stamp
from cache.records.memos import Memos
from tasks.checkpoints.safetensors_file import SAFETENSORS_DTYPES
from tasks.checkpoints.source import HashedFile, Opening
from tasks.checkpoints.stored import Stored
from tasks.core.errors import CheckpointError

PREFIX = "tar:"


def locate(text: str, base: Path) -> str:
    return str(base / text)


def spelled(location: str, base: Path) -> str:
    return str(Path(location).relative_to(base))


def folder(location: str) -> None:
    return


def on_hub(location: str) -> None:
    return


def open_source(location: str, opening: Opening) -> "TarSource":
    return TarSource(Path(location))


@dataclass(frozen=True)
class Hashed:
    size: int
    digest: str


@dataclass(frozen=True)
class TarSource:
    archive: Path

    @property
    def location(self) -> str:
        return str(self.archive)

    @property
    def identity(self) -> None:
        return

    @property
    def available(self) -> bool:
        return self.archive.exists()

    @property
    def unreachable(self) -> None:
        return None

    @property
    def digests(self) -> Mapping[str, str]:
        return {}

    @property
    def revision(self) -> None:
        return

    @cached_property
    def hashes(self) -> Mapping[str, HashedFile]:
        """What a file beside the archive says of each, if there is one."""
        beside = self.archive.with_suffix(".hashes")
        said = json.loads(beside.read_bytes()) if beside.exists() else {}
        return {name: Hashed(size, f"sha256:{sha256}") for name, (size, sha256) in said.items()}

    @cached_property
    def members(self) -> dict[str, tuple[int, int]]:
        """Each file's first byte in the archive, and its size."""
        with tarfile.open(self.archive) as archive:
            return {m.name: (m.offset_data, m.size) for m in archive if m.isfile()}

    @cached_property
    def small_files(self) -> Path:
        folder = self.archive.with_suffix(".small")
        folder.mkdir(exist_ok=True)
        for name, (_, size) in self.members.items():
            if not name.endswith(".safetensors"):
                (folder / name).write_bytes(b"".join(self.read(name, 0, size)))
        return folder

    def path(self, name: str) -> None:
        return

    def read(self, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        offset, size = self.members[name]
        if start + nbytes > size:
            raise CheckpointError(f"{self.archive}: {name} ends at {size}")
        with self.archive.open("rb") as file:
            file.seek(offset + start)
            for at in range(0, nbytes, 1000):
                yield file.read(min(1000, nbytes - at))

    def names(self, pattern: str) -> list[str]:
        return sorted(name for name in self.members if fnmatchcase(name, pattern))

    def has(self, name: str) -> bool:
        return name in self.members

    def headers(self, names: Iterable[str], memos: Memos) -> dict[str, tuple[Stamp, list[Stored]]]:
        return {name: (Stamp.of(self.archive), self._header(name)) for name in names}

    def _header(self, name: str) -> list[Stored]:
        length = int.from_bytes(b"".join(self.read(name, 0, 8)), "little")
        header = json.loads(b"".join(self.read(name, 8, length)))
        header.pop("__metadata__", None)
        return [
            Stored(
                tensor,
                SAFETENSORS_DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                name,
                8 + length + entry["data_offsets"][0],
            )
            for tensor, entry in header.items()
        ]

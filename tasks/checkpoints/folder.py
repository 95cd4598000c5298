"""folder: a checkpoint in a folder of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from msgspec import Struct

from cache.digest import CHUNK_BYTES
from cache.files.stamp import Stamp
from cache.records.memos import Memos
from tasks.checkpoints import loaders
from tasks.checkpoints.headers import headers
from tasks.checkpoints.hub_name import HubName
from tasks.checkpoints.small_files import first_line, is_pointer
from tasks.checkpoints.source import HashedFile, Opening
from tasks.checkpoints.stored import Stored
from tasks.core.errors import CheckpointError
from tasks.core.paths import path_of

PREFIX = ""
# A model's folder in the hub's cache, by its name in the path.
HUB_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)")


def locate(text: str, base: Path) -> str:
    """Return the absolute path of a folder; a relative one starts at ``base``.

    Raises:
        Mistakes: no folder can be called so.
    """
    return str((base / path_of(text)).absolute())


def spelled(location: str, base: Path) -> str:
    """Return the path relative to ``base``, if it lies there."""
    path = Path(location)
    return str(path.relative_to(base) if path.is_relative_to(base) else path)


def folder(location: str) -> Path:
    """Return the folder."""
    return Path(location)


def on_hub(location: str) -> HubName | None:
    """Return what anybody can have it by, if it lies in the hub's cache."""
    for part in Path(location).parts:
        if match := HUB_FOLDER.fullmatch(part):
            return HubName(f"{match[1]}/{match[2]}")
    return None


def open_source(location: str, opening: Opening) -> FolderSource:
    """Return a folder as a source; it need not exist.

    Of a model's folder in the hub's cache, it is the snapshot of ``main``, or the only one.
    """
    folder = Path(location)
    main, snapshots = folder / "refs" / "main", folder / "snapshots"
    if folder.name.startswith("models--") and snapshots.is_dir():
        here = [path for path in snapshots.iterdir() if path.is_dir()]
        commit = first_line(main)
        here = [path for path in here if path.name == commit] or here
        if len(here) == 1:
            return FolderSource(here[0])
    return FolderSource(folder)


class FolderSource(Struct, frozen=True, dict=True):
    """A folder with weights and small files side by side."""

    small_files: Path

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.small_files)

    @property
    def identity(self) -> None:
        """None: a folder may hold anything tomorrow."""
        return

    @cached_property
    def available(self) -> bool:
        """Whether there are weights, and not just Git LFS pointers in their place."""
        return not all(map(is_pointer, self.weights()))

    @property
    def unreachable(self) -> None:
        """None: it lies nowhere else."""

    @property
    def digests(self) -> Mapping[str, str]:
        """None."""
        return {}

    @cached_property
    def revision(self) -> str | None:
        """The commit that huggingface_hub downloaded, by its own bookkeeping."""
        real = self.small_files.resolve()
        if real.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", real.name):
            return real.name
        downloads = self.small_files / ".cache" / "huggingface" / "download"
        for path in sorted(downloads.glob("*.metadata")):
            first = first_line(path)
            if re.fullmatch(r"[0-9a-f]{40}", first):
                return first
        return None

    def weights(self) -> Iterator[Path]:
        """Yield the weight files of any loader, Git LFS pointers as well."""
        for pattern in loaders.weight_patterns():
            paths = (self.path(name) for name in self.names(pattern))
            yield from (path for path in paths if path.is_file())

    @property
    def hashes(self) -> Mapping[str, HashedFile]:
        """None."""
        return {}

    def path(self, name: str) -> Path:
        """Return a weight file."""
        return self.small_files / name

    def read(self, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        """Yield bytes of a weight file, from ``start`` on.

        Raises:
            CheckpointError: it cannot be read, or ends before that.
        """
        path = self.path(name)
        left = nbytes
        try:
            with path.open("rb") as file:
                file.seek(start)
                while left and (data := file.read(min(left, CHUNK_BYTES))):
                    left -= len(data)
                    yield data
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if left:
            raise CheckpointError(
                f"{path} ends {left:,} bytes before byte {start + nbytes:,}. Fetch it again."
            )

    def names(self, pattern: str) -> list[str]:
        """Return the names of its files that match a shell pattern, sorted.

        Without what macOS writes beside files on a disk that is not its own: ``._NAME``.
        """
        paths = (p for p in self.small_files.glob(pattern) if not p.name.startswith("._"))
        return sorted(path.relative_to(self.small_files).as_posix() for path in paths)

    def has(self, name: str) -> bool:
        """Tell whether there is such a file."""
        return self.path(name).exists()

    def headers(self, names: Iterable[str], memos: Memos) -> dict[str, tuple[Stamp, list[Stored]]]:
        """Return each weight file's stamp and tensors, in the order in which it has them.

        Raises:
            CheckpointError: a file is damaged, or of a kind that must not be read.
        """
        return headers([self.path(name) for name in names], memos)

"""hub: a checkpoint in a repository of a model hub, by its name: ``hf:ORG/NAME``.

It is read at one commit, of which what the hub and the files' headers say is remembered. Weights
are read by ranges, but for files that the hub's client has on this machine; these are read where
they lie. The small files lie in the client's own cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from cache.files.stamp import Stamp
from cache.records.memos import Memos
from tasks.checkpoints import file_digests, headers, hub_client, loaders
from tasks.checkpoints.folder import FolderSource
from tasks.checkpoints.hub_client import HubFile, Snapshot
from tasks.checkpoints.hub_errors import HubUnreachable
from tasks.checkpoints.hub_name import PREFIX, HubName, parse
from tasks.checkpoints.hub_ranges import Ranges
from tasks.checkpoints.hub_requests import page
from tasks.checkpoints.ranges import RangedFile
from tasks.checkpoints.small_files import MAX_SMALL_BYTES, matches
from tasks.checkpoints.source import Opening
from tasks.checkpoints.stored import Stored
from tasks.core.errors import CheckpointError
from tasks.core.text import some

__all__ = ["PREFIX", "HubSource", "folder", "locate", "on_hub", "open_source", "spelled"]

KIND = "hub"  # of memos
VERSION = 1  # raised when what is remembered changes


def locate(text: str, base: Path) -> str:
    """Return ``ORG/NAME[@REVISION][/SUBFOLDER]`` as it is.

    Raises:
        Mistakes: it is none.
    """
    parse(text)
    return text


def spelled(location: str, base: Path) -> str:
    """Return the location, which is one everywhere."""
    return location


def folder(location: str) -> None:
    """Return None: what is on a hub is no folder of this machine."""


def on_hub(location: str) -> HubName:
    """Return what anybody can have it by."""
    return parse(location)


def open_source(location: str, opening: Opening) -> HubSource:
    """Return a repository as a source; it need not exist, and is not asked for yet."""
    return HubSource(parse(location), opening)


class HubSource(Struct, frozen=True, dict=True):
    """A repository, or a folder in it, at one commit."""

    hub_name: HubName
    opening: Opening

    @property
    def location(self) -> str:
        """Its name, at whatever commit."""
        return str(self.hub_name._replace(revision=None))

    @property
    def identity(self) -> str:
        """Its commit: that one's files never change."""
        return self.revision

    @cached_property
    def available(self) -> bool:
        """Whether it is known what it holds: weights are fetched when they are wanted.

        Without the hub, what the client has on this machine may be a part of what is locked.
        """
        try:
            locked = self.opening.locked
            wanted = locked.files if locked and locked.commit == self.revision else ()
            return bool(self._files) and self._files.keys() >= {*wanted}
        except CheckpointError:
            if self.opening.newest:
                raise
            return False

    @property
    def unreachable(self) -> CheckpointError | None:
        """Why the hub did not say what it holds, if what the client has here stands for it."""
        listed: tuple[Snapshot, HubUnreachable | None] | None = vars(self).get("_listed")
        return listed[1] if listed else None  # else what asked it has raised

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """Those of the record that models.lock has of this very commit."""
        locked = self.opening.locked
        return locked.digests() if locked and locked.commit == self.revision else {}

    @property
    def revision(self) -> str:
        """The commit."""
        return self._snapshot.commit

    @property
    def hashes(self) -> Mapping[str, HubFile]:
        """What the hub says of each file."""
        return self._files

    @cached_property
    def small_files(self) -> Path:
        """The folder in the client's cache, with the small files in it that are of use.

        Raises:
            CheckpointError: there is none, or one is not to be had.
        """
        repository, _, subfolder = self.hub_name
        folder = Path(self._snapshot.folder)
        small = [
            self._path(name)
            for name, file in self._files.items()
            if self.opening.is_read(name) and file.size <= MAX_SMALL_BYTES
        ]
        if not small:
            raise self._no_checkpoint()
        missing = [path for path in small if not (folder / path).is_file()]
        if damaged := self._download(missing):  # on their way here: the client does not look
            damaged = self._download(damaged)
        if damaged:
            raise CheckpointError(
                f"{some(damaged, 5)} of {repository} at {self.revision} came twice with other "
                "bytes than the hub says. If there is a proxy or a mirror between, it is at fault; "
                "try again without it (HF_ENDPOINT)."
            )
        for path in small:
            self._check(path)
        return folder / subfolder

    def _no_checkpoint(self) -> CheckpointError:
        repository, _, subfolder = self.hub_name
        if subfolder in self._snapshot.files:
            whole = self.hub_name._replace(subfolder=subfolder.rpartition("/")[0])
            return CheckpointError(
                f"{self.hub_name} is a file, and a checkpoint is all of them. Write {whole}."
            )
        where = f"the folder {subfolder} of " if subfolder else ""
        fact = f"it has {some([*self._files], 5)}" if self._files else "there is nothing"
        mend = loaders.no_checkpoint(self) or " Name a folder that does:"
        folder, at, revision = subfolder.rpartition("@")
        if at and not self._files:
            mend = f" A revision stands before the folder: {HubName(repository, revision, folder)};"
        return CheckpointError(
            f"{where}{repository} holds no checkpoint at commit {self.revision}: {fact}, and no "
            f"config.json or params.json.{mend} {page(repository)} lists what is there."
        )

    def _download(self, paths: list[str]) -> list[str]:
        """Have the client fetch files; return those that came damaged, and are removed again."""
        if not paths:
            return []
        hub_client.download(self.hub_name.repository, self.revision, paths)
        damaged = [path for path in paths if self._digest(path) != self._said(path)]
        for path in damaged:
            Path(self._snapshot.folder, path).resolve().unlink()
        return damaged

    def _said(self, path: str) -> str:
        return self._snapshot.files[path].digest

    def _digest(self, path: str) -> str:
        """Return the digest that a file of the client's cache has, of the hub's kind."""
        kind = self._said(path).partition(":")[0]
        if not kind:
            return ""
        file = Path(self._snapshot.folder, path)
        return f"{kind}:{file_digests.of_file(file, kind, self.opening.memos)}"

    def _check(self, path: str) -> None:
        """Refuse a file of the client's cache that is not the hub's.

        Raises:
            CheckpointError: it is not.
        """
        actual, said = self._digest(path), self._said(path)
        if actual != said:
            path = str(Path(self._snapshot.folder, path))
            raise CheckpointError(
                f"{path} is not the file of {self.hub_name.repository} at {self.revision}: it is "
                f"{actual}, and is said to be {said}. Remove it: then it is fetched anew. If it "
                "was edited on purpose, copy the folder, and name that."
            )

    def path(self, name: str) -> Path | None:
        """Return a weight file that the client has on this machine, or None."""
        return self._here.get(name)

    def read(self, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        """Yield bytes of a file, from ``start`` on.

        Raises:
            CheckpointError: it cannot be read, or ends before that.
        """
        if path := self.path(name):
            return FolderSource(path.parent).read(path.name, start, nbytes)
        return self._ranges.read(self._path(name), start, nbytes)

    def names(self, pattern: str) -> list[str]:
        """Return the names of its files that match a shell pattern, sorted."""
        return sorted(name for name in self._files if matches(name, [pattern]))

    def has(self, name: str) -> bool:
        """Tell whether there is such a file."""
        return name in self._files

    def headers(self, names: Iterable[str], memos: Memos) -> dict[str, tuple[Stamp, list[Stored]]]:
        """Return each weight file's stamp and tensors, in the order in which it has them.

        What had to be fetched is remembered also where nothing else is.

        Raises:
            CheckpointError: a file is damaged, or of a kind that must not be read.
        """
        memos, names = self.opening.memos, list(names)
        tables = {}
        for name in names:
            if path := self.path(name):  # its name says what it should be, not what it is
                tables[name] = headers.headers([path], memos)[path.name]
            elif (header := headers.recall(name, self._identity(name), memos)) is not None:
                tables[name] = _stamp(self._files[name]), header

        def read(name: str) -> list[Stored]:
            location, size = f"{self.location}/{name}", self._files[name].size
            ranged = RangedFile(location, size, lambda *of: self.read(name, *of))
            return headers.read(ranged, self._identity(name), memos)

        unknown = [name for name in names if name not in tables]
        if len(unknown) > 1:
            self._ranges.locate(map(self._path, unknown))
        for name, tensors in zip(unknown, hub_client.each_at_once(read, unknown), strict=True):
            tables[name] = _stamp(self._files[name]), tensors
        return {name: tables[name] for name in names}

    def _identity(self, name: str) -> list[Any]:
        """Return JSON that is another wherever the content may be of a file read by ranges."""
        file = self._files[name]
        return [KIND, file.digest or [self.location, self.revision, name], file.size]

    def _path(self, name: str) -> str:
        """Return a file's path in the repository."""
        return f"{self.hub_name.subfolder}/{name}".lstrip("/")

    @cached_property
    def _ranges(self) -> Ranges:
        return Ranges(self.hub_name.repository, self.revision, self._snapshot.files)

    @cached_property
    def _here(self) -> dict[str, Path]:
        """The files that the client has on this machine, by name."""
        folder = Path(self._snapshot.folder, self.hub_name.subfolder)
        paths = {name: folder / name for name in self._files}
        return {
            name: path
            for name, path in paths.items()
            if path.is_file() and path.stat().st_size == self._files[name].size
        }

    @cached_property
    def _files(self) -> dict[str, HubFile]:
        """The files of the folder, by their paths in it."""
        begin = self._path("")
        return {
            path.removeprefix(begin): file
            for path, file in self._snapshot.files.items()
            if path.startswith(begin)
        }

    @property
    def _snapshot(self) -> Snapshot:
        """What the repository holds at the commit that it is taken at.

        Raises:
            CheckpointError: it is not to be had.
        """
        return self._listed[0]

    @cached_property
    def _listed(self) -> tuple[Snapshot, HubUnreachable | None]:
        """What the repository holds at a commit; and why that may be a part of it.

        Which one, models.lock says, or models.toml; else what was the newest when it was asked for
        first here, so that nothing moves by itself before models.lock has it.

        Raises:
            CheckpointError: it is not to be had.
        """
        hub_name, opening = self.hub_name, self.opening
        question = [
            KIND,
            VERSION,
            "commit",
            opening.project,
            hub_name.repository,
            hub_name.revision,
        ]
        commit = hub_name.revision
        if not commit or not hub_client.COMMIT.fullmatch(commit):
            locked = opening.locked.commit if opening.locked else None
            remembered = locked or opening.memos.get(KIND, question, str)
            commit = None if opening.newest else remembered
        listed = [KIND, VERSION, "files", hub_client.environment(), hub_name.repository]
        if commit and (snapshot := opening.memos.get(KIND, [*listed, commit], Snapshot)):
            return snapshot, None
        try:
            snapshot = hub_client.snapshot(hub_name.repository, commit or hub_name.revision)
        except HubUnreachable as error:
            cached = hub_client.cached_snapshot(hub_name.repository, commit or hub_name.revision)
            if cached is None or opening.newest:
                raise
            return cached, error  # not remembered: it may be a part
        opening.memos.put(KIND, [*listed, snapshot.commit], to_builtins(snapshot))
        if not hub_name.revision or not hub_client.COMMIT.fullmatch(hub_name.revision):
            opening.memos.put(KIND, question, snapshot.commit)
        return snapshot, None


def _stamp(file: HubFile) -> Stamp:
    """Return a stamp that is another wherever the hub says that the content is."""
    _, _, name = file.digest.partition(":")
    return Stamp(file.size, int(name[:15] or "0", 16), int(name[15:30] or "0", 16))

"""source: where the bytes of a checkpoint come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from cache.files.stamp import Stamp
from cache.records.memos import Memos
from tasks.checkpoints.stored import Stored
from tasks.core.errors import CheckpointError


class LockedCommit(Struct, frozen=True):
    """What models.lock has of a source on a hub.

    Attributes:
        commit: its commit.
        files: the names of the files that are used.
        digests: returns the digests of its tensors, by key, as far as they are known.
    """

    commit: str
    files: frozenset[str]
    digests: Callable[[], Mapping[str, str]]


class Opening(Struct, frozen=True):
    """How a source is opened that lies elsewhere, and that another commit may be made of.

    Attributes:
        is_read: tells whether a small file of that name is of use; others need not be fetched.
        memos: where what was fetched is remembered, also in a run that writes nothing else.
        project: the folder whose choice of a commit is remembered.
        locked: what models.lock has of it, if it is of a hub.
        newest: whether to ask for the newest one, whatever is locked or remembered.
    """

    is_read: Callable[[str], bool]
    memos: Memos
    project: str
    locked: LockedCommit | None = None
    newest: bool = False


class HashedFile(Protocol):
    """What a source knows of a file without reading it."""

    @property
    def size(self) -> int:
        """Its size in bytes."""

    @property
    def digest(self) -> str:
        """``sha256:…`` of its bytes, or ``git:…``, the id of its blob in git; "", not known."""


class Source(Protocol):
    """Where the bytes of a checkpoint come from."""

    @property
    def location(self) -> str:
        """Where it is, for messages and for what is remembered of its files."""

    @property
    def small_files(self) -> Path:
        """A folder of this machine that holds the files beside the weights."""

    @property
    def identity(self) -> str | None:
        """What pins its content, whatever happens to its files: a record's digest, a hub's commit.

        None where only the files themselves say what they hold.
        """

    @property
    def available(self) -> bool:
        """Whether the weights can be read."""

    @property
    def unreachable(self) -> CheckpointError | None:
        """Why no more is known than what is on this machine, where there may be more elsewhere."""

    @property
    def digests(self) -> Mapping[str, str]:
        """Digests of stored tensors, by key, as far as the source knows them by itself."""

    @property
    def revision(self) -> str | None:
        """The commit of a hub that it was downloaded at, if it says so."""

    @property
    def hashes(self) -> Mapping[str, HashedFile]:
        """What is known of the files, by name; nothing of a folder's, which may change."""

    def path(self, name: str) -> Path | None:
        """Return a weight file, or None if it is no file of this machine: then ``read`` it."""

    def read(self, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        """Yield bytes of a weight file, from ``start`` on.

        Raises:
            CheckpointError: it cannot be read, or ends before that.
        """


class ReadableSource(Source, Protocol):
    """A source that loaders can make a checkpoint of."""

    def names(self, pattern: str) -> list[str]:
        """Return the names of its files that match a shell pattern, sorted."""

    def has(self, name: str) -> bool:
        """Tell whether there is such a file."""

    def headers(self, names: Iterable[str], memos: Memos) -> dict[str, tuple[Stamp, list[Stored]]]:
        """Return each weight file's stamp and tensors, in the order in which it has them.

        Raises:
            CheckpointError: a file is damaged, or of a kind that must not be read.
        """


def is_pinned(source: Source) -> bool:
    """Tell whether something else than the files that are read says which bytes they hold."""
    return source.revision is not None or not source.available

"""hub_repositories: what a model hub holds: repositories of files, in commits and branches."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import yaml

# What a new repository of the hub keeps in large file storage, without what is no model's.
LARGE = ("*.bin", "*.model", "*.npz", "*.onnx", "*.pt", "*.pth", "*.safetensors", "*.zip")
LARGE_BYTES = 10_000_000
ATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE).encode()
_PIECE = 1 << 20


class Content(Protocol):
    """The bytes of a file."""

    size: int
    sha256: str

    def read(self, start: int, nbytes: int) -> Iterator[bytes]: ...


@dataclass(frozen=True, repr=False)
class Held:
    """Bytes in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def read(self, start: int, nbytes: int) -> Iterator[bytes]:
        yield self.data[start : start + nbytes]


@dataclass(frozen=True)
class OnDisk:
    """Bytes of a file of this machine."""

    path: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, start: int, nbytes: int) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(start)
            while nbytes > 0 and (piece := file.read(min(_PIECE, nbytes))):
                nbytes -= len(piece)
                yield piece


class Span(NamedTuple):
    """Bytes of an open file."""

    descriptor: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Generated:
    """Bytes that nothing stores as they are: spans of open files, each of them many times over.

    Attributes:
        size: how many there are.
        spans: gives those from a first one on, so many of them.
    """

    size: int
    spans: Callable[[int, int], Iterator[Span]]

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for piece in self.read(0, self.size):
            digest.update(piece)
        return digest.hexdigest()

    def read(self, start: int, nbytes: int) -> Iterator[bytes]:
        for span in self.spans(start, nbytes):
            yield os.pread(span.descriptor, span.nbytes, span.start)


@dataclass(frozen=True)
class File:
    """A file of a commit, in git or in large file storage."""

    content: Content
    large: bool

    @property
    def pointer(self) -> bytes:
        """What git has of a large file."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.content.sha256}\n"
            f"size {self.content.size}\n"
        ).encode()

    @cached_property
    def git_id(self) -> str:
        data = self.pointer if self.large else whole(self.content)
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.content.sha256 if self.large else self.git_id


def whole(content: Content) -> bytes:
    return b"".join(content.read(0, content.size))


def is_large(name: str, size: int, sample: bytes) -> bool:
    """Whether the hub has a file put into large file storage."""
    if not size:
        return False
    named = any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in LARGE)
    return named or size > LARGE_BYTES or b"\0" in sample


@dataclass(frozen=True)
class Commit:
    oid: str
    files: Mapping[str, File]
    parent: str | None
    message: str


@dataclass(repr=False)
class Repository:
    """A model's repository.

    Attributes:
        name: with its owner's.
        private: only who has a token may see it.
        gated: only whom ``admitted`` names may read its files; all may list them.
        commits: by id, the oldest first.
        refs: branches and tags: each one's commit.
    """

    name: str
    private: bool = False
    gated: bool = False
    admitted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)

    @property
    def head(self) -> str:
        """The newest commit of the branch main."""
        return self.refs["main"]

    @property
    def files(self) -> Mapping[str, File]:
        """Those of the branch main."""
        return self.commits[self.head].files

    def add(self, files: Mapping[str, bytes | Content], message: str = "more files") -> str:
        """Commit files, beside those that are there, to the branch main; the commit's id."""
        added = {}
        for name, given in files.items():
            content = Held(given) if isinstance(given, bytes) else given
            sample = b"".join(content.read(0, min(512, content.size)))
            added[name] = File(content, is_large(name, content.size, sample))
        before = self.files if self.refs else {}
        return self.commit({**before, **added}, message)

    def add_folder(self, folder: Path, message: str = "a folder") -> str:
        """Commit all files of a folder, as they lie there while they are served."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        named = {path.relative_to(folder).as_posix(): OnDisk(path) for path in paths}
        return self.add(named, message)

    def commit(self, files: Mapping[str, File], message: str, branch: str = "main") -> str:
        """Have exactly these files in a branch."""
        parent = self.refs.get(branch)
        tree = "".join(f"{name} {files[name].git_id}\n" for name in sorted(files))
        said = f"{self.name} {parent} {len(self.commits)} {message}\n{tree}"
        oid = hashlib.sha1(said.encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), parent, message)
        self.refs[branch] = oid
        return oid

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, or an id names."""
        return self.commits.get(self.refs.get(revision, revision))

    def last_commit(self, path: str, commit: Commit) -> Commit:
        """The last one, up to a commit, that wrote a file."""
        parent = self.commits.get(commit.parent or "")
        if parent and (there := parent.files.get(path)) and there.etag == commit.files[path].etag:
            return self.last_commit(path, parent)
        return commit

    def card(self, commit: Commit) -> dict[str, object]:
        """What README.md says between its first lines."""
        readme = commit.files.get("README.md")
        return front_matter(whole(readme.content).decode()) if readme else {}


def front_matter(text: str) -> dict[str, object]:
    """Return the YAML that a card begins with.

    Raises:
        ValueError: it is no mapping, or no YAML.
    """
    first, _, rest = text.partition("\n")
    said, end, _ = rest.partition("\n---")
    if first.strip() != "---" or not end:
        return {}
    try:
        fields = yaml.safe_load(said)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if not isinstance(fields, dict):
        raise ValueError("it is no mapping")
    return fields

"""publish: a built model goes to its repository on a model hub: what differs there, in one commit.

Nothing that somebody else put there is overwritten or removed: a file there is ours if it is as the
last publishing from here left it, or if the last commit that wrote it is of the same target's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from cache.records.memos import Memos
from tasks.checkpoints import file_digests, hub_client
from tasks.checkpoints.hub_errors import TOKEN, answers_of_a_hub, errors_of_publishing
from tasks.core.errors import BuildError, ConfigError
from tasks.core.text import some

HUBS_OWN = frozenset({".gitattributes"})  # what the hub puts into each repository
MAX_NAMES = 5  # names in a message


class Repository(Struct, frozen=True):
    """A repository as it is.

    Attributes:
        commit: the newest; None, there is no repository.
        private: whether only some can see it.
        files: ``sha256:…`` of each large file, ``git:…`` of each other one, by path.
        sizes: in bytes.
    """

    commit: str | None = None
    private: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


class Published(Struct, frozen=True):
    """What was published the last time.

    Attributes:
        repository: where.
        files: their digests, as ``Repository.files``, by path.
    """

    repository: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


class Difference(Struct, frozen=True):
    """How a built model differs from its repository.

    Attributes:
        there: the repository as it is.
        files: of the build.
        uploads: the files that go up, with their sizes.
        removes: files there of an earlier build.
        others: files there that somebody else put there, which stay.
        added: files in the built folder that are not of the build, which stay here.
    """

    there: Repository
    files: Sequence[str]
    uploads: Mapping[str, int]
    removes: Sequence[str]
    others: Sequence[str]
    added: Sequence[str]

    @property
    def is_something(self) -> bool:
        """Whether there is something to commit."""
        return bool(self.uploads or self.removes)

    @property
    def nbytes(self) -> int:
        """Bytes that go up at most: the hub may have parts of them already."""
        return sum(self.uploads.values())


class Publication(Struct, frozen=True):
    """A built model, and where it goes.

    Attributes:
        target: its name.
        repository: ``ORG/NAME``.
        private: whether a repository that is made is private, and one that is there must be.
        create: whether one is made where there is none.
        collection: the title of the collection that it is put into, if any.
        folder: build/TARGET.
        instead: what goes up instead of files of the same names there.
        loaded: the layout's pattern of what clients load.
        memos: where digests of files are remembered.
    """

    target: str
    repository: str
    private: bool
    create: bool
    collection: str | None
    folder: Path
    instead: Mapping[str, bytes]
    loaded: str
    memos: Memos

    @property
    def title(self) -> str:
        """That of its commits, by which they are known again."""
        return f"{self.target}, built by mlx-make"

    def compare(self, files: Sequence[str], added: Sequence[str], last: Published) -> Difference:
        """Compare the built model with the repository, which is only read.

        Args:
            files: of the build, by paths in the folder.
            added: other files in the folder.
            last: what was published before.

        Raises:
            BuildError: something there is somebody else's, or the hub gives no answer.
        """
        there = self._read()
        uploads = {
            name: self._size(name)
            for name in files
            if there.files.get(name) != self._digest(name, there)
        }
        gone = [name for name in there.files if name not in files and name not in HUBS_OWN]
        ours = last.files if last.repository == self.repository else {}
        touched = [name for name in uploads if name in there.files]
        touched += [name for name in gone if fnmatchcase(name, self.loaded)]
        foreign = [name for name in touched if ours.get(name) != there.files[name]]
        if foreign:  # but of another machine that publishes the same
            ours_too = self._published_elsewhere(foreign, there)
            foreign = [name for name in foreign if name not in ours_too]
        if foreign:
            raise BuildError(
                f"{self.repository} has {some(foreign, MAX_NAMES)} of somebody else's, or changed "
                f"since it was published (commit {there.commit}). Nothing of that is overwritten. "
                "Look at it; remove it there, or take it over (files = …), or publish to another "
                "repository."
            )
        removes = [name for name in gone if name in touched or ours.get(name) == there.files[name]]
        others = [name for name in gone if name not in removes]
        return Difference(there, files, uploads, removes, others, added)

    def upload(self, difference: Difference) -> Repository:
        """Commit what differs; return the repository as it is then.

        Raises:
            BuildError: it was changed meanwhile, or the hub refuses.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.utils.logging import set_verbosity
        from huggingface_hub.utils.tqdm import disable_progress_bars

        there = difference.there
        if there.commit and not difference.is_something:
            return there
        disable_progress_bars()  # doit's own display is on those lines
        set_verbosity(logging.ERROR)  # else it tells of each try, with addresses that are secrets
        with errors_of_publishing(self.repository):
            api = hub_client.client()
            if there.commit is None:
                api.create_repo(self.repository, private=self.private)
                there = self._read()
                if set(there.files) - HUBS_OWN:
                    raise BuildError(f"{self.repository} was made by somebody else meanwhile.")
            operations: list[Any] = [
                CommitOperationAdd(name, self.instead.get(name) or str(self.folder / name))
                for name in difference.uploads
            ]
            operations += [CommitOperationDelete(name) for name in difference.removes]
            api.create_commit(
                self.repository,
                operations,
                commit_message=self.title,
                parent_commit=there.commit,
            )
            return self._read()

    def collect(self) -> None:
        """Put the repository into its collection, if it has one.

        Raises:
            BuildError: the hub refuses.
        """
        if self.collection is None:
            return
        owner = self.repository.partition("/")[0]
        with errors_of_publishing(self.repository):
            api = hub_client.client()
            collection = api.create_collection(
                self.collection, namespace=owner, private=self.private, exists_ok=True
            )
            api.add_collection_item(collection.slug, self.repository, "model", exists_ok=True)

    def _read(self) -> Repository:
        """Return the repository as it is.

        Raises:
            BuildError: it is not as models.toml wants it, or the hub gives no answer.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            with errors_of_publishing(self.repository, but=RepositoryNotFoundError):
                info, files = hub_client.describe(self.repository)
        except RepositoryNotFoundError as error:
            if self.create:
                return Repository()
            raise BuildError(
                f"there is no repository {self.repository}, or the token is not one that may see "
                f"it, and models.toml says create = false. Make it, or look at {TOKEN}."
            ) from error
        if self.private and not info.private:
            raise BuildError(
                f"{self.repository} can be seen by all, and models.toml says private = true. Make "
                "it private on the hub, or publish to another repository."
            )
        digests = {name: file.digest for name, file in files.items()}
        sizes = {name: file.size for name, file in files.items()}
        return Repository(info.sha, bool(info.private), digests, sizes)

    def _published_elsewhere(self, names: Sequence[str], there: Repository) -> set[str]:
        """Return which files there were last written by a publishing of the same target."""
        with errors_of_publishing(self.repository), answers_of_a_hub(self.repository):
            entries = hub_client.client().get_paths_info(
                self.repository, [*names], expand=True, revision=there.commit
            )
        commits = {entry.path: entry.last_commit for entry in entries}
        return {name for name, commit in commits.items() if commit and commit.title == self.title}

    def _digest(self, name: str, there: Repository) -> str:
        """Return a built file's digest as the repository has its own, if it may be equal."""
        known = there.files.get(name, "")
        if not known or self._size(name) != there.sizes[name]:
            return "another"
        kind = known.partition(":")[0]
        if data := self.instead.get(name):
            return f"{kind}:{file_digests.of_bytes(data, kind)}"
        return f"{kind}:{file_digests.of_file(self.folder / name, kind, self.memos)}"

    def _size(self, name: str) -> int:
        data = self.instead.get(name)
        return len(data) if data else (self.folder / name).stat().st_size


def check_token() -> None:
    """Refuse to go on without a token.

    Raises:
        ConfigError: there is none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError(
            f"there is no token for the hub, without which nothing is published. Have {TOKEN} hold "
            "one that may write, or log in: hf auth login."
        )

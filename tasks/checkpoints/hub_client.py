"""hub_client: what repositories of a model hub hold, asked of huggingface_hub's own client.

Where the hub is, who asks, through which proxy, whether at all, and where files are kept on this
machine, is the client's business: HF_ENDPOINT, HF_TOKEN and the stored token, HF_HUB_OFFLINE,
HF_HOME. It is imported once there is something to ask.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from tasks.checkpoints.hub_errors import answers_of_a_hub, errors_of_reading
from tasks.checkpoints.hub_requests import page, patiently, program, silence_seconds
from tasks.checkpoints.hub_session import MAX_LISTED, session
from tasks.core.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo, RepoFile
    from huggingface_hub.hf_api import RepoSibling

CONNECTIONS = 8  # requests at once, as the client's own snapshot_download has
FIRST_TRIES = 3  # of what is asked before all else: what is kept on this machine may do
# What the client takes the place of its cache from.
ENVIRONMENT = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HOME")
MAX_NAME_BYTES = 255  # of a file or folder, as file systems have them
COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")

_T = TypeVar("_T")


class HubFile(Struct, frozen=True, array_like=True):
    """A file as the hub says that it is.

    Attributes:
        size: in bytes.
        digest: ``sha256:…`` of its bytes, or ``git:…``, the id of its blob in git.
    """

    size: int
    digest: str


class Snapshot(Struct, frozen=True):
    """A repository at a commit.

    Attributes:
        commit: the commit.
        folder: where the client keeps its files on this machine; it need not be there.
        files: all files, by path.
    """

    commit: str
    folder: str
    files: dict[str, HubFile]


def environment() -> list[str | None]:
    """Return what the place of the client's cache depends on."""
    return [os.environ.get(name) for name in ENVIRONMENT]


def snapshot(repository: str, revision: str | None) -> Snapshot:
    """Ask the hub what a repository holds.

    Args:
        repository: ``ORG/NAME``.
        revision: a branch, a tag or a commit; None, the default branch.

    Raises:
        CheckpointError: there is no such repository or revision, or it is not for this user.
        HubUnreachable: the hub does not answer, or is not to be asked.
    """
    with errors_of_reading(repository, revision):
        info, files = describe(repository, revision)
    commit = str(info.sha)
    return Snapshot(commit, _folder(repository, commit), files)


def describe(repository: str, revision: str | None = None) -> tuple[ModelInfo, dict[str, HubFile]]:
    """Ask the hub for a repository and its files, by path.

    Raises:
        CheckpointError: what answers is no hub, or leaves out sizes.
        Exception: what its client raises otherwise.
    """
    from huggingface_hub import RepoFile

    api = client()
    with answers_of_a_hub(repository):
        info = patiently(
            lambda: api.model_info(
                repository, revision=revision, files_metadata=True, timeout=silence_seconds()
            ),
            FIRST_TRIES,
        )
        commit = info.sha or ""
        if not COMMIT.fullmatch(commit):
            raise ValueError(f"it names no commit: {commit!r}")
        files = {sibling.rfilename: _hub_file(sibling) for sibling in info.siblings or ()}
        if None in files.values():  # a mirror may leave out what was asked for
            tree = patiently(lambda: _listed(api, repository, commit))
            files = {file.path: _hub_file(file) for file in tree if isinstance(file, RepoFile)}
    complete = {name: file for name, file in files.items() if file is not None}
    if len(complete) < len(files):
        name = next(name for name, file in files.items() if file is None)
        raise CheckpointError(
            f"{page(repository)} does not say how large {name} is. If there is a mirror between, "
            "it is at fault; try again without it (HF_ENDPOINT)."
        )
    return info, complete


def client() -> HfApi:
    """Return the hub's client, which says that it is this program that asks."""
    from huggingface_hub import HfApi

    session()
    return HfApi(**program())


def _listed(api: HfApi, repository: str, commit: str) -> list[Any]:
    """Return the files and folders of a repository.

    Raises:
        ValueError: there is no end of them.
    """
    entries = api.list_repo_tree(repository, recursive=True, revision=commit)
    listed = list(islice(entries, MAX_LISTED + 1))
    if len(listed) > MAX_LISTED:
        raise ValueError(f"it lists over {MAX_LISTED:,} files")
    return listed


def _hub_file(file: RepoSibling | RepoFile) -> HubFile | None:
    """Return what the hub says of a file, if it says all.

    Raises:
        ValueError: no file is so.
    """
    from huggingface_hub import RepoFile

    name = file.path if isinstance(file, RepoFile) else file.rfilename
    parts = name.split("/")
    longest = max(len(part.encode()) for part in parts)
    if {"", "..", "."} & {*parts} or "\0" in name or longest > MAX_NAME_BYTES:
        raise ValueError(f"{name[:MAX_NAME_BYTES]!r} is no file of a repository")
    if file.size is None or not file.blob_id:
        return None
    digest = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
    if type(file.size) is not int or not 0 <= file.size < 1 << 63 or not _DIGEST.fullmatch(digest):
        raise ValueError(f"{name} has {file.size!r} bytes of {digest!r}")
    return HubFile(file.size, digest)


def cached_snapshot(repository: str, revision: str | None) -> Snapshot | None:
    """Return what the client's cache on this machine holds of a repository, without asking.

    It may be a part, where no more was downloaded.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    try:
        resolved = HfApi().resolve_revision(repository, revision=revision, local_files_only=True)
    except RevisionResolutionError:
        return None
    folder = Path(_folder(repository, resolved.resolved))
    files = {
        path.relative_to(folder).as_posix(): _cached_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return Snapshot(resolved.resolved, str(folder), files) if files else None


def _cached_file(path: Path) -> HubFile:
    """Return a file of the client's cache, whose blobs have the names of their digests."""
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    kinds = {64: "sha256", 40: "git"}
    kind = kinds.get(len(blob)) if re.fullmatch(r"[0-9a-f]+", blob) else None
    return HubFile(path.stat().st_size, f"{kind}:{blob}" if kind else "")


def _folder(repository: str, commit: str) -> str:
    """Return where the client keeps a commit's files."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=repository, repo_type="model")
    return str(Path(constants.HF_HUB_CACHE).expanduser().absolute() / name / "snapshots" / commit)


def download(repository: str, commit: str, names: Iterable[str]) -> None:
    """Have the client fetch files into its cache, several at once.

    Raises:
        CheckpointError: one is not to be had.
        HubUnreachable: the hub does not answer, or is not to be asked.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    session()
    disable_progress_bars("huggingface_hub.http_get")  # doit's own display is on that line

    def fetch(name: str) -> None:
        with errors_of_reading(repository, commit, name):
            patiently(lambda: hf_hub_download(repository, name, revision=commit, **program()))

    each_at_once(fetch, names)


def each_at_once(do: Callable[[str], _T], names: Iterable[str]) -> list[_T]:
    """Return what ``do`` returns of each name, of several at once; the first error ends it."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        return list(pool.map(do, names))
    finally:
        pool.shutdown(cancel_futures=True)

"""hub_client: all talk with a model hub, by huggingface_hub's own client.

Where the hub is, who asks, through which proxy, whether at all, and where files are kept on this
machine, is the client's business: HF_ENDPOINT, HF_TOKEN and the stored token, HF_HUB_OFFLINE,
HF_HOME. It is imported once there is something to ask.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar
from urllib.parse import urljoin, urlsplit

import msgspec
from msgspec import Struct, field

from tasks.core.errors import CheckpointError

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi, ModelInfo, RepoFile
    from huggingface_hub.hf_api import RepoSibling

CONNECTIONS = 8  # requests at once, as the client's own snapshot_download has
TRIES = 6  # without progress between
PROGRESS_BYTES = 64 << 10
PROGRESS_SECONDS = 30.0  # of waiting for so many bytes, before another connection is tried
FIRST_TRIES = 3  # of what is asked before all else: what is kept on this machine may do
FIRST_WAIT_SECONDS, MOST_WAIT_SECONDS = 0.5, 30.0
MOST_PATIENCE_SECONDS = 600.0  # of what Retry-After asks for
REDIRECTS = 5
LOCATED = 100  # files in a request, the most that git-lfs itself asks for
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
EXPIRED = frozenset({400, 401, 403, 404, 410})  # of a signed address: the hub gives another
# What the client takes the place of its cache from.
ENVIRONMENT = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HOME")
COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
_NUMBER = "[0-9]{1,18}"  # of a header: what 64 bits hold
# What the client comes to where an answer is not of the kind that it reads.
_NO_ANSWER = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
)  # fmt: skip

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


class HubUnreachable(CheckpointError):
    """The hub does not answer, or is not to be asked."""


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
    with _errors(repository, revision):
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
        info = _patiently(
            lambda: api.model_info(
                repository, revision=revision, files_metadata=True, timeout=_stalled()
            ),
            FIRST_TRIES,
        )
        commit = info.sha or ""
        if not COMMIT.fullmatch(commit):
            raise ValueError(f"it names no commit: {commit!r}")
        files = {sibling.rfilename: _hub_file(sibling) for sibling in info.siblings or ()}
        if None in files.values():  # a mirror may leave out what was asked for
            tree = _patiently(
                lambda: [*api.list_repo_tree(repository, recursive=True, revision=commit)]
            )
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

    return HfApi(**_program())


def _hub_file(file: RepoSibling | RepoFile) -> HubFile | None:
    """Return what the hub says of a file, if it says all.

    Raises:
        ValueError: no file is so.
    """
    from huggingface_hub import RepoFile

    name = file.path if isinstance(file, RepoFile) else file.rfilename
    if {"", "..", "."} & {*name.split("/")}:
        raise ValueError(f"{name!r} is no file of a repository")
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

    disable_progress_bars("huggingface_hub.http_get")  # doit's own display is on that line

    def fetch(name: str) -> None:
        with _errors(repository, commit, name):
            _patiently(lambda: hf_hub_download(repository, name, revision=commit, **_program()))

    each_at_once(fetch, names)


def each_at_once(do: Callable[[str], _T], names: Iterable[str]) -> list[_T]:
    """Return what ``do`` returns of each name, of several at once; the first error ends it."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        return list(pool.map(do, names))
    finally:
        pool.shutdown(cancel_futures=True)


class Ranges(Struct, frozen=True):
    """The bytes of a repository's files at a commit. Safe in threads.

    Attributes:
        repository: ``ORG/NAME``.
        commit: the commit.
        files: what the hub says of them.
    """

    repository: str
    commit: str
    files: Mapping[str, HubFile]
    _addresses: dict[str, str] = field(default_factory=dict)  # signed ones, while they hold

    def read(self, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        """Yield bytes of a file. A connection that is cut or stalls goes on where it ended.

        Raises:
            CheckpointError: there are no such bytes, or what comes is other than promised.
            HubUnreachable: the hub does not answer, or is not to be asked.
        """
        size = self.files[name].size
        if start + nbytes > size:
            raise CheckpointError(
                f"{name} of {self.repository} has {size:,} bytes at {self.commit}, and no byte "
                f"{start + nbytes:,}: its header is of another file."
            )
        at, end, patience = start, start + nbytes, _Patience()
        with _errors(self.repository, self.commit, name):
            while at < end:
                with patience, self._opened(name, at, end) as response:
                    for data in patience.watch(response.iter_raw()):
                        if len(data) > end - at:
                            raise self._other(name, f"more than the {end - at:,} bytes asked for")
                        at += len(data)
                        yield data
                    if at < end:
                        raise _Cut(f"the answer ended {end - at:,} bytes early")

    def locate(self, names: Iterable[str]) -> None:
        """Have the hub say where large files lie, many in one request, as git-lfs has it.

        Files that it says nothing of are asked for one by one, as they are read.
        """
        import httpx2
        from huggingface_hub.utils import get_session

        files = [(self.files[name], name) for name in names if name not in self._addresses]
        large = {file.digest[7:]: (file, n) for file, n in files if file.digest[:7] == "sha256:"}
        url = f"{page(self.repository)}.git/info/lfs/objects/batch"
        for first in range(0, len(large), LOCATED):
            batch = list(large.items())[first : first + LOCATED]
            request = {
                "operation": "download",
                "transfers": ["basic"],
                "hash_algo": "sha256",
                "objects": [{"oid": oid, "size": file.size} for oid, (file, _) in batch],
            }
            try:
                response = get_session().post(
                    url, json=request, headers=_headers(), timeout=_stalled()
                )
                answer = msgspec.json.decode(response.content, type=_Located)
            except (httpx2.HTTPError, OSError, msgspec.DecodeError, *_NO_ANSWER):
                return
            for item in answer.objects:
                if item.oid in large and (place := item.actions.get("download")) and place.is_plain:
                    self._addresses[large[item.oid][1]] = place.href

    @contextmanager
    def _opened(self, name: str, start: int, end: int) -> Iterator[httpx2.Response]:
        """Request a range, from where the hub said last that the file lies.

        Raises:
            CheckpointError: the answer is none to what was asked.
            httpx2.HTTPError: there is none.
        """
        from huggingface_hub import hf_hub_url

        place = hf_hub_url(self.repository, name, revision=self.commit)
        address = self._addresses.get(name, place)
        for _ in range(REDIRECTS):
            with _stream(address, place, start, end) as response:
                if not response.has_redirect_location:
                    if _is_expired(response):
                        self._addresses.pop(name, None)
                    elif _origin(address) != _origin(place):
                        self._addresses[name] = address
                    self._check(name, response, start, end)
                    yield response
                    return
                self._check_etag(name, response)
                address = urljoin(address, response.headers["location"])
        raise CheckpointError(f"{name} of {self.repository} is redirected over {REDIRECTS} times.")

    def _check(self, name: str, response: httpx2.Response, start: int, end: int) -> None:
        """Refuse an answer to a range that is none."""
        from huggingface_hub.utils import hf_raise_for_status

        hf_raise_for_status(response)
        size = self.files[name].size
        span = f"{start}-{end - 1}/{size}"
        if response.status_code == 206:
            span = response.headers.get("content-range", "").removeprefix("bytes ")
        elif (start, end) != (0, size):
            raise self._other(name, "the whole file, where a range was asked for")
        match = re.fullmatch(rf"({_NUMBER})-({_NUMBER})/({_NUMBER}|\*)", span)
        if not match or int(match[1]) != start or int(match[2]) >= end:
            raise self._other(name, f"range {span[:60]!r}, where {start}-{end - 1} was asked for")
        if match[3] not in ("*", str(size)):
            raise self._other(name, f"a file of {int(match[3]):,} bytes, which has {size:,}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self._other(name, f"bytes encoded as {response.headers['content-encoding']}")
        length = response.headers.get("content-length", "")
        if re.fullmatch(_NUMBER, length) and int(length) > end - start:
            raise self._other(name, f"{int(length):,} bytes, where {end - start:,} were asked for")

    def _check_etag(self, name: str, response: httpx2.Response) -> None:
        """Refuse a redirect to other bytes than the hub said are the file's."""
        etag = response.headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        expected = self.files[name].digest.removeprefix("sha256:")
        if etag and len(etag) == len(expected) == 64 and etag != expected:
            raise self._other(name, f"a file of sha256 {etag}, which has {expected}")

    def _other(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{name} of {self.repository} at {self.commit}: the server gives {what}. If there is a "
            "proxy or a mirror between, it is at fault; try again without it (HF_ENDPOINT)."
        )


class _Action(Struct, frozen=True):
    href: str
    header: dict[str, str] = {}

    @property
    def is_plain(self) -> bool:
        """Whether the address is all that is needed."""
        try:
            scheme, host, _ = _origin(self.href)
        except ValueError:
            return False
        return not self.header and scheme in ("https", "http") and bool(host)


class _Object(Struct, frozen=True):
    oid: str
    actions: dict[str, _Action] = {}


class _Located(Struct, frozen=True):
    """What a hub answers of where large files lie (git-lfs, docs/api/batch.md)."""

    objects: list[_Object]


@contextmanager
def _stream(address: str, place: str, start: int, end: int) -> Iterator[httpx2.Response]:
    """Request a range of what is at an address; who asks is for the hub alone to know."""
    from huggingface_hub.utils import get_session

    headers = _headers(None if _origin(address) == _origin(place) else False)
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream(
        "GET", address, headers=headers, follow_redirects=False, timeout=_stalled()
    ) as response:
        yield response


def _headers(token: Literal[False] | None = None) -> dict[str, str]:
    """Return the headers of a request; ``False``: without the token, to any other host."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(token=token, **_program())


def _stalled() -> float:
    """Return the seconds after which a silent connection is given up."""
    from huggingface_hub import constants

    return constants.HF_HUB_DOWNLOAD_TIMEOUT


def _program() -> dict[str, Any]:
    """Return what the hub's client says of the program that uses it."""
    from importlib.metadata import version

    return {"library_name": "mlx-make", "library_version": version("mlx-make")}


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _Cut(Exception):
    """An answer that ended before all of it was there."""


class _Patience:
    """Swallows failures that pass, and waits after each; not too often without any progress."""

    def __init__(self, tries: int = TRIES) -> None:
        self._most = tries
        self._tries = 0
        self._bytes = 0
        self._seconds = 0.0

    def watch(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield what comes, as long as it does not come in drips.

        Raises:
            _Cut: it does.
        """
        while True:
            begin = time.monotonic()  # what is done with it meanwhile may take long
            piece = next(pieces, b"")
            self._seconds += time.monotonic() - begin
            came = self._bytes + len(piece)
            if came >= PROGRESS_BYTES:
                self._tries, self._bytes, self._seconds = 0, 0, 0.0
            elif self._seconds > PROGRESS_SECONDS:
                raise _Cut(f"no more than {came:,} bytes came in {self._seconds:.0f} s")
            else:
                self._bytes = came
            if not piece:
                return
            yield piece

    def __enter__(self) -> _Patience:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> bool:
        delay = _passing(error)
        if delay is None:
            return False
        self._tries += 1
        self._seconds = 0.0
        if self._tries >= self._most or delay > MOST_PATIENCE_SECONDS:
            return False
        wait = min(FIRST_WAIT_SECONDS * 2 ** (self._tries - 1), MOST_WAIT_SECONDS)
        time.sleep(max(delay, wait * random.uniform(0.75, 1.25)))
        return True


def _patiently(ask: Callable[[], _T], tries: int = TRIES) -> _T:
    """Return what ``ask`` returns, after failures that pass."""
    patience = _Patience(tries)
    while True:
        with patience:
            return ask()


def _passing(error: BaseException | None) -> float | None:
    """Return the seconds that a failure that passes asks to wait; None of any other."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        if _is_expired(error.response):
            return 0.0
        transient = error.response.status_code in TRANSIENT
        return _retry_after(error.response) if transient else None
    return 0.0 if isinstance(error, (_Cut, httpx2.TransportError)) else None


def _is_expired(response: httpx2.Response) -> bool:
    """Tell whether a host that the hub sent us to refuses the address that it gave."""
    elsewhere = _origin(str(response.request.url)) != _origin(_endpoint())
    return elsewhere and response.status_code in EXPIRED


def _retry_after(response: httpx2.Response) -> float:
    """Return the seconds after which a server wants to be asked again."""
    from email.utils import parsedate_to_datetime

    from huggingface_hub.utils import parse_ratelimit_headers

    text = response.headers.get("retry-after", "").strip()
    if re.fullmatch(_NUMBER, text):
        return float(text)
    with suppress(*_NO_ANSWER):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    with suppress(*_NO_ANSWER):
        limit = parse_ratelimit_headers(response.headers)
        return float(limit.reset_in_seconds) if limit and not limit.remaining else 0.0
    return 0.0


@contextmanager
def answers_of_a_hub(repository: str, name: str = "") -> Iterator[None]:
    """Say that it is no hub that answers, where its client makes nothing of the answer.

    Raises:
        HubUnreachable: that is so.
    """
    import httpx2
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (HFValidationError, httpx2.TransportError):
        raise
    except (httpx2.RequestError, httpx2.InvalidURL, *_NO_ANSWER) as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise HubUnreachable(
            f"{_endpoint()} gives no answer of a hub for {name or 'what it holds'} of "
            f"{repository}: {cause}. Look whether it is one (HF_ENDPOINT), and what is between: a "
            "network may want a login in a browser first."
        ) from error


@contextmanager
def _errors(repository: str, revision: str | None, name: str = "") -> Iterator[None]:
    """Say what is wrong, and what to do about it, where the client says how it came about."""
    import httpx2
    from huggingface_hub import errors

    try:
        with answers_of_a_hub(repository, name):
            yield
    except CheckpointError:
        raise
    except (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        httpx2.TransportError,
    ) as error:
        raise _unreachable(error, repository, revision, name) from error
    except errors.HfHubHTTPError as error:
        _raise_of_status(error, repository, revision, name)
    except _Cut as error:
        raise HubUnreachable(
            f"{name} of {repository} cannot be read: {error}, again and again. Try again later: "
            "what was fetched is kept."
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"hf:{repository}: {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{name or 'what the hub says'} of {repository} cannot be kept: {error}. Make room "
            "there, or have HF_HOME name another place."
        ) from error


def _raise_of_status(error: Any, repository: str, revision: str | None, name: str) -> NoReturn:
    """Raise what an answer means for who asked.

    Raises:
        CheckpointError: always.
    """
    from huggingface_hub import errors, get_token

    status, address = error.response.status_code, page(repository)
    has_token = get_token() is not None
    grant = (
        "the token that is used (HF_TOKEN, or hf auth login's) must be of that account"
        if has_token
        else "have HF_TOKEN hold a token of that account, or log in: hf auth login"
    )
    if _is_expired(error.response):
        raise HubUnreachable(
            f"{_host(error.response)} refuses the addresses that {_endpoint()} gives for "
            f"{name or 'what it holds'} of {repository} (status {status}), again and again. Try "
            "again later: what was fetched is kept."
        ) from error
    if isinstance(error, errors.GatedRepoError):
        text = f"{repository} is gated. Ask for access at {address}, and {grant}."
    elif isinstance(error, errors.RevisionNotFoundError):
        text = (
            f"{repository} has no branch, tag or commit {revision or 'main'}, or not any more. "
            f"{address}/commits/main lists what it has."
        )
    elif isinstance(error, errors.EntryNotFoundError):
        text = f"{repository} has no file {name} at {revision}. {address} lists what it has."
    elif isinstance(error, errors.DisabledRepoError):
        text = f"{repository} is disabled by the hub, see {address}. Take another source."
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"there is no model {repository} at {_endpoint()}, or it is private. Check the name; "
            f"of a private one, {grant}."
        )
    elif status in (401, 403):
        text = (
            f"{_endpoint()} refuses access to {repository} (status {status}). See {address}; "
            f"{grant}, valid, and allowed to read it."
        )
    elif status in TRANSIENT:
        waits = _retry_after(error.response)
        when = f" It asks to be left alone for {waits:,.0f} s." if waits else ""
        raise HubUnreachable(
            f"{_host(error.response)} answers with status {status}, again and again.{when} "
            "Try again later: what was fetched is kept."
        ) from error
    else:
        reason = (error.server_message or "no reason given").partition("\n")[0][:200]
        text = (
            f"{_host(error.response)} answers with status {status} to a request for "
            f"{name or 'what it holds'} of {repository}: {reason}"
        )
    raise CheckpointError(text) from error


def _host(response: httpx2.Response) -> str:
    """Return who answered, without what an address says besides: it may be signed."""
    return f"{response.request.url.scheme}://{response.request.url.netloc.decode()}"


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def page(repository: str) -> str:
    """Return the address of a repository's page."""
    return f"{_endpoint()}/{repository}"


def _unreachable(
    error: Exception, repository: str, revision: str | None, name: str
) -> HubUnreachable:
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        at = f" at {revision}" if revision else ""
        return HubUnreachable(
            f"{name or 'what it holds'} of {repository}{at} is not on this machine, and "
            "HF_HUB_OFFLINE says that nothing is to be fetched. Unset it."
        )
    cause = cause or error
    return HubUnreachable(
        f"{_endpoint()} cannot be reached: {str(cause) or type(cause).__name__}. Check the "
        "network, HF_ENDPOINT and the proxy, and try again: what was fetched is kept."
    )

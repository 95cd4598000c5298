"""What a process has begun goes if it is killed, and never while it lives."""

import errno
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cache.blobs import CONTAINERS, Blobs, Place
from cache.store import Store

BEGINS = """\
import sys, threading
from pathlib import Path
from cache.blobs import Blobs, Place
from cache.store import Store
store = Store.at(Path(sys.argv[1]))
empty, filled = store.blobs.new_containers(2, 0)
with store.blobs.writing_at(Place(filled, 8, 4)) as writer:
    writer.write(memoryview(b"data"))
print(empty.name, filled.name, writer.digest, flush=True)
sys.stdin.read()
"""


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs" / CONTAINERS).iterdir()}


@pytest.mark.parametrize("how", [signal.SIGKILL, None])
def test_what_a_dead_process_has_begun(tmp_path: Path, how: int | None) -> None:
    """The next start removes it, whatever time it is; what a reference names stays."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEGINS, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    empty, filled, digest = process.stdout.readline().split()
    Store.at(tmp_path)  # while it lives
    assert {empty, filled} < names(tmp_path)
    if how:
        process.send_signal(how)
    process.communicate()
    store = Store.at(tmp_path)
    assert names(tmp_path) == {filled}
    (part,) = store.blobs.locate(digest, 4)
    assert (Path(part.path).name, part.offset) == (filled, 8)


def test_nothing_is_left_of_what_came_to_something(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    paths = blobs.new_containers(3, 0)
    for number, path in enumerate(paths):
        with blobs.writing_at(Place(path, 0, 1)) as writer:
            writer.write(memoryview(bytes([number])))
    assert names(tmp_path) == {path.name for path in paths}


def test_many_begin_and_start_at_once(tmp_path: Path) -> None:
    """No file goes under those who have begun it."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def start() -> None:
        while not stop.is_set():
            Store.at(tmp_path)

    def begin(thread: int) -> None:
        try:
            for number in range(40):
                blobs = Blobs(tmp_path / "blobs")
                (path,) = blobs.new_containers(1, 0)
                with blobs.writing_at(Place(path, 0, 2)) as writer:
                    writer.write(memoryview(bytes([thread, number])))
                assert blobs.has(writer.digest, 2)
        except BaseException as error:
            failures.append(error)

    starters = [threading.Thread(target=start) for _ in range(2)]
    builds = [threading.Thread(target=begin, args=[number]) for number in range(4)]
    for each in (*starters, *builds):
        each.start()
    for each in builds:
        each.join()
    stop.set()
    for each in starters:
        each.join()
    assert not failures
    assert len(names(tmp_path)) == 160


def test_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is begun is left for a garbage collection."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    (path,) = Blobs(tmp_path / "blobs").new_containers(1, 0)
    assert names(tmp_path) == {path.name}

"""A process waits for threads that the system still has, though Python has ended them."""

import threading
from pathlib import Path

import pytest

from tasks.execution import ended_threads


def test_it_waits_until_they_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended_threads, "TASKS", tmp_path)
    running = threading.get_native_id()
    for number in (running, running + 1):
        (tmp_path / str(number)).touch()
    looked = threading.Event()
    monkeypatch.setattr(ended_threads.time, "sleep", lambda _: looked.set())

    def end() -> None:
        looked.wait()
        (tmp_path / str(running + 1)).unlink()

    other = threading.Thread(target=end)
    other.start()
    ended_threads.wait([running, running + 1])
    assert looked.is_set()
    assert [each.name for each in tmp_path.iterdir()] == [str(running)]
    other.join()

"""What is done around CUDA, as far as it shows without it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from front_door import REPOSITORY
from running import DEADLINE_SECONDS
from tasks import cuda

LEAVING = """
import os, sys
from tasks import cuda

cuda.CONTROL = cuda.DEVICES = sys.argv[1]
device = os.open(sys.argv[1], os.O_WRONLY)
cuda.leave()
os.close(device)
print("left", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/fd")
def test_devices_stay_open_until_the_process_is_gone(tmp_path: Path) -> None:
    device = tmp_path / "nvidia0"
    os.mkfifo(device)
    opened = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    with subprocess.Popen(
        [sys.executable, "-c", LEAVING, str(device)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"left\n"
        assert _read(opened) is None  # empty, and still open for writing elsewhere
        process.communicate(timeout=DEADLINE_SECONDS)  # does not wait for who holds the device
    end = time.monotonic() + DEADLINE_SECONDS
    while (read := _read(opened)) is None:
        assert time.monotonic() < end, "somebody still holds it"
        time.sleep(0.001)
    assert read == b""
    os.close(opened)


def _read(descriptor: int) -> bytes | None:
    try:
        return os.read(descriptor, 1)
    except BlockingIOError:
        return None


def test_without_devices_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(threading, "Thread", refuse)
    monkeypatch.setattr(cuda, "CONTROL", "/dev/no-such-device")
    cuda.begin()
    cuda.leave()


@pytest.mark.parametrize(("wheel", "starts"), [("mlx_cuda_13", True), ("mlx_cpu", False)])
def test_cuda_is_started_where_mlx_will(
    wheel: str, starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / f"{wheel}-0.32.4.dist-info").mkdir()
    begun: list[bool] = []
    monkeypatch.setattr(cuda, "_start", lambda: begun.append(True))
    monkeypatch.setattr(cuda, "CONTROL", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "mlx", raising=False)
    cuda.begin()
    for thread in threading.enumerate():
        if thread.name == "cuda":
            thread.join()
    assert begun == [True] * starts


def test_a_missing_driver_is_left_to_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda.ctypes, "CDLL", fail)
    cuda._start()

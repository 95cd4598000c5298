"""What is done around CUDA, as far as it shows without it."""

import shutil
import sys
import threading
from pathlib import Path

import pytest

from support import checkpoints, inside
from support.projects import create
from tasks.execution import resources
from tasks.tensors import cuda, device


def test_without_devices_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(threading, "Thread", refuse)
    monkeypatch.setattr(cuda, "CONTROL", "/dev/no-such-device")
    cuda.begin()


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


def test_devices_have_keys_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what mlx-lm's `sanitize` computes, too; what is only joined is the same anywhere."""
    project = create(tmp_path, "huggingface", quantize={"bits": 4})
    shutil.rmtree(project.checkpoint)
    checkpoints.make("deepseek-v3", project.checkpoint)

    def keys() -> dict[str, str]:
        nodes = inside.session(tmp_path).plans["model"].stages
        told = [node for stage in nodes.values() for node in stage]
        return {node.name: node.spec.digest for node in told}

    monkeypatch.setattr(device, "backend", lambda _: "cpu")
    by_cpu = keys()
    monkeypatch.setattr(device, "backend", lambda _: "cuda")
    other = {name for name, key in keys().items() if key != by_cpu[name]}
    assert "unshard:model:layers.1" in other  # embed_q and unembed_out
    assert "unshard:model:embed_tokens" not in other
    assert other >= project.quantizing() - {"pack:model"} & by_cpu.keys()
    assert not any(name.startswith(("extract:", "cast:")) for name in other)


@pytest.mark.parametrize(
    ("devices", "expected"), [([None], 4), (["cpu", "gpu"], 4), (["cpu", "cpu"], 16)]
)
def test_a_gpu_is_fed_by_a_few_threads(
    devices: list[str | None], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But what is computed on the CPU beside it by as many as there are cores."""
    monkeypatch.setattr(resources, "cores", lambda: 16)
    monkeypatch.setattr(resources, "default", lambda: "gpu")
    assert resources.threads(devices) == expected

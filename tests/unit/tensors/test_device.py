"""What computes: what is for a GPU names its stream, and what names none is the CPU's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import mlx.core as mx
import pytest

from tasks.core.errors import BuildError
from tasks.layouts.fusions import Delta
from tasks.stages import fuse, quantize, segment_runner
from tasks.stages.measure import _group_sums
from tasks.stages.quantize_scheme import Setting
from tasks.stages.sensitivity import _Importance
from tasks.tensors import kernels
from tasks.tensors import mx as lazy_mx
from tasks.tensors.device import backend, default, default_to_cpu
from tasks.tensors.kernels import not_finite

# What leaves a stream brings back one default.
pytestmark = pytest.mark.usefixtures("by_cpu")
SETTINGS = [Setting(64, 4, "affine"), Setting(32, 4, "mxfp4"), Setting(16, 4, "nvfp4")]


@contextmanager
def no_default() -> Iterator[mx.Stream]:
    """Have what names no stream fail: it goes to one of another thread. Yield one of this."""
    streams: list[mx.Stream] = []
    other = Thread(target=lambda: streams.append(mx.new_stream(mx.cpu)))
    other.start()
    other.join()
    own = mx.new_stream(mx.cpu)
    with mx.stream(streams[0]):
        with pytest.raises(RuntimeError, match="Stream"):
            mx.eval(mx.zeros(1) + 1)
        yield own


@pytest.mark.parametrize("rows", [6, 7])
@pytest.mark.parametrize("setting", SETTINGS)
def test_each_operation_of_a_gpu_names_its_stream(
    setting: Setting, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "gpu_agrees", lambda *_, **__: True)
    block = mx.random.normal((rows, 128)).astype(mx.bfloat16)
    channels, by_row = mx.random.uniform(shape=(2, 128)), mx.random.uniform(shape=(rows,))
    mx.eval(block, channels, by_row, not_finite(block))  # whose bounds are the CPU's, once
    with no_default() as stream:
        packed, views, finite = quantize.quantize_block(block, setting, "gpu", stream)
        change = quantize.change(block, packed, setting, stream)
        sums = [
            _group_sums(change, setting, stream),
            _Importance(channels=channels).weigh(change, 0, 4, stream),
            _Importance(rows=by_row).weigh(change, 0, rows, stream),
        ]
        mx.eval(sums)
    expected = mx.quantize(mx.pad(block, [(0, rows % 2), (0, 0)]), **setting._asdict())
    assert finite
    assert [bytes(view) for view in views] == [
        bytes(memoryview(part[:rows].reshape(-1).view(mx.uint8))) for part in expected
    ]
    restored = mx.dequantize(*expected, **setting._asdict())[:rows]
    assert mx.array_equal(change, block.astype(mx.float32) - restored.astype(mx.float32))
    weighed = [change * channels[mx.arange(rows) // 4], change * by_row[:, None]]
    for made, wide in zip(sums[1:], weighed, strict=True):
        assert mx.allclose(made, mx.sum(wide, axis=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("transposed", [True, False])
def test_what_fuses_on_a_gpu_names_its_stream(kind: str, transposed: bool) -> None:
    weight, a, b = (mx.random.normal(shape) for shape in ((6, 8), (8, 2), (2, 6)))
    if not transposed:
        a, b = b.T, a.T
    tensors = {"a": a, "b": b, "m": mx.arange(6.0)}
    mx.eval(weight, tensors)
    delta = Delta(kind, transposed, 1.5, None, {})
    with no_default() as stream:
        fused = fuse._fuse(delta, tensors, stream, weight)
    expected = weight + ((1.5 * b.T) @ a.T if transposed else (1.5 * a) @ b)
    if kind == "dora":
        expected = (tensors["m"] / mx.linalg.norm(expected, axis=1))[:, None] * expected
    assert mx.array_equal(fused, expected)


def test_what_a_gpu_cannot_quantize_to_is_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it has no kernel, MLX returns what lay in memory."""
    monkeypatch.setattr(lazy_mx, "gpu", mx.cpu, raising=False)
    options = {"group_size": 64, "bits": 4, "mode": "affine"}
    block = mx.random.normal((4, 128))
    kernels.gpu_agrees.cache_clear()
    assert quantize.quantize_block(block, Setting(**options), "gpu", mx.default_stream(mx.cpu))
    quantized = kernels.quantize

    def left(*args: mx.array, **options: object) -> tuple[mx.array, ...]:
        return tuple(mx.zeros_like(part) for part in quantized(*args, **options))

    monkeypatch.setattr(kernels, "quantize", left)
    kernels.gpu_agrees.cache_clear()
    with pytest.raises(BuildError, match=r"cannot quantize to 4 bits in mode affine, 64 .* GPU"):
        quantize.quantize_block(block, Setting(**options), "gpu", mx.default_stream(mx.cpu))
    kernels.gpu_agrees.cache_clear()


def test_only_what_runs_a_model_alone_enters_the_stream_of_a_gpu() -> None:
    """Whose context would send what other threads compute there, too."""
    enters = re.compile(r'mx\.stream\((?!…|mx\.cpu\)|\S*streams\.get\("cpu"\))')
    folder = Path(segment_runner.__file__).parents[1]
    found = {path for path in folder.rglob("*.py") if enters.search(path.read_text("utf-8"))}
    assert found == {Path(segment_runner.__file__)}


def test_what_names_no_stream_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever MLX's own default is, which is what a target without `device` is computed on."""
    default.cache_clear()
    default_to_cpu.cache_clear()
    told: list[object] = []
    monkeypatch.setattr(lazy_mx, "default_device", lambda: mx.Device(mx.gpu), raising=False)
    monkeypatch.setattr(lazy_mx, "set_default_device", told.append, raising=False)
    try:
        default_to_cpu()
        assert told == [mx.cpu]
        monkeypatch.setattr(lazy_mx, "default_device", lambda: mx.Device(mx.cpu))
        assert default() == "gpu"
        if not (mx.metal.is_available() or mx.cuda.is_available()):
            with pytest.raises(Exception, match="no GPU"):
                backend(None)
    finally:
        default.cache_clear()
        default_to_cpu.cache_clear()

"""Blocks of a weight: how they are read, quantized and written one after another."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.blobs import Blobs, Part
from cache.store import Store
from tasks.stages.quantize import Quantize, QuantizeParams, memory, quantize_block
from tasks.stages.quantize_scheme import Setting
from tasks.stages.stage import Key
from tasks.tensors import arrays, rows
from tasks.tensors.device import BLOCK_BYTES
from tasks.tensors.kernels import dequantize, quantize

calm = settings(deadline=None)


def address(array: mx.array) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(array.view(mx.uint8))))


def raw(array: mx.array) -> bytes:
    return bytes(memoryview(array.view(mx.uint8)))


@calm
@given(data=st.data())
def test_views_together_are_the_same_bytes(data: st.DataObject) -> None:
    sizes = st.lists(
        st.tuples(
            st.sampled_from([mx.uint8, mx.float16, mx.bfloat16, mx.float32]), st.integers(1, 40)
        ),
        min_size=1,
    )
    made = [mx.random.uniform(0, 200, (n, 3)).astype(t) for t, n in data.draw(sizes)]
    apart = arrays.views(made, together=False)
    together = arrays.views(made, together=True)
    assert [bytes(view) for view in together] == [bytes(view) for view in apart]
    assert [bytes(view) for view in apart] == [raw(array.reshape(-1)) for array in made]


@calm
@given(room=st.integers(0, 400), spans=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_blocks_in_one_memory(
    tmp_path_factory: pytest.TempPathFactory, room: int, spans: list[int]
) -> None:
    """Whether a block fits into the memory or not, and whatever lies there from the last one."""
    path = tmp_path_factory.getbasetemp() / "blocks"
    whole = mx.random.normal((sum(spans), 8)).astype(mx.bfloat16)
    path.write_bytes(raw(whole))
    stored = rows.Stored(
        Blobs(path.parent), [Part(str(path), 0, whole.nbytes, None)], "bfloat16", (sum(spans), 8)
    )
    memory = arrays.blank(room)
    begin = address(memory) if room else 0
    at = 0
    for count in spans:
        block = stored.read(at, at + count, memory)
        assert raw(block) == raw(whole[at : at + count])
        assert (room > 0 and address(block) == begin) is (count * 16 <= room)
        at += count


@pytest.mark.parametrize("source", ["stored", "cast"])
@pytest.mark.parametrize("setting", [Setting(64, 4, "affine"), Setting(32, 4, "mxfp4")])
def test_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting, source: str
) -> None:
    """Each block is made before the next one lies in its place; the last of them is a short one."""
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 8 * 256 * 2)
    whole = mx.random.normal((61, 256)).astype(mx.bfloat16)
    path = tmp_path / "weights"
    path.write_bytes(raw(whole))
    store = Store.at(tmp_path / "cache")
    part = Part(str(path), 0, whole.nbytes, None)
    stored = rows.Stored(store.blobs, [part], "bfloat16", (61, 256))
    read = stored if source == "stored" else rows.Cast(stored, "float16")
    context = SimpleNamespace(
        blobs=store.blobs,
        streams=arrays.Streams(),
        writer=lambda _, size: store.blobs.writing(size),
        rows=lambda _: read,
    )
    params = QuantizeParams({"weight": setting}, device="cpu")
    made, finite = Quantize().quantize(Key("cast", "weight"), setting, params, context)
    assert finite
    wanted = quantize(whole.astype(getattr(mx, read.dtype)), **setting._asdict())
    for tensor, array in zip(made.values(), wanted, strict=True):
        assert tensor.shape == array.shape
        assert store.blobs.path(tensor.digest).read_bytes() == raw(array)


@pytest.mark.parametrize("number", [1, float("inf")], ids=["finite", "inf"])
def test_memory_of_a_block(number: float) -> None:
    """What MLX's own would take forty times the block for, where it is asked itself, as well."""
    setting = Setting(16, 4, "nvfp4")
    with mx.stream(mx.cpu):
        # Three groups a row: of an odd number of rows MLX's own would take none.
        block = mx.random.normal((32 * 681, 48)).astype(mx.bfloat16)  # almost BLOCK_BYTES
        block[5, 7] = number
        expected = quantize(block, **setting._asdict())
        mx.eval(block, expected)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        _, views, finite = quantize_block(block, setting, "cpu")
        taken = mx.get_peak_memory() - before
    assert finite is (number == 1)
    assert [bytes(view) for view in views] == [raw(array) for array in expected]
    assert taken + block.nbytes < 1.5 * memory("cpu")  # it varies with what threads do when


@pytest.mark.parametrize("number", [1, 1e31, float("inf")])
@pytest.mark.parametrize("count", [3, 65])
def test_an_odd_number_of_nvfp4_groups(number: float, count: int) -> None:
    """MLX's own takes an even number on a CPU; blocks of such a weight may have another."""
    setting = Setting(16, 4, "nvfp4")
    with mx.stream(mx.cpu):
        whole = mx.random.normal((count + 1, 48)).astype(mx.bfloat16)
        whole[1, 7] = number
        expected = [part[:count] for part in quantize(whole, **setting._asdict())]
        packed, views, finite = quantize_block(whole[:count], setting, "cpu")
        if finite:  # of the other one, some of a group is NaN
            wanted = mx.dequantize(*quantize(whole, **setting._asdict()), None, **setting._asdict())
            assert mx.array_equal(dequantize(packed, **setting._asdict()), wanted[:count])
    assert [bytes(view) for view in views] == [raw(mx.contiguous(part)) for part in expected]
    assert finite is (number != float("inf"))

"""What quantizes on the CPU in a faster way than MLX's own: the same to the bit, for any bits."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.blobs import Blobs, Part
from cache.store import Store
from tasks import arrays, rows
from tasks.config import MODES
from tasks.kernels import LARGE, agrees, not_finite, quantize, quantize_fast
from tasks.quantize import BLOCK_BYTES, Setting, _quantize_block, _quantize_rows

SETTINGS = [
    Setting(group_size, bits, mode)
    for mode, (group_sizes, all_bits) in MODES.items()
    for group_size in group_sizes
    for bits in all_bits
]
RAW = {mx.float16: np.uint16, mx.bfloat16: np.uint16, mx.float32: np.uint32}
# By dtype, what rounding and comparing treat in a way of its own: zeros, the least and the greatest
# subnormal, the least and the greatest normal number, infinity, NaNs, quiet and not.
EDGES = {
    mx.float16: [0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x7FFF],
    mx.bfloat16: [0, 1, 0x7F, 0x80, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF],
    mx.float32: [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000,
                 0x7FFFFFFF],
}  # fmt: skip
SIZES = (1e-38, 1e-7, 0.05, 6e4, 1e12, 1e38)
calm = settings(deadline=None)


def numbers(dtype: mx.Dtype, shape: tuple[int, ...], seed: int, size: float | None) -> np.ndarray:
    """The bits of random numbers of about one size, or any bits at all."""
    if size is None:
        raw = RAW[dtype]
        return np.random.default_rng(seed).integers(0, np.iinfo(raw).max, shape, raw, endpoint=True)
    normal = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    with np.errstate(over="ignore"):
        wide = mx.array(normal * np.float32(size)).astype(dtype)
    return np.array(wide.view(mx.uint32 if dtype == mx.float32 else mx.uint16))


def bits(dtype: mx.Dtype, shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """`numbers`, strewn with edges of either sign."""
    sign = 1 << (8 * RAW[dtype]().itemsize - 1)
    edges = st.sampled_from([*EDGES[dtype], *(edge | sign for edge in EDGES[dtype])])
    places = st.lists(st.tuples(st.integers(0, int(np.prod(shape)) - 1), edges), max_size=3)

    def strewn(seed: int, size: float | None, told: list[tuple[int, int]]) -> np.ndarray:
        array = numbers(dtype, shape, seed, size)
        for place, edge in told:
            array.reshape(-1)[place] = edge
        return array

    return st.builds(strewn, st.integers(0, 2**31), st.sampled_from([None, *SIZES]), places)


def address(array: mx.array) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(array.view(mx.uint8))))


def raw(array: mx.array) -> bytes:
    return bytes(memoryview(array.view(mx.uint8)))


@pytest.mark.parametrize("dtype", EDGES, ids=str)
def test_blocks_are_quantized_as_mlx_does(dtype: mx.Dtype) -> None:
    @settings(deadline=None, max_examples=100)
    @given(data=bits(dtype, (2, 256)), setting=st.sampled_from(SETTINGS))
    def check(data: np.ndarray, setting: Setting) -> None:
        with mx.stream(mx.cpu):
            weight = mx.array(data).view(dtype)
            expected = quantize(weight, **setting._asdict())
            found, views, finite = _quantize_block(weight, setting, "cpu")
            assert finite is mx.isfinite(weight).all().item()
        assert [(a.dtype, a.shape) for a in found] == [(a.dtype, a.shape) for a in expected]
        assert [bytes(view) for view in views] == [raw(array) for array in expected]

    for setting in SETTINGS:  # each for certain with any bits at all, and with numbers of each size
        for size in [None, *SIZES]:
            check.hypothesis.inner_test(numbers(dtype, (2, 256), 0, size), setting)
    check()


@pytest.mark.parametrize("dtype", EDGES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_quantize_fast(dtype: mx.Dtype, setting: Setting) -> None:
    """The fast way is taken, and by itself gives the same bits whatever the largest of a group is:
    each number of 16 bits."""
    told = setting._asdict()
    random = np.random.default_rng(0)
    narrow = dtype if dtype != mx.float32 else mx.bfloat16
    with mx.stream(mx.cpu):
        assert agrees(dtype, **told)
        largest = mx.array(np.arange(EDGES[narrow][5], dtype=np.uint16)).view(narrow)
        if setting.mode != "affine":
            largest = mx.where(largest < LARGE, largest, mx.array(1, narrow))
        shares = random.uniform(-1, 1, (largest.size, setting.group_size)).astype(np.float32)
        shares[:, 0] = random.choice([-1, 1], largest.size)
        shares[: largest.size // 8] = np.abs(shares[: largest.size // 8])  # groups of one sign
        shares[-largest.size // 8 :] = -np.abs(shares[-largest.size // 8 :])
        weight = (largest[:, None].astype(mx.float32) * mx.array(shares)).astype(dtype)
        weight = weight.reshape(-1, 128)
        found, odd = quantize_fast(weight, **told)
        expected = quantize(weight, **told)
        assert not odd.item()
        assert [(a.dtype, a.shape) for a in found] == [(a.dtype, a.shape) for a in expected]
        assert [raw(array) for array in found] == [raw(array) for array in expected]


def test_another_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLX that quantizes in another way is asked itself."""

    def other(weight: mx.array, group_size: int, bits: int, mode: str) -> list[mx.array]:
        return [part + 1 for part in made(weight, group_size, bits, mode)]

    made = mx.quantize
    setting = Setting(64, 4, "affine")
    weight = mx.random.normal((4, 128)).astype(mx.float16)
    monkeypatch.setattr(mx, "quantize", other)
    agrees.cache_clear()
    try:
        with mx.stream(mx.cpu):
            found, _, _ = _quantize_block(weight, setting, "cpu")
            expected = other(weight, **setting._asdict())
            assert [raw(array) for array in found] == [raw(array) for array in expected]
    finally:
        agrees.cache_clear()


@pytest.mark.parametrize("dtype", EDGES, ids=str)
def test_not_finite(dtype: mx.Dtype) -> None:
    @calm
    @given(data=bits(dtype, (3, 32)))
    def check(data: np.ndarray) -> None:
        weight = mx.array(data).view(dtype)
        assert not_finite(weight).item() is (not mx.isfinite(weight).all().item())

    check()


@pytest.mark.parametrize("dtype", EDGES, ids=str)
def test_not_finite_of_one_odd_number(dtype: mx.Dtype) -> None:
    """Each edge, of either sign, by itself among finite numbers of either sign."""
    sign = 1 << (8 * RAW[dtype]().itemsize - 1)
    infinity = EDGES[dtype][5]
    for edge in EDGES[dtype]:
        for number in (edge, edge | sign):
            for other in (0, sign, infinity - 1, sign | (infinity - 1)):
                weight = mx.array(np.array([other, number, other], RAW[dtype])).view(dtype)
                assert not_finite(weight).item() is (edge >= infinity), hex(number)


@calm
@given(data=st.data())
def test_views_together_are_the_same_bytes(data: st.DataObject) -> None:
    sizes = st.lists(st.tuples(st.sampled_from([mx.uint8, *RAW]), st.integers(1, 40)), min_size=1)
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
    builder = SimpleNamespace(store=store, streams=arrays.Streams())
    made, finite = _quantize_rows(builder, read, setting, "cpu")
    assert finite
    wanted = quantize(whole.astype(getattr(mx, read.dtype)), **setting._asdict())
    for tensor, array in zip(made.values(), wanted, strict=True):
        assert tensor.shape == array.shape
        assert store.blobs.path(tensor.digest).read_bytes() == raw(array)

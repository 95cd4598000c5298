"""What quantizes on the CPU in a faster way than MLX's own: the same to the bit, for any bits."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.quantization import MODES
from tasks.stages.quantize import quantize_block
from tasks.stages.quantize_scheme import Setting
from tasks.tensors import kernels, modes
from tasks.tensors.kernels import agrees, not_finite, quantize, quantize_fast

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


def raw(array: mx.array) -> bytes:
    return bytes(memoryview(array.view(mx.uint8)))


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found of the installed MLX is forgotten, before and afterwards."""
    agrees.cache_clear()
    yield
    agrees.cache_clear()


@pytest.mark.parametrize("dtype", EDGES, ids=str)
def test_blocks_are_quantized_as_mlx_does(dtype: mx.Dtype) -> None:
    @settings(deadline=None, max_examples=100)
    @given(data=bits(dtype, (2, 256)), setting=st.sampled_from(SETTINGS))
    def check(data: np.ndarray, setting: Setting) -> None:
        with mx.stream(mx.cpu):
            weight = mx.array(data).view(dtype)
            expected = quantize(weight, **setting._asdict())
            found, views, finite = quantize_block(weight, setting, "cpu")
            assert finite is mx.isfinite(weight).all().item()
        assert [(a.dtype, a.shape) for a in found] == [(a.dtype, a.shape) for a in expected]
        assert [bytes(view) for view in views] == [raw(array) for array in expected]

    for setting in SETTINGS:  # each for certain with any bits at all, and with numbers of each size
        for size in [None, *SIZES]:
            check.hypothesis.inner_test(numbers(dtype, (2, 256), 0, size), setting)
    check()


def largest(dtype: mx.Dtype, mode: str) -> mx.array:
    """What may be the largest of a group: each number of 16 bits, below 2³⁰. In float32, bfloat16's
    and, beside what a scale of mxfp4 or mxfp8 changes at, numbers that log2 cannot tell from it."""
    narrow = mx.bfloat16 if dtype == mx.float32 else dtype
    numbers = mx.array(np.arange(EDGES[narrow][5], dtype=np.uint16)).view(narrow)
    numbers = mx.where(numbers < 2**30, numbers, mx.array(1, narrow)).astype(dtype)
    if dtype != mx.float32:
        return numbers
    changes = np.float32({"mxfp8": 448}.get(mode, 6)) * np.exp2(np.arange(-126, 20), dtype="f4")
    beside = changes.view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)
    return mx.concatenate([numbers, mx.array(beside.reshape(-1)).view(mx.float32)])


@pytest.mark.parametrize("dtype", EDGES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_quantize_fast(dtype: mx.Dtype, setting: Setting) -> None:
    """The fast way is taken, and by itself gives the same bits whatever the largest of a group."""
    told = setting._asdict()
    random = np.random.default_rng(0)
    with mx.stream(mx.cpu):
        assert agrees(dtype, **told)
        most = largest(dtype, setting.mode)
        most = most[: most.size // 128 * 128, None]  # whole rows of whole groups
        shares = random.uniform(-1, 1, (most.size, setting.group_size)).astype(np.float32)
        shares[:, 0] = random.choice([-1, 1], most.size)
        shares[::7] = np.abs(shares[::7])  # groups of one sign
        shares[1::7] = -np.abs(shares[1::7])
        shares[2::7] = shares[2::7, :1]  # and of one number
        weight = (most.astype(mx.float32) * mx.array(shares)).astype(dtype).reshape(-1, 128)
        found, large = quantize_fast(weight, **told)
        expected = quantize(weight, **told)
        assert not large.item()
        assert [(a.dtype, a.shape) for a in found] == [(a.dtype, a.shape) for a in expected]
        assert [raw(array) for array in found] == [raw(array) for array in expected]


@pytest.mark.parametrize("dtype", EDGES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_large(dtype: mx.Dtype, mode: str) -> None:
    (group_size, *_), (bits, *_) = MODES[mode]
    bound = mx.array(2.0**30, dtype)  # float16's infinity
    below = (bound.view(mx.uint32 if dtype == mx.float32 else mx.uint16) - 1).view(dtype)
    for number, is_large in ((bound, True), (below, False), (mx.array(np.nan, dtype), True)):
        for one in (number, -number):
            weight = mx.concatenate([mx.zeros((127,), dtype), one[None]])[None]
            told = {"group_size": group_size, "bits": bits, "mode": mode}
            assert quantize_fast(weight, **told)[1].item() is is_large


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("mode", "part"),
    [(mode, part) for mode in MODES for part in range(3 if mode == "affine" else 2)],
)
def test_another_mlx(monkeypatch: pytest.MonkeyPatch, mode: str, part: int) -> None:
    """An MLX that quantizes in another way, be it one part, is asked itself."""

    def other(
        weight: mx.array, group_size: int, bits: int, mode: str, stream: mx.Stream | None = None
    ) -> list[mx.array]:
        parts = list(made(weight, group_size, bits, mode))
        parts[part] = parts[part] + 1
        return parts

    made = mx.quantize
    (group_size, *_), (bits, *_) = MODES[mode]
    setting = Setting(group_size, bits, mode)
    monkeypatch.setattr(mx, "quantize", other)
    with mx.stream(mx.cpu):
        weight = mx.random.normal((37, 128)).astype(mx.float16)
        found, _, _ = quantize_block(weight, setting, "cpu")
        expected = other(weight, **setting._asdict())
        assert [raw(array) for array in found] == [raw(array) for array in expected]


def test_bits_that_only_mlx_takes() -> None:
    """It quantizes them itself."""
    others = {*modes.numbers("affine")[1]} - {*MODES["affine"][1]}
    with mx.stream(mx.cpu):
        weight = mx.random.normal((37, 128)).astype(mx.bfloat16)
        for bits in others:
            found, _, _ = quantize_block(weight, Setting(64, bits, "affine"), "cpu")
            assert [raw(array) for array in found] == [
                raw(a) for a in mx.quantize(weight, 64, bits)
            ]


def test_a_gpu_quantizes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "agrees", None)
    monkeypatch.setattr(kernels, "gpu_agrees", lambda *_, **__: True)
    with mx.stream(mx.cpu):
        weight = mx.random.normal((2, 128))
        found, _, _ = quantize_block(weight, Setting(64, 4, "affine"), "gpu")
        assert [raw(array) for array in found] == [raw(a) for a in mx.quantize(weight, 64, 4)]


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

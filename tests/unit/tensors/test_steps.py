"""Each step on stored tensors, block by block, as NumPy does it on whole ones."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cache.blobs import Blobs, Part
from cache.files.stamp import Stamp
from tasks.tensors import rows, steps
from tasks.tensors.arrays import view

# On a busy machine any example may seem slow.
calm = settings(deadline=None)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unshard") / "tensors"


def stored(file: Path, arrays: list[np.ndarray]) -> list[rows.Rows]:
    """Arrays one after another in a file, each begun by a byte that is nobody's."""
    file.write_bytes(b"".join(b"?" + array.tobytes() for array in arrays))
    stamp, found, offset = Stamp.of(file), [], 0
    for array in arrays:
        part = Part(str(file), offset + 1, array.nbytes, stamp)
        found.append(rows.Stored(Blobs(file.parent), [part], array.dtype.name, array.shape))
        offset += 1 + array.nbytes
    return found


def made(sources: list[rows.Rows], told: list, block_bytes: int) -> np.ndarray:
    whole = steps.apply(sources, steps.read(told))
    data = b"".join(bytes(view(block)) for block in rows.blocks(whole, block_bytes))
    return np.frombuffer(data, whole.dtype).reshape(whole.shape)


def interleaved_to_half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head becomes row i, row 2i + 1 becomes row i + d / 2."""
    d = len(weight) // heads
    order = [
        head * d + 2 * i + odd for head in range(heads) for odd in (0, 1) for i in range(d // 2)
    ]
    return weight[order]


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


small = st.integers(1, 5)


@calm
@given(heads=small, pairs=small, width=small, block_bytes=st.integers(1, 300), count=small)
def test_half_split(
    file: Path, heads: int, pairs: int, width: int, block_bytes: int, count: int
) -> None:
    """Of a whole tensor, of copies, and of slices whose borders need not be those of heads."""
    whole = numbered(heads * 2 * pairs, width)
    expected = interleaved_to_half_split(whole, heads)
    assert np.array_equal(np.array(rows.half_split(mx.array(whole), heads=heads)), expected)
    step = ["half_split", heads]
    assert np.array_equal(made(stored(file, [whole]), [step], block_bytes), expected)
    copies = stored(file, [whole] * count)
    assert np.array_equal(made(copies, [["same"], step], block_bytes), expected)
    assume(len(whole) % count == 0)
    slices = stored(file, np.split(whole, count))
    assert np.array_equal(made(slices, [["concatenate", 0], step], block_bytes), expected)
    # A rotation of pairs is one of halves: turning back gives the rows as they were.
    back = expected.reshape(heads, 2, pairs, width).swapaxes(1, 2).reshape(whole.shape)
    assert np.array_equal(back, whole)


@calm
@given(
    shape=st.lists(small, min_size=1, max_size=3),
    count=small,
    axis=st.integers(0, 2),
    step=st.sampled_from(["concatenate", "stack"]),
    block_bytes=st.integers(1, 300),
)
def test_joins(
    file: Path, shape: list[int], count: int, axis: int, step: str, block_bytes: int
) -> None:
    assume(axis < len(shape) + (step == "stack"))
    arrays = [numbered(*shape) + 1000 * i for i in range(count)]
    expected = np.concatenate(arrays, axis) if step == "concatenate" else np.stack(arrays, axis)
    assert np.array_equal(made(stored(file, arrays), [[step, axis]], block_bytes), expected)

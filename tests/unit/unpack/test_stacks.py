"""Experts of one kind are unpacked in one go: the numbers are those of each by itself."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from cache.blobs import Blobs, Part
from cache.files.stamp import Stamp
from tasks.tensors import rows, steps
from tasks.tensors.arrays import dtype_name, view
from tasks.unpack import registry

COUNT, HIGH, WIDE = 5, 6, 64
BITS, GROUP_SIZE = 4, 32


def fp8(scales: tuple[int, ...]) -> list[tuple[mx.array, ...]]:
    return [
        (mx.random.randint(0, 127, (HIGH, WIDE)).astype(mx.uint8), mx.random.uniform(shape=scales))
        for _ in range(COUNT)
    ]


def affine() -> list[tuple[mx.array, ...]]:
    weights = [mx.random.normal((HIGH, WIDE)) for _ in range(COUNT)]
    return [tuple(mx.quantize(weight, GROUP_SIZE, BITS)) for weight in weights]


def stored(arrays: list[mx.array], folder: Path) -> list[rows.Stored]:
    sources = []
    for array in arrays:
        path = folder / str(len([*folder.iterdir()]))
        path.write_bytes(bytes(view(array)))
        part = Part(str(path), 0, array.nbytes, Stamp.of(path))
        sources.append(rows.Stored(Blobs(folder), [part], dtype_name(array), array.shape))
    return sources


def read(tensor: rows.Rows) -> bytes:
    return b"".join(bytes(view(block)) for block in rows.blocks(tensor, 4 * WIDE * 4))


def torchao(groups: int) -> list[tuple[mx.array, ...]]:
    return [
        (
            mx.random.randint(-128, 127, (HIGH, WIDE)).astype(mx.int8),
            mx.random.uniform(shape=(HIGH, groups)),
            mx.random.randint(-128, 127, (HIGH, groups)).astype(mx.int8),
        )
        for _ in range(COUNT)
    ]


@pytest.mark.parametrize(
    ("name", "tensors", "how"),
    [
        ("block_fp8", fp8((2, 2)), {"block": [4, 32]}),
        ("torchao", torchao(1), {"kind": "int8", "bits": 8, "group_size": -1}),
        ("torchao", torchao(4), {"kind": "int8", "bits": 8, "group_size": 16}),
        ("torchao", fp8((HIGH, 1)), {"kind": "fp8", "block": [1, WIDE]}),
    ],
)
def test_in_one_tensor(name: str, tensors: list, how: dict, tmp_path: Path) -> None:
    """So are those that a checkpoint has in one tensor already."""
    inputs = len(tensors[0])

    def made(sources: list[rows.Stored], shape: list[int]) -> rows.Rows:
        told = ["unpack", name, "float32", [[1, shape, inputs, how]]]
        return registry.apply(sources, steps.read([told]))

    whole = stored([mx.stack(parts) for parts in zip(*tensors, strict=True)], tmp_path)
    each = stored([array for parts in tensors for array in parts], tmp_path)
    single = [made(each[at : at + inputs], [HIGH, WIDE]) for at in range(0, len(each), inputs)]
    assert read(made(whole, [COUNT, HIGH, WIDE])) == b"".join(map(read, single))


@pytest.mark.parametrize(
    ("name", "tensors", "how"),
    [
        ("block_fp8", fp8((2, 3)), {"block": [4, 24]}),
        ("block_fp8", fp8((2, 2)), {"block": [4, 32]}),
        ("block_fp8", fp8((1,)), {"block": [HIGH, WIDE]}),
        ("scaled_fp8", fp8((HIGH, 1)), {"block": [1, WIDE]}),
        ("scaled_fp8", fp8((HIGH,)), {"block": [1, WIDE]}),
        ("scaled_fp8", fp8((1, WIDE)), {"block": [HIGH, 1]}),
        ("scaled_fp8", fp8(()), {"block": [HIGH, WIDE]}),
        ("mlx", affine(), {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}),
    ],
)
def test_a_stack(name: str, tensors: list[tuple[mx.array, ...]], how: dict, tmp_path: Path) -> None:
    sources = stored([array for parts in tensors for array in parts], tmp_path)
    inputs = len(tensors[0])

    def made(sources: list[rows.Stored], count: int) -> rows.Rows:
        packing = [count, [HIGH, WIDE], inputs, how]
        told = ["unpack", name, "bfloat16", [packing]]
        return registry.apply(sources, steps.read([told, ["stack", 0]] if count > 1 else [told]))

    whole = made(sources, COUNT)
    assert whole.shape == (COUNT, HIGH, WIDE)
    assert len(list(rows.spans(whole, 4 * WIDE * 4))) < COUNT  # blocks do not end with experts
    each = [made(sources[at : at + inputs], 1) for at in range(0, len(sources), inputs)]
    assert read(whole) == b"".join(map(read, each))
    numbers = np.frombuffer(read(whole), np.uint16)
    assert len({*numbers}) > HIGH

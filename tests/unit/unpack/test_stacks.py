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
    sources = []
    for array in (array for parts in tensors for array in parts):
        path = tmp_path / str(len(sources))
        path.write_bytes(bytes(view(array)))
        part = Part(str(path), 0, array.nbytes, Stamp.of(path))
        sources.append(rows.Stored(Blobs(tmp_path), [part], dtype_name(array), array.shape))
    inputs = len(tensors[0])

    def made(sources: list[rows.Stored], count: int) -> rows.Rows:
        packing = [count, [HIGH, WIDE], inputs, how]
        told = ["unpack", name, "bfloat16", [packing]]
        return registry.apply(sources, steps.read([told, ["stack", 0]] if count > 1 else [told]))

    def read(tensor: rows.Rows) -> bytes:
        return b"".join(bytes(view(block)) for block in rows.blocks(tensor, 4 * WIDE * 4))

    whole = made(sources, COUNT)
    assert whole.shape == (COUNT, HIGH, WIDE)
    assert len(list(rows.spans(whole, 4 * WIDE * 4))) < COUNT  # blocks do not end with experts
    each = [made(sources[at : at + inputs], 1) for at in range(0, len(sources), inputs)]
    assert read(whole) == b"".join(map(read, each))
    numbers = np.frombuffer(read(whole), np.uint16)
    assert len({*numbers}) > HIGH

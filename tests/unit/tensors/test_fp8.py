"""Numbers of E4M3 times their scales: as MLX decodes them, to the bit."""

import mlx.core as mx
import numpy as np
import pytest

from tasks.tensors import fp8

ODD = (0.0, 1e-42, 2.0**-126, -3.5, 127.9, 128.0, 1e30, np.inf, np.nan)


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("odd", [None, *ODD])
@pytest.mark.parametrize(("columns", "block"), [(256, 32), (256, 256), (255, 32), (24, 128)])
def test_all_numbers(columns: int, block: int, odd: float | None, nan: bool) -> None:
    octets = np.arange(600 * columns, dtype=np.uint32).astype(np.uint8).reshape(600, columns)
    if not nan:
        octets[octets % 128 == 127] = 3
    generator = np.random.default_rng(0)
    scales = generator.uniform(-1, 100, (600, -(-columns // block))).astype(np.float32)
    if odd is not None:
        scales[7, -1] = odd
    numbers = mx.from_fp8(mx.array(octets), dtype=mx.float32)
    wanted = numbers * mx.repeat(mx.array(scales), block, axis=1)[:, :columns]
    found = fp8.scaled(mx.array(octets), mx.array(scales), block)
    same = np.array(found).view(np.uint32) == np.array(wanted).view(np.uint32)
    assert (same | (np.isnan(found) & np.isnan(wanted))).all()
    assert nan or odd is not None or not np.isnan(found).any()

"""Rounding by Hessians: as the paper has it, and the same to the bit in any threads of BLAS."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from tasks.quality import gptq

ROUND = """
import hashlib
import mlx.core as mx
import numpy as np
from tasks.quality import gptq
from tasks.tensors import blas

numbers = np.random.default_rng(0)
hessian = np.zeros((1536, 1536), np.float32)
blas.add_gram(hessian, numbers.standard_normal((2000, 1536)).astype(np.float32))
weight = mx.array(numbers.standard_normal((64, 1536)).astype(np.float32))
order = gptq.order(lambda: [hessian[:1000], hessian[1000:]], 1536, 64)
packed = gptq.quantize(weight, order, group_size=64, bits=4)
print(*(hashlib.md5(np.array(a).tobytes()).hexdigest() for a in (hessian, *order, *packed)))
"""


def test_threads_do_not_matter() -> None:
    """Unguarded, the factor of a matrix this large has other bits in one thread than in two."""
    made = set()
    for threads in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", ROUND],
            env=os.environ | {"OPENBLAS_NUM_THREADS": threads},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=True,
        )
        made.add(done.stdout)
    assert len(made) == 1


def test_it_is_what_the_paper_has() -> None:
    """By rows of a factor of the inverse, a channel at a time: more than are factored together."""
    channels, group_size, rows = 1280, 64, 8
    numbers = np.random.default_rng(1)
    size = numbers.random(channels) + 0.1
    inputs = (numbers.standard_normal((2000, channels)) * size).astype(np.float32)
    hessian = inputs.T @ inputs
    weight = numbers.standard_normal((rows, channels)).astype(np.float32)
    order = gptq.order(lambda: [hessian[:1000], hessian[1000:]], channels, group_size)
    packed = gptq.quantize(mx.array(weight), order, group_size=group_size, bits=4)
    made = np.array(mx.dequantize(*packed, group_size=group_size, bits=4))

    damped = hessian.astype(np.float64)
    damped[np.diag_indices(channels)] += gptq.DAMPING * np.diagonal(damped).mean()
    damped = damped[np.ix_(order.channels, order.channels)]
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight[:, order.channels].astype(np.float64)
    expected = np.empty_like(left)
    for at in range(channels):
        if at % group_size == 0:
            group = mx.array(left[:, at : at + group_size].astype(np.float32))
            _, *both = mx.quantize(group, group_size, 4)
            scale, bias = (np.array(each)[:, 0] for each in both)
        code = np.clip(np.rint((left[:, at] - bias) / scale), 0, 15)
        expected[:, at] = code * scale + bias
        error = (left[:, at] - expected[:, at]) / factor[at, at]
        left[:, at:] -= np.outer(error, factor[at, at:])
    np.testing.assert_allclose(made[:, order.channels], expected, atol=1e-4)

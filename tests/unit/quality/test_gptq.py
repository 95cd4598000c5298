"""Rounding by Hessians: the same to the bit, whatever BLAS is told of threads."""

import os
import subprocess
import sys
from pathlib import Path

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

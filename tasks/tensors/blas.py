"""blas: NumPy's library of matrix products, kept to one thread."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import TYPE_CHECKING, Any

from tasks.tensors import mx

if TYPE_CHECKING:
    import numpy as np


@functools.cache
def one_thread() -> None:
    """Have BLAS use one thread from now on, in all of this process.

    How it cuts a factorization into pieces depends on how many threads it has, and so do the last
    bits. Threads that work on a layer each are no fewer for it. Accelerate, which NumPy may have on
    macOS, has no such setting.
    """
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")


def gram(rows: np.ndarray) -> np.ndarray:
    """Return the products of columns, (columns, columns): the same to the bit in any threads.

    Args:
        rows: (rows, columns), float32.
    """
    one_thread()
    made: np.ndarray = rows.T @ rows
    return made


def linear(module: Any, x: mx.array) -> mx.array:
    """Return what an ``mlx.nn.Linear`` makes, which MLX's wheels for Linux take ages for on a CPU.

    They have the reference BLAS. Products are of float32, whatever the inputs are of.

    Args:
        module: with a weight, (rows, columns), and perhaps a bias, (rows,).
        x: (…, columns).
    """
    import numpy as np

    one_thread()
    wide = (each.astype(mx.float32) for each in (x, module.weight))
    given, weight = (np.array(each, copy=False) for each in wide)
    flat = given.reshape(-1, given.shape[-1]) @ weight.T
    made = mx.array(flat).reshape(*x.shape[:-1], -1).astype(x.dtype)
    return made + module.bias if "bias" in module else made


def version() -> str:
    """Return NumPy's version, for keys of what depends on the last bits of its products."""
    return metadata.version("numpy")

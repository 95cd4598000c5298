"""blas: NumPy's library of matrix products, kept to one thread."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import TYPE_CHECKING, Any

from tasks.tensors import mx

if TYPE_CHECKING:
    import numpy as np


COLUMNS = 2048  # of which products are added up at once


@functools.cache
def one_thread() -> None:
    """Have BLAS use one thread from now on, in all of this process.

    How it cuts a factorization into pieces depends on how many threads it has, and so do the last
    bits. Threads that work on a layer each are no fewer for it. Accelerate, which NumPy may have on
    macOS, has no such setting.
    """
    import threadpoolctl

    threadpoolctl.threadpool_limits(1, user_api="blas")


def add_gram(total: np.ndarray, rows: np.ndarray) -> None:
    """Add the products of columns to a total: the same to the bit in any threads.

    Args:
        total: (columns, columns), float32.
        rows: (rows, columns), float32.
    """
    one_thread()
    columns = rows.shape[1]
    if columns <= COLUMNS:
        total += rows.T @ rows
        return
    for start in range(0, columns, COLUMNS):  # what is symmetric, once
        stop = min(start + COLUMNS, columns)
        products = rows[:, start:stop].T @ rows[:, start:]
        total[start:stop, start:] += products
        total[stop:, start:stop] += products[:, stop - start :].T


def gram_memory(columns: int) -> int:
    """Return the bytes that ``add_gram`` takes beside the total."""
    return 4 * columns * min(columns, COLUMNS)


def linear(module: Any, x: mx.array) -> mx.array:
    """Return what an ``mlx.nn.Linear`` makes, which MLX's wheels for Linux take ages for on a CPU.

    They have the reference BLAS. Products are of float32, whatever the inputs are of; the result
    is of the type that MLX makes of both.

    Args:
        module: with a weight, (rows, columns), and perhaps a bias, (rows,).
        x: (…, columns).
    """
    made = product(x, module.weight.T)
    return made + module.bias if "bias" in module else made


def product(x: mx.array, weight: mx.array) -> mx.array:
    """Return a product, made in float32: of the type that MLX makes of both.

    Args:
        x: (…, rows).
        weight: (rows, columns).
    """
    import numpy as np

    one_thread()
    wide = (each.astype(mx.float32) for each in (x, weight))
    given, by = (np.array(each, copy=False) for each in wide)
    made = given.reshape(-1, given.shape[-1]) @ by
    return mx.array(made).reshape(*x.shape[:-1], -1).astype(mx.result_type(x, weight))


def version() -> str:
    """Return NumPy's version, for keys of what depends on the last bits of its products."""
    return metadata.version("numpy")

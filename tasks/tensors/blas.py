"""blas: NumPy's library of matrix products, kept to one thread."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import TYPE_CHECKING

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


def version() -> str:
    """Return NumPy's version, for keys of what depends on the last bits of its products."""
    return metadata.version("numpy")

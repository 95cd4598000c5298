"""cuda: memory that an NVIDIA GPU reads and writes where it lies, as Metal's does by itself."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache

import mlx.core as mx

# cuda.h: what cuMemAdvise is told.
PREFERRED_LOCATION, ACCESSED_BY = 3, 5
CPU, FIRST_GPU = -1, 0


def share(memory: memoryview) -> None:
    """Have a GPU read and write memory of MLX's where it lies, with the CPU.

    CUDA moves it page by page, to whichever side touches it, unless it is told to leave it there.
    That is advice: whether it is taken or not, the bits are the same.
    """
    if memory.nbytes and mx.cuda.is_available():
        with suppress(OSError):  # a driver by another name
            _advise(ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory.nbytes)


@cache  # MLX gives the same memory again and again
def _advise(address: int, count: int) -> None:
    advise = ctypes.CDLL("libcuda.so.1").cuMemAdvise
    advise.argtypes = (ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int, ctypes.c_int)
    advise(address, count, PREFERRED_LOCATION, CPU)
    advise(address, count, ACCESSED_BY, FIRST_GPU)

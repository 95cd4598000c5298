"""cuda: advice to NVIDIA's driver, and start-up work, that Metal does not need."""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tasks.tensors import mx

# cuda.h: advice for cuMemAdvise.
PREFERRED_LOCATION, ACCESSED_BY = 3, 5
CPU, FIRST_GPU = -1, 0
CONTROL = "/dev/nvidiactl"  # exists where a driver is installed, on Linux


def begin() -> None:
    """Begin to start CUDA in a thread, if the MLX that is installed would start it.

    It takes 0.2 to 0.3 s, in which Python goes on. MLX's import does the same, but holds Python's
    global lock. A few hundred MB of the GPU's memory are taken from here on.
    """
    if os.path.exists(CONTROL) and _in_mlx():
        threading.Thread(target=_start, name="cuda").start()


def _in_mlx() -> bool:
    """Tell whether the MLX that is installed has the CUDA backend (a wheel of its own)."""
    spec = find_spec("mlx")
    folders = spec.submodule_search_locations if spec else None
    return any(any(Path(folder).parent.glob("mlx_cuda*")) for folder in folders or ())


def _start() -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    with suppress(OSError, AttributeError):  # MLX meets the same error, and reports it
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), FIRST_GPU) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # MLX's, too


def share(memory: memoryview) -> None:
    """Let a GPU read and write memory of MLX where it lies, beside the CPU.

    CUDA moves it page by page to whichever side touches it, unless it is advised to leave it there.
    Whether the advice is taken or not, the bits are the same.
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

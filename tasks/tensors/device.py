"""device: what computes (CPU, Metal or CUDA), and how large its blocks are."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from tasks.core.errors import ConfigError
from tasks.tensors import mx

# An operation costs some microseconds to begin: smaller blocks take longer, larger ones only more
# memory. A GPU pays by the call, though not for so long that Metal's watchdog minds.
BLOCK_BYTES = {"cpu": 2 << 20, "gpu": 32 << 20}


def backend(device: str | None) -> str:
    """Return the backend of a device: ``cpu``, ``metal``, ``cuda``. Their results differ in bits.

    Args:
        device: ``cpu``, ``gpu``, or None for MLX's default device.

    Raises:
        ConfigError: MLX has no GPU here.
    """
    if device == "cpu" or (device is None and mx.default_device().type == mx.cpu):
        return "cpu"
    if mx.metal.is_available():
        return "metal"
    if mx.cuda.is_available():
        return "cuda"
    raise ConfigError(
        'device = "gpu", but MLX finds no GPU on this machine. Use device = "cpu", or leave it '
        "out for MLX's own default."
    )


def device_of(backend: str) -> str:
    """Return the device, ``cpu`` or ``gpu``, of a backend."""
    return "cpu" if backend == "cpu" else "gpu"


def alone(device: str) -> AbstractContextManager[object]:
    """Keep other threads' matrix products off a GPU meanwhile; may be entered again.

    MLX's CUDA backend returns wrong numbers where several threads multiply at once.
    """
    return _one_at_a_time if device == "gpu" else nullcontext()


_one_at_a_time = threading.RLock()

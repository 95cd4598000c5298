"""device: what computes (CPU, Metal or CUDA), and how large its blocks are."""

from __future__ import annotations

from functools import cache

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
    if (device or default()) == "cpu":
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


@cache
def default() -> str:
    """Return MLX's own default device, ``cpu`` or ``gpu``, as it is before ``default_to_cpu``."""
    return "gpu" if mx.default_device().type == mx.gpu else "cpu"


@cache
def default_to_cpu() -> None:
    """Have all operations that name no stream go to the CPU from now on, in every thread.

    MLX's default device is one for all threads: ``with mx.stream(…)`` of another device in one
    thread changes where the operations of the others go, which then have other bits. So the default
    stays the same while actions run. What computes on a GPU names its stream; a stage that has a
    model's own code compute there, which names none, runs alone (``Stage.runs_alone``).
    """
    default()
    mx.set_default_device(mx.cpu)

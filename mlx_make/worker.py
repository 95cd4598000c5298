"""worker: the preload that makes a Dask worker one of mlx-make: ``mlx-make worker`` names it.

Its cache is the folder that ``MLX_MAKE_CACHE_DIR`` names, or goes with the worker.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_make.command import SOURCE

if TYPE_CHECKING:
    from distributed import Worker

MEMORY_SHARE = 0.5  # of what the worker may take: Dask ends one that takes all


def dask_setup(worker: Worker) -> None:
    """Have a worker make layers: Dask calls this as it starts."""
    if str(SOURCE) not in sys.path:  # of an installed mlx-make
        sys.path.insert(0, str(SOURCE))
    # By one thread: units import them in several, which Python 3.11 was seen to fail at.
    import httpx2  # noqa: F401
    import huggingface_hub.errors  # noqa: F401

    from cache.store import Store
    from tasks.execution.cluster import machine, scheduler
    from tasks.execution.cluster.workbench import Workbench
    from tasks.execution.resources import MemoryBudget, machine_memory, raise_file_limit
    from tasks.tensors import cuda

    cuda.begin()
    raise_file_limit()
    own = Path(worker.local_directory) / "mlx-make"
    folder = os.environ.get("MLX_MAKE_CACHE_DIR")
    store = Store.at(Path(folder).expanduser().absolute() if folder else own / "cache")
    memory = worker.memory_manager.memory_limit or machine_memory()
    bench = Workbench(store, own, worker.address, MemoryBudget(int(memory * MEMORY_SHARE)))

    async def read(**asked: Any) -> Any:
        from distributed.protocol import to_serialize

        data = await asyncio.to_thread(lambda: bench.read(**asked))
        return None if data is None else to_serialize(data)

    setattr(worker, scheduler.ATTRIBUTE, bench)
    worker.handlers[scheduler.HANDLER] = read
    resources = machine.resources(worker.state.nthreads)
    worker.state.total_resources |= resources
    worker.state.available_resources |= resources


def dask_teardown(worker: Worker) -> None:
    """Let go of remote stores: Dask calls this as it ends."""
    from tasks.execution.cluster import scheduler

    if bench := getattr(worker, scheduler.ATTRIBUTE, None):
        bench.close()

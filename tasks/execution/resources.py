"""resources: how many threads a run has, and how much memory and disk its actions may take."""

from __future__ import annotations

import os
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from tasks.execution import cgroup
from tasks.tensors.device import default

GPU_THREADS = 4
CLUSTER_THREADS = 256
_ALWAYS_OPEN = 24  # files: the terminal, locks, a connection or two
_OPEN_PER_THREAD = 6  # what it reads and writes, a lock, and as many for packing beside it


def raise_file_limit(*, waits: bool = False) -> None:
    """Let this process open as many files as threads on all cores want, as far as it may.

    Args:
        waits: whether other threads wait for a cluster, each with a lock and a connection.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _open_files(_own_cores()) + 2 * CLUSTER_THREADS * waits
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def cores() -> int:
    """Return how many cores this process may use: as many as its threads may open files for."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _own_cores()
    return max(1, min(_own_cores(), (limit - _ALWAYS_OPEN) // _OPEN_PER_THREAD))


def _open_files(threads: int) -> int:
    return _ALWAYS_OPEN + _OPEN_PER_THREAD * threads


def _own_cores() -> int:
    """Return how many cores a process has, or how many's time."""
    affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(count, cgroup.limits().cores or count))


def cluster_threads() -> int:
    """Return how many tasks are begun at once where a cluster makes them: they wait for it.

    As many as layers are to be under way, on whatever it has; more are begun as they end.
    """
    raise_file_limit(waits=True)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = CLUSTER_THREADS if limit == resource.RLIM_INFINITY else limit - _open_files(_own_cores())
    return max(cores(), min(CLUSTER_THREADS, free // 2))


def threads(devices: Iterable[str | None]) -> int:
    """Return how many tasks run at once: as many as there are cores, fewer where a GPU computes.

    A few threads feed a GPU, and more only wait for each other (on 16 cores with an H100, 8 threads
    take 0.8 of the time of 16). With 4 the first layer is done sooner, so that packing can begin.

    Args:
        devices: the targets' ``device``; read only where there is a GPU.
    """
    on_gpu = default() == "gpu" and any(device != "cpu" for device in devices)
    return min(cores(), GPU_THREADS) if on_gpu else cores()


class MemoryBudget:
    """A limit on the bytes that actions hold at once: few large layers run together, many small.

    Args:
        limit: bytes; one action that needs more runs alone.
        most: actions that run at once; another one within one of them is not counted.
    """

    def __init__(self, limit: int, most: int = sys.maxsize) -> None:
        self.limit = limit
        self._reserved = 0
        self._free = most
        self._changed = threading.Condition()
        self._thread = threading.local()

    @contextmanager
    def reserve(self, need: int) -> Iterator[None]:
        """Reserve ``need`` bytes, when they are free. An action within another does not wait."""
        need = min(need, self.limit)
        nested = getattr(self._thread, "depth", 0)
        self._thread.depth = nested + 1
        with self._changed:
            self._changed.wait_for(
                lambda: nested or (self._free and self._reserved + need <= self.limit)
            )
            self._reserved += need
            self._free -= not nested
        try:
            yield
        finally:
            self._thread.depth = nested
            with self._changed:
                self._reserved -= need
                self._free += not nested
                self._changed.notify_all()


def machine_memory() -> int:
    """Return the bytes of memory that this process may use."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(physical, cgroup.limits().memory or physical)


class DiskBudget:
    """A limit on the bytes from elsewhere that lie on the disk at once; who came first goes first.

    Args:
        limit: bytes; one reservation that is larger waits until nothing else is reserved.
    """

    def __init__(self, limit: int = sys.maxsize) -> None:
        self.limit = limit
        self.reserved = 0
        self._queue: list[object] = []
        self._stopped: Exception | None = None
        self._changed = threading.Condition()

    def reserve(self, need: int, waits: Callable[[], None]) -> None:
        """Reserve bytes, when they are free.

        Args:
            need: how many.
            waits: called, if they are not yet, before this waits.

        Raises:
            Exception: that nothing more is given back for, see ``stop``.
        """
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            free = self._is_free(ticket, need)
        if not free:
            waits()  # who gives back may hold what this takes
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._is_free(ticket, need))
            self._queue.remove(ticket)
            self._changed.notify_all()
            if self._stopped:
                raise self._stopped
            self.reserved += need

    def reserve_at_once(self, need: int) -> None:
        """Reserve bytes, whether or not they are free: for who holds what others wait for."""
        with self._changed:
            self.reserved += need

    def give_back(self, count: int) -> None:
        """Give reserved bytes back."""
        with self._changed:
            self.reserved -= count
            self._changed.notify_all()

    def stop(self, cause: Exception) -> None:
        """Let nobody wait any more: ``cause`` is raised instead."""
        with self._changed:
            self._stopped = self._stopped or cause
            self._changed.notify_all()

    @property
    def is_short(self) -> bool:
        """Whether anybody waits."""
        return bool(self._queue)

    def _is_free(self, ticket: object, need: int) -> bool:
        first = self._queue[0] is ticket
        return first and (not self.reserved or self.reserved + need <= self.limit)

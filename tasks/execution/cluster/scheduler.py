"""scheduler: what a coordinator asks of Dask: who is there, what they are, and a blob's bytes.

What runs within the scheduler, or in a worker that is none of ours, travels as code and not by
name: mlx-make need not be installed there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future as Coming
from dataclasses import dataclass
from typing import Any, NamedTuple

import dask
from dask.utils import parse_timedelta
from distributed import Client, Future, get_worker

from cache.errors import CacheError, one_line
from cache.records.manifests import Tensor
from tasks.execution.cluster.machine import PREFIX
from tasks.execution.cluster.unit import Cannot, Made

ANSWER_SECONDS = 30  # for one piece, or the scheduler's word
TOLD_SECONDS = 5  # in which a worker that is none of ours says what it is
SILENT_SECONDS = 30  # after which a worker that sends no heartbeat is given up, at the latest
PIECE_BYTES = 4 << 20
PIECES = 3  # that are under way of one tensor
HANDLER = "mlx_make_read"
ATTRIBUTE = "mlx_make"  # of a worker: its workbench, and what it says of itself


class Gone(CacheError):
    """The cluster, or a worker, does not answer."""


class Member(NamedTuple):
    """A worker, as the scheduler has it.

    Attributes:
        address: where it is reached.
        resources: what it offers.
        is_silent: whether it is another's, and sends no heartbeat.
    """

    address: str
    resources: dict[str, float]
    is_silent: bool


def make(request: bytes, key: str, layers: Sequence[tuple[str, str]]) -> Made | Cannot:
    """Make a unit: run in a worker, which has a workbench, since it offers our resources."""
    made: Made | Cannot = getattr(get_worker(), ATTRIBUTE).make(request, key, layers)
    return made


def survey() -> Callable[..., Any]:
    """Return what tells the scheduler's workers, and removes those of ours that are silent.

    Frozen, or cut off without a word: Dask's own limit is minutes (``worker-ttl``), and stays that
    of others' workers, whose data is not ours to lose.
    """

    async def look(
        patience: float, prefix: str, dask_scheduler: Any = None
    ) -> tuple[str, list[Any]]:
        import time

        now, workers = time.time(), []
        for address, state in [*dask_scheduler.workers.items()]:
            is_ours = any(name.startswith(prefix) for name in state.resources)
            is_silent = now - state.last_seen > patience
            if is_ours and is_silent:
                await dask_scheduler.remove_worker(
                    address, stimulus_id=f"mlx-make-silent-{now}", expected=True
                )
            else:
                workers.append((address, dict(state.resources), is_silent))
        return dask_scheduler.id, workers

    return look


def inquiry(attribute: str, packages: Sequence[str]) -> Callable[..., Any]:
    """Return what tells of a worker that offers nothing of ours what it is."""

    def ask(dask_worker: Any = None) -> Any:
        import socket
        from importlib.metadata import PackageNotFoundError, version

        name = socket.gethostname().split(".")[0]
        if hasattr(dask_worker, attribute):
            bench = getattr(dask_worker, attribute)
            return name, bench.facts, bench.classes
        found = {}
        for package in packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "none"
        return name, None, found

    return ask


def _gone(error: BaseException) -> Gone:
    return Gone(one_line(f"{type(error).__name__} {error}".strip()))


@dataclass
class Connection:
    """A client of a scheduler. Safe in threads.

    Attributes:
        client: Dask's.
        address: as models.toml has it.
    """

    client: Client
    address: str

    @classmethod
    def open(cls, address: str) -> Connection:
        """Connect to the scheduler at an address, or that a file of Dask's names.

        How long that is tried, also where the connection is lost, Dask's own settings say
        (``distributed.comm.timeouts.connect``).

        Raises:
            Gone: nobody answers.
        """
        for name in ("distributed", "distributed.client", "distributed.core"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what is amiss, we say
        keys: dict[str, Any] = (
            {"address": address} if "://" in address else {"scheduler_file": address}
        )
        try:
            if "scheduler_file" in keys and not os.path.exists(address):
                raise Gone(f"{address} does not exist")
            client = Client(**keys, set_as_default=False, name="mlx-make")
        except (OSError, TimeoutError, ValueError) as error:
            raise Gone(one_line(str(error)) or type(error).__name__) from error
        return cls(client, address)

    @property
    def is_open(self) -> bool:
        """Whether the scheduler is there, or may be again in a moment."""
        return self.client.status in ("running", "connecting")

    def members(self) -> tuple[str, list[Member]]:
        """Return the scheduler's id, and the workers without those of ours that are silent.

        Raises:
            Gone: the scheduler does not answer.
        """
        limit = dask.config.get("distributed.scheduler.worker-ttl")  # where it is less than ours
        patience = min(SILENT_SECONDS, parse_timedelta(limit) if limit else SILENT_SECONDS)
        scheduler, found = self._ask(self.client.run_on_scheduler, survey(), patience, PREFIX)
        return scheduler, [Member(*each) for each in found]

    def describe(self, workers: Sequence[str], packages: Sequence[str]) -> Mapping[str, Any]:
        """Return what workers say of themselves, by address; of an error, that.

        Raises:
            Gone: the scheduler does not answer.
        """
        asked = inquiry(ATTRIBUTE, packages)

        async def answer(worker: str) -> Any:  # each has its own time: one that is frozen has none
            answers = self.client.run(asked, workers=[worker], on_error="return", asynchronous=True)
            try:
                return (await asyncio.wait_for(answers, TOLD_SECONDS))[worker]
            except TimeoutError:
                return TimeoutError(f"it says nothing for {TOLD_SECONDS} s")

        async def all_answers() -> list[Any]:
            return await asyncio.gather(*map(answer, workers))

        return dict(zip(workers, self._sync(all_answers), strict=True))

    def _ask(self, call: Callable[..., Any], *args: Any, **keys: Any) -> Any:
        async def answer() -> Any:
            return await asyncio.wait_for(call(*args, **keys, asynchronous=True), ANSWER_SECONDS)

        return self._sync(answer)

    def _sync(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return self.client.sync(call, *args)
        except Exception as error:  # of any kind: tornado's, asyncio's, a pickle's
            raise _gone(error) from error

    def submit(
        self,
        key: str,
        arguments: tuple[Any, ...],
        resource: str,
        workers: Sequence[str] | None,
        priority: int,
    ) -> Future:
        """Have a unit made.

        Args:
            key: of the task: whoever asks for the same meanwhile waits for this one.
            arguments: of ``make``.
            resource: that a worker must offer.
            workers: those that may; None, any.
            priority: the highest is begun first, of all that wait.

        Raises:
            Gone: the connection is closed.
        """
        try:
            return self.client.submit(
                make,
                *arguments,
                key=key,
                resources={resource: 1},
                workers=workers,
                priority=priority,
                pure=True,
            )
        except Exception as error:  # of any kind: it is closed in the middle of it
            raise _gone(error) from error

    def pieces(self, worker: str, tensor: Tensor) -> Iterator[memoryview]:
        """Yield a blob's bytes from a worker, a few pieces of it under way at once.

        Raises:
            Gone: the worker does not answer, or has it no more.
        """
        starts = iter(range(0, tensor.nbytes, PIECE_BYTES))
        coming: deque[Coming[Any]] = deque()
        try:
            while True:
                try:
                    while len(coming) < PIECES and (start := next(starts, None)) is not None:
                        coming.append(self._piece(worker, tensor, start))
                    if not coming:
                        return
                    data = coming.popleft().result(2 * ANSWER_SECONDS)
                except Exception as error:  # of any kind, as above
                    raise _gone(error) from error
                if data is None:
                    raise Gone(f"it has {tensor.digest} no more")
                yield memoryview(data).cast("B")
        finally:
            for each in coming:
                each.cancel()

    def _piece(self, worker: str, tensor: Tensor, start: int) -> Coming[Any]:
        length = min(PIECE_BYTES, tensor.nbytes - start)

        async def read() -> Any:
            asked = getattr(self.client.rpc(worker), HANDLER)(
                digest=tensor.digest, nbytes=tensor.nbytes, offset=start, length=length
            )
            return await asyncio.wait_for(asked, ANSWER_SECONDS)

        return asyncio.run_coroutine_threadsafe(read(), self.client.loop.asyncio_loop)

    def close(self) -> None:
        """Let go of the scheduler, which forgets what nobody else asked for."""
        self.client.close(timeout=5)

"""state_lock: one process at a time works on the state beside a models.toml."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.files import atomic, trash
from tasks.core.program import COMMAND
from tasks.core.workspace import BUILD, STATE, TRASH


@contextmanager
def alone(models: Path) -> Iterator[None]:
    """Hold the lock of the state beside a models.toml; wait for whoever holds it, and say who.

    What a build that was killed had begun to pack, or to remove, is removed then.
    """
    if not models.exists():  # loading the tasks says so, and must leave no state behind
        yield
        return
    state = models.absolute().parent / STATE
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            print(f"waiting for {COMMAND}, process {holder}, which works here", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        trash.remove_behind(*(state / TRASH).glob(f"{atomic.TEMPORARY}*"))
        for left in state.with_name(BUILD).glob(f"{atomic.TEMPORARY}*"):
            if (state / "manifests" / left.name.removeprefix(atomic.TEMPORARY)).exists():
                trash.discard(left, state / TRASH)
        yield

"""ended_threads: those that a process must not end before, though Python says that they have ended.

What MLX compiled in a thread is freed as the thread goes, which takes Python's lock. A process that
ends meanwhile gives that to nobody, and is aborted: "terminate called without an active exception".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path

TASKS = Path("/proc/self/task")  # Linux's
LONGEST_SECONDS = 5.0
ELSEWHERE_SECONDS = 0.05  # where nothing tells whether a thread is gone
STEP_SECONDS = 0.001


def wait(threads: Iterable[int]) -> None:
    """Wait until threads are gone, but for those that Python still runs.

    Args:
        threads: their numbers, as the system has them.
    """
    running = {thread.native_id for thread in threading.enumerate()}
    ended = set(threads) - running
    if ended and not TASKS.is_dir():
        time.sleep(ELSEWHERE_SECONDS)
        return
    end = time.monotonic() + LONGEST_SECONDS
    while any((TASKS / str(each)).exists() for each in ended) and time.monotonic() < end:
        time.sleep(STEP_SECONDS)

"""What runs at once: what there is memory for."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.execution.resources import MemoryBudget

PATIENCE_SECONDS = 20  # after which threads that do not end have locked each other out


# Class Memory. A plan is what each thread's actions hold, with what actions within them hold.
ACTIONS = st.lists(st.tuples(st.integers(0, 15), st.lists(st.integers(0, 15), max_size=2)))


@settings(deadline=None, max_examples=50)
@given(limit=st.integers(1, 12), plan=st.lists(ACTIONS, min_size=1, max_size=6))
def test_never_more_than_the_limit(limit: int, plan: list[list[tuple[int, list[int]]]]) -> None:
    memory, lock, held, wrong = MemoryBudget(limit), threading.Lock(), [0], []

    def work(actions: list[tuple[int, list[int]]]) -> None:
        for need, within in actions:
            with memory.reserve(need):
                with lock:
                    held[0] += min(need, limit)
                    if held[0] > limit:
                        wrong.append(held[0])
                time.sleep(0.0002)
                for more in within:
                    with memory.reserve(more), memory.reserve(more):
                        pass
                with lock:
                    held[0] -= min(need, limit)

    threads = [threading.Thread(target=work, args=(actions,), daemon=True) for actions in plan]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    with memory.reserve(limit):  # all of it is free again
        pass


def test_what_fits_runs_together() -> None:
    memory, meet = MemoryBudget(10), threading.Barrier(2)

    def work() -> None:
        with memory.reserve(5):
            meet.wait(PATIENCE_SECONDS)  # broken, if the other may not run meanwhile

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not meet.broken


def test_a_failed_action_gives_its_bytes_back() -> None:
    memory = MemoryBudget(10)
    with pytest.raises(KeyError), memory.reserve(10), memory.reserve(3):
        raise KeyError
    done = threading.Event()

    def work() -> None:
        with memory.reserve(10):
            done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(PATIENCE_SECONDS)

"""How long it still takes, told by the pace so far."""

import pytest

from tasks.cli.terminal.progress import Pace


def test_time_left_follows_a_change_of_pace() -> None:
    pace = Pace()
    pace.see(0.0, 0, 0)
    pace.see(0.1, 500, 0)  # all of it was in the cache
    assert pace.left(0.1, 1000) is None  # too early
    for second in range(1, 21):
        pace.see(float(second), 500 + 10 * second, 1000 * second)
    assert pace.left(20.0, 1000) == pytest.approx(30)
    assert pace.rate(20.0) == pytest.approx(1000)
    assert pace.left(22.0, 1000) == pytest.approx(28)  # a task that takes long
    assert pace.left(60.0, 1000) is None

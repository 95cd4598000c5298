"""Words for figures."""

import pytest

from tasks.core.text import duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1:00 min"),
        (3599.6, "1:00:00 h"),
        (7325, "2:02:05 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said

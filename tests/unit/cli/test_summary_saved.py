"""What the cache saved, by the build log."""

import pytest

from tasks.cli.commands import summary
from tasks.execution.log import Entry


@pytest.mark.parametrize(("took", "saved"), [(2.0, "0.0"), (0.25, "0.8")])
def test_what_a_busy_machine_reuses_slowly_saves_nothing(took: float, saved: str) -> None:
    def entry(outcome: str, seconds: float) -> Entry:
        return Entry("run", "quantize:model:norm", outcome, "", 0.0, seconds, 0, 0, "thread")

    history = [entry("computed", 1.0), entry("reused", took)]
    assert summary.saved(history[1:], history).startswith(f"Time saved: {saved} s of work")

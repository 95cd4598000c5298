"""A handful of what benchmarks/cuts.py does by the hundred."""

import pytest

from support import cuts


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> cuts.Cuts:
    return cuts.Cuts(tmp_path_factory.mktemp("cuts"))


@pytest.mark.parametrize("harm", ["SIGKILL", "SIGTERM", "EIO", "EMFILE"])
def test_the_next_build_is_whole(harm: str, attempts: cuts.Cuts) -> None:
    outcome, detail = attempts.attempt(harm, 0)
    assert outcome != "wrong", detail

"""Files of people and strangers, damaged at random: read as their own libraries do, or refused."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.inputs import Inputs

HARMLESS = ("read right", "refused", "refused by torch alone")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(number=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
def test_a_damaged_file(files: Inputs, number: int, seed: int) -> None:
    """Of weights, models.toml or models.lock; those beside a checkpoint are planned with."""
    outcome = files.attempt(seed, [*files.kinds][number])
    assert outcome.outcome in HARMLESS, outcome.detail


def test_a_damaged_file_beside_weights(files: Inputs) -> None:
    for kind in [*files.kinds][4:]:
        for seed in range(6):
            outcome = files.attempt(seed, kind)
            assert outcome.outcome in HARMLESS, outcome.detail

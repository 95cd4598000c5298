"""conftest: what the tests' environment must not say, and what no test leaves behind."""

import os
from collections.abc import Iterator

import pytest

from support import running
from tasks.config import tables

# Else whoever sets them would run other tests than everybody.
for name, table in (("cache", tables.Cache), ("build", tables.Build)):
    for key in table.__struct_encode_fields__:
        os.environ.pop(tables.variable(name, key), None)

for name in ("COLUMNS", "LINES"):  # of the terminal that pytest is started from
    os.environ.pop(name, None)

# Else each doit that the tests start compiles all its modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Tests are not what goes on after a power cut: benchmarks/cuts.py is. And disks take their time.
os.fsync = lambda _: None

running.heed_interrupts()


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: much of the time tests wait, for servers and locks."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(params=[True, False], ids=["ctime", "no ctime"])
def has_ctime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the disk tells when the system last saw a checkpoint's file change."""
    if not request.param:
        for module in ("headers", "checkpoint"):
            monkeypatch.setattr(f"tasks.checkpoints.{module}.changed_at", lambda _: 0)
    return request.param


@pytest.fixture
def by_cpu() -> Iterator[None]:
    """MLX's default device is the CPU, as it is while actions run, also where there is a GPU."""
    import mlx.core as mx

    from tasks.tensors import device

    own = device.default()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(getattr(mx, own))


@pytest.fixture(autouse=True)
def reaped() -> Iterator[None]:
    """No process outlives the test that started it."""
    yield
    running.reap()

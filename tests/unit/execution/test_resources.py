"""What runs at once: what there is memory for."""

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.execution import cgroup, resources
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


GB = 10**9
V2 = ["/ /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate"]
V1 = [
    "/ /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755",
    "/ /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct",
    "/ /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
    "/ /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd",
]
UNLIMITED = "9223372036854771712"  # as v1 says it


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "cores", "memory"),
    [
        ("0::/", V2, {"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ("0::/", V2, {"cpu.max": "250000 100000", "memory.max": "7000000000"}, 3, 7 * GB),
        ("0::/", V2, {"memory.max": "max", "memory.high": "3000000000"}, None, 3 * GB),
        (
            "0::/a.slice/b.scope",
            V2,
            {
                "a.slice/memory.max": "4000000000",
                "a.slice/b.scope/memory.max": "9000000000",
                "a.slice/b.scope/cpu.max": "50000 100000",
                "a.slice/cpu.max": "400000 100000",
                "memory.max": "8000000000",
                "other/memory.max": "1",
            },
            1,
            4 * GB,
        ),
        (
            "11:cpu,cpuacct:/job\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/",
            V1,
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": UNLIMITED,
                "memory/docker/memory.limit_in_bytes": "2000000000",
                "memory/docker/abc/memory.limit_in_bytes": UNLIMITED,
            },
            2,
            2 * GB,
        ),
        (  # a container of v1 sees its own group alone, by the path that it has outside
            "4:memory:/docker/abc",
            ["/docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory"],
            {"memory/memory.limit_in_bytes": "5000000000"},
            None,
            5 * GB,
        ),
        ("0::/../../elsewhere", V2, {"memory.max": "6000000000"}, None, 6 * GB),
        (
            "0::/a b",
            ["/ /sys/fs/cgroup rw - cgroup2 none rw", r"/ /mnt/a\040b rw - ext4 /dev/sda rw"],
            {"a b/memory.max": "1000000000"},
            None,
            GB,
        ),
        ("", [], {}, None, None),
    ],
)
def test_limits_of_control_groups(
    groups: str,
    mounts: list[str],
    files: dict[str, str],
    cores: int | None,
    memory: int | None,
    tmp_path: Path,
) -> None:
    mountinfo = "\n".join(f"{i} 23 0:28 {mount}" for i, mount in enumerate(mounts, 30))
    proc = {"proc/self/cgroup": groups, "proc/self/mountinfo": mountinfo}
    for name, text in {**proc, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n" if text else "")
    found = cgroup.limits(tmp_path)
    assert (found.cores, found.memory and min(found.memory, 10**12)) == (cores, memory)


def test_a_run_keeps_within_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    cores, memory = resources.cores(), resources.machine_memory()
    for limits, kept in (
        (cgroup.Limits(1, GB), (1, GB)),
        (cgroup.Limits(10_000, 1 << 62), (cores, memory)),
        (cgroup.Limits(None, None), (cores, memory)),
    ):
        monkeypatch.setattr(cgroup, "limits", lambda told=limits: told)
        assert (resources.cores(), resources.machine_memory()) == kept

"""cgroup: what Linux control groups leave a process of cores and memory.

A process is in one group of each hierarchy, and every group above it sets limits too. cgroup v2 has
one hierarchy, v1 one for each controller, and a system may have both (man 7 cgroups; the kernel's
admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst).
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_BYTES = ("memory.max", "memory.high", "memory.limit_in_bytes")  # over high, v2 slows a group down


class Limits(NamedTuple):
    """What a process may use; None: no limit.

    Attributes:
        cores: by the CPU time that it gets, rounded up.
        memory: bytes.
    """

    cores: int | None
    memory: int | None


@functools.cache
def limits(root: Path = Path("/")) -> Limits:
    """Return the tightest limits of this process's groups; none where there are no groups.

    Args:
        root: under which /proc and the hierarchies are mounted.
    """
    cores: list[int] = []
    memory: list[int] = []
    for group in _groups(root):
        quota = _numbers(group, "cpu.max") or _numbers(
            group, "cpu.cfs_quota_us", "cpu.cfs_period_us"
        )
        if quota:
            time, period = quota
            cores.append(math.ceil(time / period))
        memory += [n for name in _BYTES for n in _numbers(group, name)]
    return Limits(min(cores, default=None), min(memory, default=None))


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folder of each group that this process is in, and of those above it."""
    paths: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)  # v2's is of no controller
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        system, _, options = kind.split(maxsplit=2)
        hierarchy = {"cgroup": options.split(","), "cgroup2": [""]}.get(system, [])
        top, point = (_unescaped(text) for text in mount.split()[3:5])
        folder = root / point.lstrip("/")
        for path in {paths[name] for name in hierarchy if name in paths}:
            # A container's mount begins at its own group: those above are not to be seen.
            inner = os.path.relpath(path, top)
            group = folder if inner.startswith("..") else folder / inner
            yield from (each for each in (group, *group.parents) if each.is_relative_to(folder))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def _numbers(group: Path, *names: str) -> list[int]:
    """Return the numbers in a group's files; none where one is not there or says no limit."""
    words = [word for name in names for line in _lines(group / name) for word in line.split()]
    return [int(word) for word in words] if all(map(str.isdigit, words)) else []

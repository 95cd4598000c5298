"""stamp: tells a changed file from the one last seen, without reading it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Stamp(NamedTuple):
    """What tells, without reading it, that a file is the one last seen."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path | int) -> Stamp:
        """Return the stamp of the file at ``path``, links followed, or of an open one."""
        return cls.of_stat(os.stat(path))

    @classmethod
    def of_stat(cls, stat: os.stat_result) -> Stamp:
        """Return the stamp in what ``os.stat`` told."""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)

    def is_changed(self, before: Stamp) -> bool:
        """Tell whether a file was written to, between two looks of one run.

        Its inode alone says nothing: some network disks make them up at each look.
        """
        return self[:2] != before[:2]


def changed_at(path: str | Path) -> int:
    """Return when the system last saw a file change, in ns (ctime): no tool sets that back.

    It is no part of a stamp, since a second name or another permission moves it as well: what is
    looked into for it comes out the same. There are disks that do not have it.
    """
    return os.stat(path).st_ctime_ns

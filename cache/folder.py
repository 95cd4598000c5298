"""folder: tells a cache's folder from any other, in which nothing is ever removed.

A cache's folder is marked with a ``CACHEDIR.TAG`` (https://bford.info/cachedir/), by which backups
leave it out, too. One that an older version made is known by what lies in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cache.errors import CacheError
from cache.files.own import UNWRITABLE

TAG = "CACHEDIR.TAG"
CONTENT = b"""Signature: 8a477f597d28d172789f06886806bc55
# This folder is a cache of mlx-make: all in it can be made again.
"""
_OWN = {"blobs", "actions", "memos", "corrupt", "turn", "lock", TAG}
_NOBODYS = {"lost+found", ".DS_Store", ".gitignore", ".gitkeep"}
MAX_NAMES = 3


class NotACache(CacheError):
    """A folder that holds something else.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path, names: list[str]) -> None:
        more = ", …" if len(names) > MAX_NAMES else ""
        super().__init__(
            f"{root} is no cache: it holds {', '.join(names[:MAX_NAMES])}{more}, and what a cache "
            "does not need is removed from it."
        )
        self.root = root


def check(root: Path) -> None:
    """Refuse a folder that holds anything but a cache; it need not exist.

    Raises:
        NotACache: it does.
    """
    if _is_tagged(root):
        return
    try:
        names = sorted(set(os.listdir(root)) - _NOBODYS)
    except FileNotFoundError:
        return
    if not set(names) <= _OWN and not any(_results(root)):
        raise NotACache(root, names)


def claim(root: Path) -> None:
    """Make a folder a cache's, and mark it, unless it is.

    Raises:
        NotACache: it holds something else.
    """
    if _is_tagged(root):
        return
    check(root)
    root.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(root / TAG, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno in UNWRITABLE:  # it may be read all the same
            return
        raise
    with open(descriptor, "wb") as file:
        file.write(CONTENT)


def _is_tagged(root: Path) -> bool:
    with suppress(OSError):
        return (root / TAG).read_bytes() == CONTENT
    return False


def _results(root: Path) -> Iterator[Path]:
    """Yield files that only a cache has."""
    for path in (*(root / "actions").glob("*/*.json"), *(root / "memos").glob("*/*/*.json")):
        if re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{30}\.json", f"{path.parent.name}/{path.name}"):
            yield path

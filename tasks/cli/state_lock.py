"""state_lock: one process at a time works on the state beside a models.toml."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cache.errors import printable
from cache.files import atomic, own, trash
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.workspace import STATE, TRASH, Workspace
from tasks.execution.filling import place

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of a file system without


@contextmanager
def alone(models: Path) -> Iterator[None]:
    """Hold the lock of the state beside a models.toml; wait for whoever holds it, and say who.

    What a build that was killed had begun to pack, or to remove, is removed then.

    Raises:
        Linked: the lock is a link, and so perhaps another project's.
    """
    if not models.exists():  # loading the tasks says so, and must leave no state behind
        yield
        return
    state = models.absolute().parent / STATE
    _make(state)
    with open(state / "lock", "a+", encoding="utf-8", opener=own.open_own) as lock:
        _wait_for(lock)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        trash.remove_behind(*(state / TRASH).glob(f"{atomic.TEMPORARY}*"))
        _clear_all(Workspace(state.parent))
        yield


def _clear_all(workspace: Workspace) -> None:
    """Clear the folders of all targets, of which there may be a thousand: few are touched."""
    with suppress(FileNotFoundError, NotADirectoryError):
        targets = os.listdir(workspace.state / "manifests")
        with os.scandir(workspace.built("")) as entries:
            # A link leads to where else nobody looks.
            there = [
                e.name for e in entries if e.is_symlink() or e.name.startswith(atomic.TEMPORARY)
            ]
        some = {name.removeprefix(atomic.TEMPORARY).removesuffix("~") for name in there}
        for target in some.intersection(targets):
            _clear(workspace, target)


def _clear(workspace: Workspace, target: str) -> None:
    """Remove what a killed build had begun to pack; what it had moved away is moved back."""
    try:
        folder = place.folder_of(workspace, target)
    except BuildError:  # which is told of when the target is planned
        return
    new, aside = place.beside(folder), place.aside(folder)
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    for left in filter(os.path.lexists, (new, aside)):
        trash.discard(left, workspace.trash)


def _make(state: Path) -> None:
    """Make the folder of the state, which git is to leave alone."""
    state.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(ignored := state / ".gitignore"):
        atomic.write(ignored, b"*\n")


def _wait_for(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = printable(lock.read(20).strip()) or "unknown"
        print(f"waiting for {COMMAND}, process {holder}, which works here", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"warning: {lock.name} cannot be locked ({error.strerror}): do not run two builds "
            "here at once",
            file=sys.stderr,
        )

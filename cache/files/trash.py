"""trash: removes files and folders, large ones in the background."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

_removers: list[threading.Thread] = []  # those that may still run
_changing = threading.Lock()  # held while the list changes


def remove(path: Path) -> None:
    """Remove a file or a folder that others may remove as well."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path, trash: Path) -> None:
    """Remove a folder, if it exists, in the background; its name is free at once.

    A disk takes up to half a second a GB. Python waits for the removal before it exits; if the
    process is killed first, ``remove_behind`` finishes the work in a later one.

    Args:
        folder: what to remove.
        trash: a folder on the same file system to move it to. If it is on another one, the
            removal is waited for.
    """
    aside = trash / f"{folder.name}-{time.time_ns()}"
    try:
        trash.mkdir(parents=True, exist_ok=True)
        folder.rename(aside)
    except FileNotFoundError:
        return
    except OSError:
        with suppress(OSError):  # whatever brought it here is to be told, not this
            remove(folder)
    else:
        remove_behind(aside)


def remove_behind(*paths: Path) -> None:
    """Remove files and folders in the background."""
    if not paths:
        return
    remover = threading.Thread(target=_remove_all, args=paths, name="remover")
    with _changing:
        _removers[:] = [remover, *(one for one in _removers if one.is_alive())]
        remover.start()


def wait() -> None:
    """Wait until what is being removed is gone."""
    for remover in tuple(_removers):
        remover.join()


def _remove_all(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):  # left in the trash, for a later process
            remove(path)

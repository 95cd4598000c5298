"""files: whole files or nothing: written beside their place, then renamed into it."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

from cache.errors import NoRoom

TEMPORARY = ".tmp-"
SWEEP_SECONDS = 3600
STRANGE_SWEEP_SECONDS = 24 * 3600
WRITERS = 16  # of as much at once, for which room is made before any of it is short
USE_SECONDS = 3600  # how exactly files tell when they were last used
WRITE_BYTES = 256 << 10
KEEP_SIZE = 1  # linux/falloc.h, FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None)
_BEGUN = time.time_ns()  # another in a later process that has this one's number
_numbers = itertools.count()
_removers: list[subprocess.Popen[bytes]] = []  # of ``remove_behind``, those that may still run
_removing = threading.Lock()  # held while the list changes


class Temporary:
    """A new file that is about to be renamed into its place.

    Attributes:
        file: open to be written, unbuffered.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._renamed = False
        self.file: IO[bytes] = open(path, "xb", buffering=0)  # noqa: SIM115

    def rename(self, target: Path) -> None:
        """Let it be ``target``, in whose folder's place one is made if there is none."""
        try:
            os.replace(self._path, target)
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._path, target)
        self._renamed = True

    def close(self) -> None:
        """Close it; unless it was renamed, it is gone.

        Raises:
            OSError: some disks say only now that they are full.
        """
        try:
            self.file.close()
        finally:
            if not self._renamed:
                with suppress(FileNotFoundError):
                    os.unlink(self._path)


@contextmanager
def temporary(folder: Path, need: int = 0) -> Iterator[Temporary]:
    """Open a new file in ``folder``; unless it was renamed meanwhile, it is gone afterwards.

    Args:
        folder: made if it is not there.
        need: bytes that will be written, if known: refused at once where there is no room.

    Raises:
        NoRoom: the disk is full.
    """
    path = f"{folder}/{own_prefix()}{_BEGUN}-{next(_numbers)}"
    with full_disk(folder, need):
        try:
            new = Temporary(path)
        except FileNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
            new = Temporary(path)
        with closing(new):
            if need:
                room(folder, need)
            yield new


@contextmanager
def full_disk(folder: Path, need: int = 0) -> Iterator[None]:
    """Say it in words if the disk is full in the block, which writes ``need`` bytes to ``folder``.

    Raises:
        NoRoom: it is.
    """
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise no_room(folder, need) from error
        raise


def write(path: Path, data: bytes | memoryview) -> None:
    """Make ``path`` hold exactly ``data``, or leave it as it was.

    The temporary file lies in the same folder, since only a rename within one file system is
    atomic. No fsync: a power cut can leave a short file, which readers notice by its size or
    its contents.

    Raises:
        NoRoom: the disk is full.
    """
    with temporary(path.parent, len(data)) as new:
        write_all(new.file, memoryview(data))
        new.rename(path)


def write_all(file: IO[bytes], data: memoryview, at: int = 0) -> None:
    """Write all of ``data`` to a file, from byte ``at`` on.

    In calls of ``WRITE_BYTES``: for longer ones Linux looks for memory in pieces as long, up to
    2 MiB, and those are what a virtual machine has given back to its host: ten times the copy.
    """
    while data:
        count = os.pwrite(file.fileno(), data[:WRITE_BYTES], at)
        data, at = data[count:], at + count


def reserve(file: IO[bytes], length: int) -> None:
    """Have the disk set aside, at once, what a file will hold: a quarter less time to write it.

    Only where the system and the file system can; ``os.posix_fallocate`` would write into each
    block elsewhere. The file's size stays that of what was written.
    """
    fallocate = getattr(_libc, "fallocate", None)
    if fallocate:
        fallocate(file.fileno(), KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(length))


def room(folder: Path, need: int) -> None:
    """Refuse to begin what the disk cannot take.

    Args:
        folder: where it will be written.
        need: bytes.

    Raises:
        NoRoom: there is less free.
    """
    if WRITERS * need > shutil.disk_usage(folder).free:  # others write as well
        for remover in tuple(_removers):  # what it removes is room
            remover.wait()
        if need > shutil.disk_usage(folder).free:
            raise no_room(folder, need)


def own_prefix() -> str:
    """Return how this process's temporary names begin, so that others can tell whose they are."""
    return f"{TEMPORARY}{platform.node()}-{os.getpid()}-"


def used(path: str | Path, mtime_ns: int) -> None:
    """Note that a file was used, in its mtime: access times are off on many systems (noatime).

    Args:
        path: the file.
        mtime_ns: its mtime; one of the last hour is left alone.
    """
    if time.time_ns() - mtime_ns > USE_SECONDS * 10**9:
        with suppress(OSError):  # somebody else's, or gone
            os.utime(path)


def sweep(folder: Path) -> None:
    """Remove temporary files that killed processes left."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if abandoned(path):
            remove(path)


def abandoned(path: Path) -> bool:
    """Tell whether a temporary file's process was killed.

    Not within the hour: two containers can go by one machine's name. Of other machines nothing is
    known but the time, so that a day has to pass.
    """
    begin = f"{TEMPORARY}{platform.node()}-"
    process = path.name.removeprefix(begin).split("-")[0]
    ours = path.name.startswith(begin) and process.isdigit()
    if ours and _runs(int(process)):
        return False
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # renamed, or swept by somebody else
        return False
    return age >= (SWEEP_SECONDS if ours else STRANGE_SWEEP_SECONDS)


def remove(path: Path) -> None:
    """Remove a file or a folder that others may remove as well."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path, trash: Path) -> None:
    """Remove a folder that may be there, in a process of its own that outlives this one.

    A disk takes up to half a second a GB, of which this process would do nothing but wait.

    Args:
        folder: its name is free at once; it begins with ``TEMPORARY``.
        trash: a folder on the same file system; on another one the removal is waited for. What a
            removal that was killed leaves there is to be given to ``remove_behind``.
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
    """Remove files and folders, in a process of its own that outlives this one."""
    if not paths:
        return
    try:
        remover = start_behind("rm", "-rf", "--", *paths)
    except OSError:  # there is no rm
        for path in paths:
            remove(path)
        return
    with _removing:
        _removers[:] = [remover, *(one for one in _removers if one.poll() is None)]


def start_behind(
    *command: str | Path, stdin: int = subprocess.DEVNULL, pass_fds: Collection[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a process that may outlive this one, of which nobody hears.

    Raises:
        OSError: it cannot be started.
    """
    quiet = subprocess.DEVNULL  # whoever reads what this process prints must not wait for that one
    return subprocess.Popen(
        command, stdin=stdin, stdout=quiet, stderr=quiet, pass_fds=pass_fds, process_group=0
    )


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _there(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def is_full(error: OSError) -> bool:
    """Tell whether an error means that there is no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_room(folder: Path, need: int = 0) -> NoRoom:
    """Return the error that says so."""
    free = shutil.disk_usage(_there(folder)).free
    fact = f"{need:,} bytes are needed, {free:,} are free" if need else f"{free:,} bytes are free"
    return NoRoom(
        f"{folder}: the disk is full: {fact}. Make room and run doit again: what is already built "
        "is kept."
    )

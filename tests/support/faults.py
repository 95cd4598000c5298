"""faults: what can befall a process and its disk: calls of the system fail, and the power goes.

The library that does it, ``hook/faults.c``, is loaded before all others, on Linux; see there for
what it counts and notes.
"""

import ctypes
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SOURCE = Path(__file__).parent / "hook" / "faults.c"
SHORT, SIGNAL = -1, -100  # as in the library
_PRELOAD = "LD_PRELOAD"


def begin() -> None:
    """Start this program anew with the library, if it is without.

    Raises:
        OSError: there is no Linux, or no gcc.
    """
    if library := os.environ.pop(_PRELOAD, None):  # not in what this starts
        os.unlink(library)
        return
    number, library = tempfile.mkstemp(".so")
    os.close(number)
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {_PRELOAD: library})


def arm(under: Path, at: int, harm: int, journal: Path | None = None) -> None:
    """Have the call number ``at`` of those about files below a folder come to harm.

    Args:
        under: the folder.
        at: counted from 1; 0, none of them.
        harm: an errno; ``SHORT``; or ``SIGNAL`` less a signal's number.
        journal: a folder for what ``cut_power`` needs.
    """
    log = graves = None
    if journal:
        shutil.rmtree(journal, ignore_errors=True)
        (journal / "graves").mkdir(parents=True)
        log, graves = os.fsencode(journal / "log"), os.fsencode(journal / "graves")
    _library().faults_arm(os.fsencode(under), ctypes.c_long(at), harm, log, graves)


def calls() -> int:
    """How many calls there were."""
    return int(_library().faults_calls())


def struck() -> str:
    """The call that came to harm."""
    return bytes(_library().faults_struck()).decode()


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.faults_calls.restype = ctypes.c_long
    library.faults_struck.restype = ctypes.c_char_p
    return library


def cut_power(under: Path, journal: Path, chance: random.Random) -> list[str]:
    """Make of a folder what a disk may have of it once the power went; return what was lost.

    The system's own order is taken for granted, as ext4 and XFS keep it: what becomes of names is
    written in the order in which it was asked for, and a file that is synced takes all before it
    along. Of bytes that nobody synced any part may be missing, and be zeros, or cut off, under the
    size and time that the file had.

    Args:
        under: the folder.
        journal: that of the process, which has ended.
        chance: decides what is lost.
    """
    lines = (journal / "log").read_bytes().decode().splitlines() if journal.exists() else []
    steps = [tuple(line.split("\t")) for line in lines]
    synced = max((number + 1 for number, step in enumerate(steps) if step[0] == "S"), default=0)
    kept = chance.randint(synced, len(steps))
    lost = []
    for number in reversed(range(kept, len(steps))):
        _undo(steps[number], journal / "graves" / str(number))
        lost.append(" ".join(steps[number]))
    unsynced: dict[int, None] = {}
    for kind, *rest in steps:
        if kind == "W":
            unsynced[int(rest[0])] = None
        elif kind == "S":
            unsynced.pop(int(rest[0]), None)
    for path in _files(under):
        state = path.stat()
        if state.st_ino in unsynced and chance.random() < 0.7:
            lost.append(f"{path}: {_lose(path, state.st_size, chance)}")
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    return lost


def _undo(step: tuple[str, ...], grave: Path) -> None:
    kind, *paths = step
    with suppress(FileNotFoundError):
        if kind in "CL":
            os.unlink(paths[0])
        elif kind == "M":
            os.rmdir(paths[0])
        elif kind == "D":
            os.mkdir(paths[0])
        elif kind == "U":
            os.link(grave, paths[0])
        elif kind == "R":
            os.rename(paths[1], paths[0])
            if grave.exists():
                os.link(grave, paths[1])
        elif kind == "X":
            aside = f"{paths[0]}.aside"
            for old, new in ((paths[0], aside), (paths[1], paths[0]), (aside, paths[1])):
                os.rename(old, new)


def _lose(path: Path, size: int, chance: random.Random) -> str:
    mode = path.stat().st_mode
    path.chmod(0o600)
    begin = chance.choice((0, 0, size // 4096 // 2 * 4096, chance.randrange(size + 1)))
    with path.open("r+b") as file:
        file.truncate(begin)
        if way := chance.choice(("zeros", "cut off")) == "zeros":
            file.truncate(size)
    path.chmod(mode)
    return f"{'zeros' if way else 'cut off'} from byte {begin} of {size}"


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (path for name in sorted(names) if (path := Path(root, name)).is_file())

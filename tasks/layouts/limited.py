"""limited: what other libraries make of a checkpoint's files, in a process of little time and room.

For what would take seconds to import, and for files that may be made to take the machine. The
process is ``python -m MODULE FOLDER``, whose ``main`` calls ``serve``.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tasks.layouts.answers import claim_stdout

PATIENCE = 5  # how many times the seconds of processors may pass
AGAIN_SECONDS = 0.5
MOST_ANSWER = 256 << 20  # characters of an answer, which this process has to hold


class Limits(NamedTuple):
    """What a process may take.

    Attributes:
        seconds: of processors; several times as much may pass where others want them, too.
        nbytes: of memory.
    """

    seconds: int
    nbytes: int

    def begin(self) -> None:
        """Have them hold for this process."""
        for kind, wanted in zip((resource.RLIMIT_CPU, resource.RLIMIT_DATA), self, strict=True):
            _, hard = resource.getrlimit(kind)
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(kind, (limit, hard))


def call(module: str, files: Mapping[str, bytes], limits: Limits, given: Any = None) -> Any:
    """Return what a module's process makes of files, JSON; or a `Refused`.

    Args:
        module: its name.
        files: by name.
        limits: what it may take.
        given: what else it is given, JSON.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(name) / file).write_bytes(data)
        try:
            done = subprocess.run(
                # -P: the current folder may have a tasks/ of its own.
                [sys.executable, "-P", "-m", module, name],
                input=json.dumps([*limits, given]),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # it may have no end
                text=True,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
                timeout=PATIENCE * limits.seconds,
            )
        except subprocess.TimeoutExpired:
            return Refused(f"it took over {PATIENCE * limits.seconds} s")
    if done.returncode == -signal.SIGXCPU:
        return Refused(f"it took over {limits.seconds} s of a processor")
    try:
        answer, cause = json.loads(done.stdout)
    except ValueError:
        return Refused(f"exit status {done.returncode}")
    return Refused(cause) if cause else answer


class Refused(str):
    """Why there is no answer."""


class TooLong(BaseException):
    """What was done in this process took too long; no library catches it as an error of its own."""


def within(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """Return what a Python function returns, called in the main thread.

    Args:
        seconds: of processors, after which it is interrupted.
        function: the function.
        args: its arguments.

    Raises:
        TooLong: it was.
    """

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is function.__code__:  # and what follows it is never interrupted
                # Once more, lest that was in a destructor, from which no exception comes out.
                signal.setitimer(signal.ITIMER_VIRTUAL, AGAIN_SECONDS)
                raise TooLong
            frame = frame.f_back

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return function(*args)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def serve(answer: Callable[[Path, Any], Any]) -> None:
    """Print what a function makes of the folder of files, and of what else is given.

    Whatever it raises is a verdict on the files.
    """
    answers = claim_stdout()
    *limits, given = json.load(sys.stdin)
    Limits(*limits).begin()
    # Where torch is installed, transformers imports it: 3 s, and nothing here needs it.
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        said = json.dumps([answer(Path(sys.argv[1]), given), ""])
        if len(said) > MOST_ANSWER:
            raise ValueError(f"it makes {len(said):,} characters of it")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        said = json.dumps([None, f"{type(error).__name__}: {error}"])
    with answers:
        answers.write(said)

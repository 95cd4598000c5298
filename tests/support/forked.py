"""forked: functions in processes of their own, which need not import anything: forks of this one.

For processes that are to be killed, by the thousand. This one must have no threads, and so must
never have asked MLX for anything.
"""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        status: its exit status; of one that a signal ended, the signal's number, negative.
        returned: whether the function returned, and did not raise.
        value: what it returned.
        said: what it wrote to stdout and stderr.
    """

    status: int
    returned: bool
    value: Any
    said: str


def call(function: Callable[..., Any], *args: Any, folder: Path, seconds: float = 600) -> Ended:
    """Call a function in a fork of this process.

    Args:
        function: its exit status, if it returns a number, and if not, 0.
        args: the function's.
        folder: where files are kept meanwhile.
        seconds: after which it is killed.
    """
    output, result = folder / "output", folder / "result"
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if not process:
        _run(function, args, output, result)
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.002)
    returned, said = result.exists(), output.read_text(errors="replace")
    value = pickle.loads(result.read_bytes()) if returned else None
    return Ended(os.waitstatus_to_exitcode(status), returned, value, said)


def _run(function: Callable[..., Any], args: tuple[Any, ...], output: Path, result: Path) -> None:
    status = 1
    try:
        number = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(number, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        value = function(*args)
        result.write_bytes(pickle.dumps(value))
        status = value if isinstance(value, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

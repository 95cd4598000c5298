"""warm: Python modules run as programs, in forks of a process that has imported what is slow.

For the tests that have doit in their own process: what a checkpoint's files are made into, and what
the libraries make of its tensors, is asked of a process within limits, two seconds of which are
transformers' import. The limits hold in a fork, too; those that test them start the real one.
"""

import atexit
import functools
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from support.front_door import REPOSITORY

DEVNULL, PIPE, TimeoutExpired = subprocess.DEVNULL, subprocess.PIPE, subprocess.TimeoutExpired
_BEGINS = [sys.executable, "-P", "-m"]
_one_by_one = threading.Lock()


def run(
    command: list[str], *, input: str, env: dict[str, str], timeout: float, **_: Any
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, of `python -P -m MODULE`."""
    assert command[:3] == _BEGINS
    with _one_by_one, tempfile.TemporaryDirectory() as folder:
        asked = {"arguments": command[3:], "input": input, "env": env, "seconds": timeout}
        Path(folder, "asked").write_text(json.dumps(asked))
        server = _server()
        print(folder, file=server.stdin, flush=True)
        status = json.loads(server.stdout.readline())
        if status is None:
            raise TimeoutExpired(command, timeout)
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(command, status, out, err)


@functools.cache
def _server() -> subprocess.Popen:
    """The process, which ends with this one."""
    own = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, own))
    server = subprocess.Popen(
        [*_BEGINS, "support.warm"],
        stdin=PIPE,
        stdout=PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    sys.modules["torch"] = None  # as in the processes themselves: nothing here needs it
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    del sys.modules["torch"]
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        asked = json.loads((folder / "asked").read_bytes())
        child = os.fork()
        if not child:
            _run(folder, asked)
        timer = threading.Timer(asked["seconds"], os.kill, [child, signal.SIGALRM])
        timer.start()
        _, status = os.waitpid(child, 0)
        timer.cancel()
        timer.join()
        ended = os.waitstatus_to_exitcode(status)
        print(json.dumps(None if ended == -signal.SIGALRM else ended), flush=True)


def _run(folder: Path, asked: dict[str, Any]) -> None:
    status = 1
    try:
        for stream, name in ((1, "out"), (2, "err")):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, stream)
        os.environ.clear()
        os.environ.update(asked["env"])
        sys.argv, sys.stdin = asked["arguments"], io.StringIO(asked["input"])
        runpy.run_module(asked["arguments"][0], run_name="__main__", alter_sys=False)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()

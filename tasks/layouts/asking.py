"""asking: how one of the ``libraries`` is asked what it makes of a checkpoint.

The question is answered by ``probe``, in this process where the model is small and the answer soon
there, else in one of its own, within limits of time and memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import ArchitectureError, BuildError
from tasks.layouts import verdict
from tasks.layouts.libraries import LIBRARIES, MLX_LM, Library, missing, packages
from tasks.layouts.limited import PATIENCE, Limits, TooLong
from tasks.layouts.llama_names import rope

SCHEMA = 3  # of the probe's answers; raised when they change
# Where a question has no more, it is asked in this process; else within limits in one of its own.
SMALL_TENSORS, SMALL_TEXT, SMALL_NUMBER, SMALL_COUNT = 50_000, 4 << 20, 1 << 31, 4096
COUNTS = re.compile("layer|depth|block|expert|head")  # keys of what a class makes so many of
SMALL_PRODUCT = 1 << 20  # of the two largest of these: modules in modules, a minute to make
SMALL_SECONDS = 5  # of processors, that this process gives to such a question
# In a process of its own; one that looks small has some size that makes it large, as none should.
SMALL, LARGE = Limits(30, 4 << 30), Limits(600, 16 << 30)


@cache
def versions(library: str = MLX_LM) -> dict[str, str]:
    """Return the versions of what an answer depends on.

    Raises:
        ArchitectureError: the library is not installed.
    """
    try:
        return {name: version(name) for name in packages(library)}
    except PackageNotFoundError as error:
        raise ArchitectureError(missing(LIBRARIES[library])) from error


def question(
    checkpoint: Checkpoint, library: str, values: Mapping[str, str], left_out: Sequence[str]
) -> dict[str, Any]:
    """Return what a library is asked of a checkpoint: all that its answer depends on.

    Args:
        checkpoint: with Hugging Face's names.
        library: of ``LIBRARIES``.
        values: of tensors that it decides by, in base64.
        left_out: tensors that it is not told of.

    Raises:
        ArchitectureError: the library is not installed.
    """
    extra = rope(checkpoint.config, LIBRARIES[library].PACKAGE)
    files = dict(checkpoint.files)
    if extra or "config.json" not in files:
        files["config.json"] = json.dumps({**checkpoint.config, **extra})
    return {
        "schema": SCHEMA,
        "versions": versions(library),
        "files": files,
        "tensors": _without(checkpoint.table, left_out) if left_out else checkpoint.table,
        **({"values": values} if values else {}),
        **({"library": library} if library != LIBRARIES[library].DISTRIBUTION else {}),
    }


def _without(table: list[Any], names: Sequence[str]) -> list[Any]:
    without = frozenset(names)
    return [row for row in table if row[0] not in without]


def ask(question: dict[str, Any], library: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a library's answer to a ``question``.

    Raises:
        ArchitectureError: it does not know the architecture, or refuses the checkpoint.
    """
    answer: dict[str, Any] = {}
    small = _is_small(question)
    limits = SMALL if small else LARGE
    for light in (True, False):
        asked = {**question, "light": light}
        # Starting a process costs more than the answer, most of all where MLX brings up a GPU.
        # Within this process only where nothing runs beside it: modules and MLX's own functions are
        # replaced meanwhile.
        alone = threading.current_thread() is threading.main_thread()
        here = _ask_here(asked, library) if light and alone and small else None
        answer = here or _ask_process(asked, library, checkpoint.folder, limits)
        if "error" not in answer:
            return dict(answer)
        # A library's own verdicts are ValueErrors; left-out modules can show as any other.
        if answer["kind"] in ("ValueError", "SystemExit", "ArchitectureError"):
            break
    fail(answer, checkpoint, library)
    raise AssertionError("an error was raised")


def fail(answer: Mapping[str, str], checkpoint: Checkpoint, library: str) -> None:
    """Say that a library failed.

    Raises:
        ArchitectureError: that is its verdict on the checkpoint.
        BuildError: it could not read it.
    """
    failed = answer["kind"] == "OSError" and not verdict.ELSEWHERE.search(answer["error"])
    if failed or answer["kind"] == "FileChanged":  # while computing: no verdict
        raise BuildError(f"{checkpoint.folder}: {answer['error']}")
    if answer["kind"] == "ArchitectureError":  # said here, of the library
        raise ArchitectureError(f"{checkpoint.folder}: {answer['error']}")
    asked = LIBRARIES[library]
    release = f"{asked.DISTRIBUTION} {versions(library)[asked.DISTRIBUTION]}"
    having = _having(checkpoint.config.get("model_type"), but=library)
    said = verdict.explained(
        checkpoint.config,
        answer["kind"],
        answer["error"],
        release,
        asked.DISTRIBUTION,
        verdict.elsewhere(checkpoint.config, asked.DISTRIBUTION, having, asked.TOWERS),
        model_types(asked),
    )
    raise ArchitectureError(f"{checkpoint.folder}: {said}")


def _having(model_type: object, but: str) -> list[str]:
    """Return the layouts whose libraries have a class for a model, and how to install these."""
    return [
        f'layout = "{name}"' + (f" ({install})" if install else "")
        for name, install in layouts_of(model_type).items()
        if name != but
    ]


def layouts_of(model_type: object) -> dict[str, str]:
    """Return the layouts whose libraries have a class for a model, and how to install each.

    "", it is installed.
    """
    module = str(model_type).lower().replace("-", "_")
    found = {}
    for name, library in LIBRARIES.items():
        if module in (types := model_types(library)):
            missed = types is library.KNOWS and library.EXTRA
            found[name] = f"pip install 'mlx-make[{library.EXTRA}]'" if missed else ""
    return found


def model_types(library: Library) -> Sequence[str]:
    """Return what models a library has, without importing it.

    By the names of its modules, and those that it is known to have: the latter alone where it is
    not installed.
    """
    spec = find_spec(library.PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return library.KNOWS
    folders = [Path(spec.submodule_search_locations[0], each) for each in library.MODELS]
    found = [path.stem for folder in folders for path in folder.glob("[!_]*")]
    return [*found, *library.KNOWS]


def _is_small(question: Mapping[str, Any]) -> bool:
    """Tell whether no model of such a size can take this process's time and memory."""
    config = json.loads(question["files"]["config.json"])
    counts = sorted(n for key, n in _whole(config) if COUNTS.search(key))
    return (
        math.prod(counts[-2:]) <= SMALL_PRODUCT
        and len(question["tensors"]) <= SMALL_TENSORS
        and sum(map(len, question["files"].values())) <= SMALL_TEXT
        and all(n <= (SMALL_COUNT if COUNTS.search(k) else SMALL_NUMBER) for k, n in _whole(config))
    )


def _whole(config: Any) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers in JSON, each with the key that it is under."""
    left = [("", config)]
    while left:
        key, value = left.pop()
        if isinstance(value, int):
            yield key, value
        elif isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((key, each) for each in value)


def command(library: str) -> tuple[list[str], dict[str, str]]:
    """Return how the probe is started, and in which environment."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # -P: the current folder may have a tasks/ of its own.
    start = [sys.executable, "-P", "-m", "tasks.layouts.probe", library]
    return start, {**os.environ, "PYTHONPATH": path}


def _ask_here(question: dict[str, Any], library: str) -> Any:
    """Return the answer, if it is soon there."""
    from tasks.layouts import probe  # once for a checkpoint

    try:
        return json.loads(
            json.dumps(probe.answer(question, LIBRARIES[library], seconds=SMALL_SECONDS))
        )
    except TooLong:
        return None


def _ask_process(question: dict[str, Any], library: str, folder: Path, limits: Limits) -> Any:
    start, environment = command(library)
    try:
        done = subprocess.run(
            start,
            input=json.dumps({**question, "limits": limits}),
            capture_output=True,
            text=True,
            env=environment,
            timeout=PATIENCE * limits.seconds,
        )
    except subprocess.TimeoutExpired:
        wall = PATIENCE * limits.seconds
        raise _too_large(folder, f"{library} did not say within {wall} s") from None
    if done.returncode == -signal.SIGXCPU:
        seconds = f"{limits.seconds} s of a processor"
        raise _too_large(folder, f"{library} did not say within {seconds}")
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ArchitectureError(
            f"{folder}: asking {library} failed (exit status {done.returncode}):\n"
            f"{done.stderr[-2000:]}"
        ) from None
    if answer.get("kind") == "MemoryError":
        raise _too_large(
            folder, f"{library} cannot say in {limits.nbytes / (1 << 30):g} GiB of memory"
        )
    return answer


def _too_large(folder: Path, fact: str) -> ArchitectureError:
    return ArchitectureError(
        f"{folder}: {fact} what it makes of it. config.json asks for a model of a size that it was "
        "hardly meant to. Fetch it again."
    )

"""mlx-make: builds the models that models.toml lists. ``doit list`` shows the tasks."""

import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from doit import doit_cmd, get_var
from doit.action import CmdAction
from doit.exceptions import InvalidDodoFile

from tasks.checkpoints import example
from tasks.cli import invocation, session, task_graph

ROOT = Path(__file__).parent
# Whoever installed mlx-make has no tests, no benchmarks and no use for the example.
IS_CHECKOUT = (ROOT / "tests").is_dir()

# doit -f: another folder's pyproject.toml was read.
if "tasks.cli.doit_database" not in sys.modules:
    raise InvalidDodoFile(
        "doit is without mlx-make's plugins, which it takes from pyproject.toml in the folder "
        f"where it is started. Run mlx-make instead, or doit models=PATH in {ROOT}."
    )

if odd := (doit_cmd._CMDLINE_VARS or {}).keys() - {"models"}:
    raise InvalidDodoFile(f"{min(odd)}= says nothing. Only models=PATH does.")

MODELS = Path(get_var("models", "models.toml"))
EXAMPLE = ROOT / "checkpoints" / "tiny-llama"
DOIT_CONFIG = session.doit_config(MODELS)

Tasks = Iterator[dict[str, Any]]


@cache
def loaded() -> task_graph.Graph:
    """Read models.toml, once."""
    return session.load(MODELS, make={EXAMPLE: example.make} if IS_CHECKOUT else {})


def task_extract() -> Tasks:
    """Find and digest each layer's tensors in the checkpoint."""
    yield from loaded().stage("extract")


def task_unshard() -> Tasks:
    """Join shards into whole tensors, by the layout's names."""
    yield from loaded().stage("unshard")


def task_cast() -> Tasks:
    """Cast each layer to the target's dtype."""
    yield from loaded().stage("cast")


def task_quantize() -> Tasks:
    """Quantize each layer."""
    yield from loaded().stage("quantize")


def task_pack() -> Tasks:
    """Write build/TARGET: weight files, config.json, tokenizer."""
    yield from loaded().pack()


def task_error() -> Tasks:
    """Measure what quantizing took from each layer."""
    if (
        invocation.asked != []
    ):  # a plain doit builds models: a fifth of its tasks would be for nothing
        yield from loaded().stage("error")


def task_report() -> Tasks:
    """Write reports/TARGET.html, and an overview, reports/index.html."""
    if invocation.asked != []:
        from tasks.cli import report_tasks  # which nothing else imports

        yield from report_tasks.report(loaded())


def task_lock() -> Tasks:
    """Accept the checkpoints as they are now into models.lock."""
    yield from loaded().accept()


if IS_CHECKOUT:

    def task_lint() -> dict[str, Any]:
        """Check this project's code: ruff, mypy and import-linter."""
        lint_imports = "from importlinter.cli import lint_imports_command as lint; lint()"
        return _python("-m ruff check", "-m ruff format --check", "-m mypy", f"-c '{lint_imports}'")

    def task_test() -> dict[str, Any]:
        """Run this project's tests."""
        return _python("-m pytest")

    def task_bench() -> dict[str, Any]:
        """Measure mlx-make beside mlx_lm.convert, on Linux: two hours, 25 GB of scratch."""
        return _python("benchmarks/compare.py")


def _python(*calls: str) -> dict[str, Any]:
    commands = [[sys.executable, *shlex.split(call)] for call in calls]
    return {"actions": [CmdAction(command, shell=False, cwd=ROOT) for command in commands]}

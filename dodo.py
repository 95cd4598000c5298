"""mlx-make: builds the models that models.toml lists. ``doit list`` shows the tasks."""

import shlex
import sys
from collections.abc import Iterator
from typing import Any

from doit.action import CmdAction
from doit.exceptions import InvalidDodoFile

from tasks.cli.task_graph import TaskGraph
from tasks.core.program import IS_CHECKOUT, ROOT

if "tasks.cli.loader" not in sys.modules:  # doit -f: another folder's pyproject.toml was read
    raise InvalidDodoFile(
        "doit is without mlx-make's plugins, which it takes from pyproject.toml in the folder "
        f"where it is started. Run mlx-make instead, or doit models=PATH in {ROOT}."
    )

Tasks = Iterator[dict[str, Any]]


# Each stage's tasks, of all layers, come before these: see tasks/stages/registry.py.


def task_pack(graph: TaskGraph) -> Tasks:
    """Write build/TARGET: weight files, config.json, tokenizer."""
    yield from graph.pack()


def task_report(graph: TaskGraph) -> Tasks:
    """Write reports/TARGET.html, and an overview, reports/index.html."""
    if not graph.session.options.builds_all:
        from tasks.cli import report_tasks  # which nothing else imports

        yield from report_tasks.report(graph.session, graph.measured)


def task_publish(graph: TaskGraph) -> Tasks:
    """Upload what differs from the hub, where models.toml says publish = …; never by itself."""
    if not graph.session.options.builds_all:
        from tasks.cli import publish_tasks  # which nothing else imports

        yield from publish_tasks.tasks(graph.session, graph.database)


def task_lock(graph: TaskGraph) -> Tasks:
    """Accept the checkpoints as they are now into models.lock."""
    yield from graph.accept()


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

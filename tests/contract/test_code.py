"""What the code promises of itself, and no linter counts."""

import ast
from collections.abc import Iterator
from pathlib import Path

from support.front_door import REPOSITORY

MOST_LINES = 60
FOLDERS = ("benchmarks", "cache", "mlx_make", "tasks", "tests")


def sources() -> Iterator[Path]:
    yield from REPOSITORY.glob("*.py")
    for folder in FOLDERS:
        yield from (REPOSITORY / folder).rglob("*.py")


def test_no_function_is_longer_than_a_screen() -> None:
    longer = {
        f"{path.relative_to(REPOSITORY)}: {node.name}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES
    }
    assert not longer

"""What the code promises of itself, and no linter counts."""

import ast
import functools

from support.front_door import REPOSITORY
from tasks.checkpoints.folder import PREFIX
from tasks.checkpoints.loaders import LOADERS
from tasks.checkpoints.sources import SOURCES
from tasks.core import task_names
from tasks.layouts.libraries import LIBRARIES
from tasks.layouts.registry import LAYOUTS
from tasks.stages import registry

MOST_LINES = 60
FOLDERS = ("benchmarks", "cache", "mlx_make", "tasks", "tests")


@functools.cache
def trees() -> dict[str, ast.Module]:
    """The code, by the path of each file."""
    paths = [*REPOSITORY.glob("*.py")]
    for folder in FOLDERS:
        paths += (REPOSITORY / folder).rglob("*.py")
    return {
        path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
    }


def test_no_function_is_longer_than_a_screen() -> None:
    longer = {
        f"{path}: {node.name}"
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES
    }
    assert not longer


def test_no_module_compares_the_names_that_a_registry_gives() -> None:
    """A stage, a layout, a loader, a type of source, a library, and who packs, is asked instead."""
    names = {*registry.names(), *registry.building(), *LAYOUTS, *LOADERS, *SOURCES, *LIBRARIES}
    # All begin with that of folders; a model_type and a key of an answer are called so as well.
    names -= {PREFIX, "llama", "error"}
    compared = {
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in trees().items()
        if path.startswith(("cache/", "mlx_make/", "tasks/")) and path != "tasks/core/task_names.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        for word in getattr(side, "elts", [side])
        if (isinstance(word, ast.Constant) and word.value in names)
        or (isinstance(word, ast.Name) and vars(task_names).get(word.id) in names)
    }
    assert not compared

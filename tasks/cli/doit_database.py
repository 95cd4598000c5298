"""doit_database: what doit remembers of tasks and files, in one file that is written whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec
from doit.dependency import FileChangedChecker

from cache.digest import digest_file
from cache.errors import NoRoom
from cache.files import atomic
from cache.files.stamp import Stamp
from cache.records.manifests import Manifest, ManifestError
from cache.records.sealed import Damaged, Unsealed, seal, unseal
from tasks.cli import failures

KEY = "doit.json"  # that it is sealed under
_Tasks = dict[str, dict[str, Any]]


class Checker(FileChangedChecker):  # type: ignore[misc]
    """Compares manifests by their results, and other files by digest; a stamp saves both.

    A state is [size, mtime_ns, inode, digest].
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, Stamp], str] = {}

    def check_modified(self, path: str, stat: os.stat_result, state: list[Any]) -> bool:
        """Tell whether a file is another than the ``state`` saved says."""
        *stamp, digest = state
        now = Stamp.of_stat(stat)
        return list(now) != stamp and self._digest(path, now) != digest

    def get_state(self, path: str, current: list[Any] | None) -> list[Any] | None:
        """Return the state to save, or None where the saved one still holds."""
        now = Stamp.of(path)
        if current and list(now) == current[:-1]:
            return None
        return [*now, self._digest(path, now)]

    def _digest(self, path: str, stamp: Stamp) -> str:
        if (path, stamp) not in self._known:
            self._known[path, stamp] = _content_digest(Path(path))
        return self._known[path, stamp]


def _content_digest(path: Path) -> str:
    if path.suffix == ".json":
        try:
            return Manifest.from_bytes(path.read_bytes()).result
        except ManifestError:
            pass  # a checkpoint's own JSON file
    return digest_file(path)


class Database:
    """doit's database (a backend plugin): one JSON file, replaced whole, and only if it changed.

    A damaged one is as good as none: the action cache remembers what was built.
    """

    desc = "JSON, written whole"

    def __init__(self, name: str, codec: Any, *, module_name: str | None = None) -> None:
        self.name = name
        self._tasks = _read(Path(name))
        self._changed = False

    def get(self, task_id: str, dependency: str) -> Any:
        """Return what is known of a task's dependency, or None."""
        task = self._tasks.get(task_id)
        return None if task is None else task.get(dependency)

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        """Store a value."""
        if dependency == "result:":  # the same as its values, and nothing here asks for it
            return
        value = list(value) if isinstance(value, tuple) else value  # as JSON has it
        if self.get(task_id, dependency) != value:
            self._changed = True
            self._tasks.setdefault(task_id, {})[dependency] = value

    def in_(self, task_id: str) -> bool:
        """Tell whether anything is known of a task."""
        return task_id in self._tasks

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        self._changed = True
        self._tasks.pop(task_id, None)

    def remove_all(self) -> None:
        """Forget all tasks."""
        self._changed = True
        self._tasks = {}

    def dump(self) -> None:
        """Write the file."""
        if self._changed:
            try:
                atomic.write(Path(self.name), seal(KEY, self._tasks))
            except NoRoom as error:  # the action cache remembers what was built
                print(f"warning: {failures.message(error)}", file=sys.stderr)
            self._changed = False


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return what is known of each task; nothing, if it is not what was written."""
    try:
        data = path.read_bytes()
        try:
            return unseal(KEY, data, _Tasks)
        except Unsealed:  # an older version's
            tasks = msgspec.json.decode(data, type=_Tasks)
    except (FileNotFoundError, NotADirectoryError, Damaged, msgspec.DecodeError, RecursionError):
        return {}
    return tasks if all(map(_is_whole, tasks.values())) else {}


def _is_whole(task: dict[str, Any]) -> bool:
    """Tell whether what is known of a task has the types that doit and the checker take."""
    kinds = {"_values_:": dict, "deps:": list, "checker:": str, "ignore:": str}
    return all(isinstance(value, kinds.get(name, list)) for name, value in task.items())

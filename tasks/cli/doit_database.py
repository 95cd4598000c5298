"""doit_database: ."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from doit.dependency import FileChangedChecker, JsonDB

from cache.digest import digest_file
from cache.errors import NoRoom
from cache.files import atomic
from cache.files.stamp import Stamp
from cache.records.manifests import Manifest, ManifestError
from tasks.cli import failures


class Checker(FileChangedChecker):  # type: ignore[misc]
    """Compares manifests by what was made, and other files by digest; a stamp saves both.

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
            self._known[path, stamp] = _content(Path(path))
        return self._known[path, stamp]


def _content(path: Path) -> str:
    if path.suffix == ".json":
        try:
            return Manifest.from_bytes(path.read_bytes()).result
        except ManifestError:
            pass  # a checkpoint's own JSON file
    return digest_file(path)


class Database(JsonDB):  # type: ignore[misc]
    """doit's database: one JSON file, replaced whole, and only if something changed.

    A damaged one is as good as none: the action cache remembers what was built.
    """

    desc = "JSON, written whole"

    def _load(self) -> dict[str, Any]:
        try:
            loaded = json.loads(Path(self.name).read_bytes())
        except ValueError:
            return {}
        if not isinstance(loaded, dict) or not all(isinstance(v, dict) for v in loaded.values()):
            return {}
        return loaded

    def __init__(self, name: str, codec: Any, *, module_name: str | None = None) -> None:
        super().__init__(name, codec, module_name=module_name)
        self._changed = False

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        """Store a value."""
        if dependency == "result:":  # the same as its values, and nothing here asks for it
            return
        value = list(value) if isinstance(value, tuple) else value  # as JSON has it
        if self.get(task_id, dependency) != value:
            self._changed = True
            super().set(task_id, dependency, value)

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        self._changed = True
        super().remove(task_id)

    def remove_all(self) -> None:
        """Forget all tasks."""
        self._changed = True
        super().remove_all()

    def dump(self) -> None:
        """Write the file."""
        if self._changed:
            data = json.dumps(self._db, separators=(",", ":")).encode()
            try:
                atomic.write(Path(self.name), data)
            except NoRoom as error:  # the action cache remembers what was built
                print(f"warning: {failures.message(error)}", file=sys.stderr)
            self._changed = False

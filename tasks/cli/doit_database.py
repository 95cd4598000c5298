"""doit_database: what doit remembers of tasks and files, in one file, a line a target."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from doit.dependency import FileChangedChecker

from cache.digest import digest, digest_file
from cache.errors import NoRoom, naming
from cache.files import atomic
from cache.files.stamp import Stamp
from cache.records.manifests import Manifest, ManifestError
from cache.records.sealed import Damaged, Unsealed, seal, unseal
from tasks.cli import failures
from tasks.core.task_names import group_of

KEY = "doit.json"  # that its lines are sealed under
MOST_READ = 16  # targets whose tasks stay in memory: a megabyte each, of 126 layers
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
            with naming(path):
                return Manifest.from_bytes(path.read_bytes()).result
        except ManifestError:
            pass  # a checkpoint's own JSON file
    return digest_file(path)


Left = tuple[int, int, int, str]  # a manifest as its task left it: its stamp, and its digest


class _LeftState(msgspec.Struct, frozen=True):
    left: Left | None = None  # see up_to_date.manifest_state


class _Values(msgspec.Struct, frozen=True):
    """Of what is known of a task, what it left."""

    values: _LeftState = msgspec.field(name="_values_:", default=_LeftState())


class _Line(msgspec.Struct, frozen=True, array_like=True):
    """What the first line has of a target's: so that it need not be read to know it again."""

    digest: str
    groups: list[str]  # of its tasks


class _Head(msgspec.Struct, frozen=True):
    """The first line: tasks of no target, and where behind it each target's line lies."""

    tasks: _Tasks = {}
    targets: dict[str, tuple[int, int]] = {}  # start, length
    lines: dict[str, _Line] = {}  # an older version wrote none


class _StoredTasks:
    """What the file holds, of which a target's tasks are read when they are asked for.

    Attributes:
        head: the first line.
        older: all tasks, by target, of an older version's file, which was one record.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.head = _Head()
        self.older: dict[str, _Tasks] = {}
        self._file = -1
        with suppress(FileNotFoundError, NotADirectoryError):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path else -1
        if self._file >= 0:
            weakref.finalize(self, os.close, self._file)
            self._read()

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            line = file.readline()
            self._start, self._size = len(line), os.fstat(self._file).st_size
            try:
                self.head = unseal(_key(), line.removesuffix(b"\n"), _Head)
            except Damaged:
                self._read_older(line + file.read())
        if not all(map(_is_whole, self.head.tasks.values())):
            self.head = msgspec.structs.replace(self.head, tasks={})

    def _read_older(self, data: bytes) -> None:
        try:
            try:
                tasks = unseal(KEY, data, _Tasks)
            except Unsealed:
                tasks = msgspec.json.decode(data, type=_Tasks)
        except (Damaged, msgspec.DecodeError, RecursionError):
            return
        if all(map(_is_whole, tasks.values())):
            for task, known in tasks.items():
                self.older.setdefault(_target(task), {})[task] = known

    def line(self, target: str) -> _Line | None:
        """Return what the first line has of a target's, if that is there."""
        start, length = self.head.targets.get(target, (0, -1))
        there = length >= 0 and self._start + start + length <= self._size
        return self.head.lines.get(target) if there else None

    def bytes_of(self, target: str) -> bytes:
        """Return a target's line; nothing, if there is none."""
        start, length = self.head.targets.get(target, (0, 0))
        return os.pread(self._file, length, self._start + start) if length > 0 <= start else b""

    def tasks(self, target: str) -> _Tasks:
        """Return what is known of a target's tasks; nothing, if it is not what was written."""
        if self.older or not target:
            return self.older.get(target, {}) if self.older else self.head.tasks
        try:
            tasks = unseal(_key(target), self.bytes_of(target).removesuffix(b"\n"), _Tasks)
        except Damaged:
            return {}
        return tasks if all(map(_is_whole, tasks.values())) else {}


class Database:
    """doit's database (a backend plugin): one file, replaced whole, and only if it changed.

    ```
    {"seal":…,"key":"doit.json:","value":{"tasks":{…},"targets":{"TARGET":[START,LENGTH],…},
     "lines":{"TARGET":[DIGEST,[GROUP,…]],…}}}
    {"seal":…,"key":"doit.json:TARGET","value":{"TASK":{…},…}}
    …
    ```
    A target's tasks are read when one of them is asked for. What is damaged is as good as not
    there: the action cache remembers what was built.
    """

    desc = "JSON, a line a target, written whole"

    def __init__(self, name: str, codec: Any, *, module_name: str | None = None) -> None:
        self.name = name
        self._saved = _StoredTasks(Path(name))
        self._parts: dict[str, _Tasks] = {}  # those that were read, by target; "": of none
        self._changed: set[str] = set(self._saved.older)  # to be written as it is written now
        self._guard = threading.RLock()  # tasks that run ask what they left

    def get(self, task_id: str, dependency: str) -> Any:
        """Return what is known of a task's dependency, or None."""
        task = self._part(task_id).get(task_id)
        return None if task is None else task.get(dependency)

    def set(self, task_id: str, dependency: str, value: Any) -> None:
        """Store a value."""
        if dependency == "result:":  # the same as its values, and nothing here asks for it
            return
        value = list(value) if isinstance(value, tuple) else value  # as JSON has it
        if self.get(task_id, dependency) != value:
            with self._guard:
                self._changed.add(_target(task_id))
                self._part(task_id).setdefault(task_id, {})[dependency] = value

    def in_(self, task_id: str) -> bool:
        """Tell whether anything is known of a task."""
        return task_id in self._part(task_id)

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        with self._guard:
            if self._part(task_id).pop(task_id, None) is not None:
                self._changed.add(_target(task_id))

    def remove_all(self) -> None:
        """Forget all tasks."""
        self._saved = _StoredTasks()
        self._parts = {}
        self._changed = {""}

    def saved(self, target: str, without: Collection[str] = ()) -> str | None:
        """Return a digest of what is saved of a target's tasks.

        Args:
            target: the target.
            without: groups of tasks.

        Returns:
            None if nothing is saved, or anything of these groups, or what nobody wrote.
        """
        line = self._saved.line(target)
        if line is None and (data := self._saved.bytes_of(target)):  # an older version's
            line = _line(target, data) if without else _Line(digest(data), [])
        return None if line is None or {*without}.intersection(line.groups) else line.digest

    def left(self, target: str) -> dict[str, Left]:
        """Return what a target's tasks left in their manifests, by task, as far as it is known."""
        data = self._saved.bytes_of(target)
        try:
            tasks = unseal(_key(target), data.removesuffix(b"\n"), dict[str, _Values])
        except Damaged:
            return {}
        return {name: task.values.left for name, task in tasks.items() if task.values.left}

    def let_go(self, target: str) -> None:
        """Keep no more in memory of a target's tasks than what is to be written."""
        with self._guard:
            if target not in self._changed:
                self._parts.pop(target, None)

    def dump(self) -> None:
        """Write the file."""
        if not self._changed:
            return
        lines: dict[str, bytes | None] = dict.fromkeys(self._saved.head.targets)  # as they are
        lines |= {n: seal(_key(n), self._part_of(n)) + b"\n" for n in self._changed if n}
        places, end = {}, 0
        known: dict[str, list[Any]] = {}
        for name, line in lines.items():
            length = self._saved.head.targets[name][1] if line is None else len(line)
            places[name] = (end, length)
            end += length
            now = self._saved.line(name) if line is None else None
            if now := now or _line(name, line or self._saved.bytes_of(name)):
                known[name] = [now.digest, now.groups]
        head = seal(_key(), {"tasks": self._part_of(""), "targets": places, "lines": known})
        head += b"\n"
        try:
            with atomic.temporary(Path(self.name).parent, len(head) + end) as new:
                atomic.write_all(new.file, memoryview(head))
                for name, line in lines.items():
                    data = self._saved.bytes_of(name) if line is None else line
                    atomic.write_all(new.file, memoryview(data), len(head) + places[name][0])
                new.rename(Path(self.name))
        except (NoRoom, OSError) as error:  # the action cache remembers what was built
            print(f"warning: {failures.message(error)}", file=sys.stderr)
        self._saved = _StoredTasks(Path(self.name))
        self._changed = set()

    def _part(self, task_id: str) -> _Tasks:
        """Return what is known of the tasks of a task's target."""
        return self._part_of(_target(task_id))

    def _part_of(self, target: str) -> _Tasks:
        with self._guard:
            if target not in self._parts:
                if len(self._parts) > MOST_READ:  # the first that was read is done with, mostly
                    oldest = next((name for name in self._parts if name not in self._changed), None)
                    if oldest is not None:
                        del self._parts[oldest]
                self._parts[target] = self._saved.tasks(target)
            return self._parts[target]


def _target(task_id: str) -> str:
    """Return the target of a task's name, STAGE:TARGET[:LAYER]; nothing, if it is of none."""
    return task_id.split(":", 2)[1] if ":" in task_id else ""


def _line(target: str, data: bytes) -> _Line | None:
    """Return what the first line is to have of a target's; None, if nobody wrote that."""
    try:
        tasks = unseal(_key(target), data.removesuffix(b"\n"), dict[str, msgspec.Raw])
    except Damaged:
        return None
    return _Line(digest(data), sorted({*map(group_of, tasks)}))


def _key(target: str = "") -> str:
    """Return what a line is sealed under."""
    return f"{KEY}:{target}"


def _is_whole(task: dict[str, Any]) -> bool:
    """Tell whether what is known of a task has the types that doit and the checker take."""
    kinds = {"_values_:": dict, "deps:": list, "checker:": str, "ignore:": str}
    return all(isinstance(value, kinds.get(name, list)) for name, value in task.items())

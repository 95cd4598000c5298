"""plugins: how doit is fitted to long builds of large files: see [tool.doit] in pyproject.toml."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from doit import cmd_run, get_var
from doit.cmd_clean import Clean as DoitClean
from doit.cmd_forget import Forget as DoitForget
from doit.cmd_help import Help as DoitHelp
from doit.cmd_ignore import Ignore as DoitIgnore
from doit.cmd_info import Info as DoitInfo
from doit.cmd_resetdep import ResetDep as DoitResetDep
from doit.cmd_run import Run as DoitRun
from doit.control import TaskControl, TaskDispatcher
from doit.dependency import FileChangedChecker, JsonDB
from doit.exceptions import InvalidCommand

from cache.digest import digest_file
from cache.errors import CacheError, NoRoom
from cache.files import atomic as files
from cache.records.manifests import Manifest, ManifestError
from tasks.cli import invocation as options
from tasks.cli.command import INTERRUPTED, Command
from tasks.config.reader import BUILD, STATE, TRASH
from tasks.core.text import plural
from tasks.tensors import cuda

USAGE = """\
mlx-make: Make for MLX model artifacts (https://pydoit.org with tasks for models.toml)

  {doit}                         build every target of ./models.toml
  {doit} pack:TARGET             build one target
  {doit} quantize:TARGET         one stage of one target, and what it needs
  {doit} models=PATH …           take another models.toml; all state and output lie beside it

Commands"""
LOCKED = {
    "name": "locked",
    "short": "",
    "long": "locked",
    "type": bool,
    "default": False,
    "help": "fail if anything differs from models.lock, and never write it (for CI)",
}


class Checker(FileChangedChecker):  # type: ignore[misc]
    """Compares manifests by what was made, and other files by digest; a stamp saves both.

    A state is [size, mtime_ns, inode, digest].
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, files.Stamp], str] = {}

    def check_modified(self, path: str, stat: os.stat_result, state: list[Any]) -> bool:
        """Tell whether a file is another than the ``state`` saved says."""
        *stamp, digest = state
        now = files.Stamp.of_stat(stat)
        return list(now) != stamp and self._digest(path, now) != digest

    def get_state(self, path: str, current: list[Any] | None) -> list[Any] | None:
        """Return the state to save, or None where the saved one still holds."""
        now = files.Stamp.of(path)
        if current and list(now) == current[:-1]:
            return None
        return [*now, self._digest(path, now)]

    def _digest(self, path: str, stamp: files.Stamp) -> str:
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
                files.write(Path(self.name), data)
            except NoRoom as error:  # the action cache remembers what was built
                print(f"warning: {error}", file=sys.stderr)
            self._changed = False


class DepthFirst(TaskDispatcher):  # type: ignore[misc]
    """Finishes a layer before it begins the next, so that what is in memory stays small."""

    def _get_next_node(self, ready: Any, tasks_to_run: Any) -> Any:
        return ready.pop() if ready else super()._get_next_node(ready, tasks_to_run)


class Control(TaskControl):  # type: ignore[misc]
    """doit's control, with our dispatcher. A pattern that matches nothing is a mistake."""

    def process(self, task_selection: list[str] | None) -> None:
        """Select tasks."""
        for name in task_selection or ():
            if "*" in name and not self._get_wild_tasks(name):
                raise InvalidCommand(not_found=name)
        super().process(task_selection)

    def task_dispatcher(self) -> DepthFirst:
        """Return what hands tasks to the runner."""
        gc.freeze()  # the tasks stay: no need to look through them again
        gc.enable()
        return DepthFirst(self.tasks, self.targets, self.selected_tasks)


class Run(Command, DoitRun):  # type: ignore[misc]
    """doit's ``run``: one at a time on one state, layer by layer, and tidy when interrupted."""

    name = "run"
    cmd_options = (*DoitRun.cmd_options, LOCKED)

    def __init__(self, **kwargs: Any) -> None:
        cuda.begin()  # now, before all that is imported to run
        super().__init__(**kwargs)

    def execute(self, params: Any, args: list[str]) -> int:
        """Run the tasks named in ``args``."""
        options.locked = params["locked"]
        options.asked = args
        options.lean = not args and not params["always"]
        gc.disable()  # thousands of tasks are made, and none goes: half of the time would be its
        cmd_run.TaskControl = Control  # doit looks the class up there, and has no hook for it
        with interruptible("layers that are done are kept; run doit again to go on"), alone():
            try:
                status = int(super().execute(params, args))
            except BaseException:
                if options.early:
                    options.early.abandon()
                raise
            if options.early:
                options.early.stop()
            _finish_uploads()
            cuda.leave()
            return status


def _finish_uploads() -> None:
    for remote in options.remotes:
        try:
            pushed = remote.finish()
        except (CacheError, OSError) as error:  # what was built is built
            print(f"warning: {error}", file=sys.stderr)
            continue
        finally:
            remote.close()
        if remote.fetched_bytes:
            print(f"{remote.name}: {remote.fetched_bytes / 1e6:,.1f} MB fetched")
        if pushed.objects:
            print(
                f"{remote.name}: {plural(pushed.objects, 'object')} uploaded, "
                f"{pushed.bytes / 1e6:,.1f} MB; the last {pushed.seconds:.1f} s were for that alone"
            )


class _Alone(Command):
    """Changes doit's database, and so not beside a build."""

    def execute(self, params: Any, args: list[str]) -> int:
        """Do it to the tasks named in ``args``."""
        with alone():
            return super().execute(params, args)


class Clean(_Alone, DoitClean):  # type: ignore[misc]
    """doit's ``clean``; naming a stage, or one of a target, means all of its layers."""

    name = "clean"

    def _expand(self, clean_list: list[str]) -> list[str]:
        return _with_layers(self.task_list, super()._expand(clean_list))


class Forget(_Alone, DoitForget):  # type: ignore[misc]
    """doit's ``forget``; naming a stage, or one of a target, means all of its layers."""

    name = "forget"
    sel_tasks: Any

    def _execute(self, forget_sub: bool, forget_disable_default: bool, forget_all: bool) -> None:
        if not forget_all and (names := list(self.sel_tasks)):
            self.sel_tasks = _with_layers(self.task_list, names)
        super()._execute(forget_sub, forget_disable_default, forget_all)


class Help(Command, DoitHelp):  # type: ignore[misc]
    """doit's ``help``, on mlx-make."""

    name = "help"

    def print_usage(self, cmds: Mapping[str, Any]) -> None:
        """Print what can be typed."""
        print(USAGE.format(doit=self.bin_name))
        for name, command in sorted(cmds.items()):
            print(f"  {self.bin_name} {name:<15} {command.doc_purpose}")
        print(f"\n  {self.bin_name} help COMMAND    show a command's options")


class Info(Command, DoitInfo):  # type: ignore[misc]
    """doit's ``info``, without a task's meta: here that holds the whole graph."""

    name = "info"

    def _execute(self, pos_args: list[str], hide_status: bool = False) -> int:
        named = {task.name: task for task in self.task_list if task.name in pos_args}
        if unknown := [name for name in pos_args if name not in named]:
            raise InvalidCommand(not_found=unknown[0])
        for task in named.values():
            task.meta = None
        return int(super()._execute(pos_args, hide_status))


class Ignore(_Alone, DoitIgnore):  # type: ignore[misc]
    """doit's ``ignore``."""

    name = "ignore"


class ResetDep(_Alone, DoitResetDep):  # type: ignore[misc]
    """doit's ``reset-dep``."""

    name = "reset-dep"


def _with_layers(tasks: list[Any], names: list[str]) -> list[str]:
    """Return task names and those of all tasks below them."""
    begins = tuple(f"{name}:" for name in names)
    return [*names, *(task.name for task in tasks if task.name.startswith(begins))]


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """End the process at once, and without a traceback, when it is interrupted.

    Args:
        kept: what is not lost, for people.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    # It may be ignored, as by nohup.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted: {kept}", file=sys.stderr, flush=True)
        # Threads may still be deep in a computation, or in an upload: do not wait for them.
        os._exit(INTERRUPTED)


def _interrupt(*_: Any) -> NoReturn:
    # Once is enough: what follows is short, and leaves the terminal and the database in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def alone() -> Iterator[None]:
    """Hold the lock of the state beside models.toml; wait for whoever holds it, and say who.

    What a build that was killed had begun to pack, or to remove, is removed then.
    """
    models = Path(get_var("models", "models.toml"))
    if not models.exists():  # loading the tasks says so, and must leave no state behind
        yield
        return
    state = models.absolute().parent / STATE
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            print(f"waiting for doit, process {holder}, which works here", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        files.remove_behind(*(state / TRASH).glob(f"{files.TEMPORARY}*"))
        for left in state.with_name(BUILD).glob(f"{files.TEMPORARY}*"):
            if (state / "manifests" / left.name.removeprefix(files.TEMPORARY)).exists():
                files.discard(left, state / TRASH)
        yield

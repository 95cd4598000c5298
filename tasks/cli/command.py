"""command_line: what all commands make of mistakes, and of nobody reading what they print."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path, PurePath
from typing import Any, NoReturn

from doit import get_var
from doit.cmd_base import Command as DoitCommand
from doit.cmdparse import CmdParseError
from doit.exceptions import InvalidCommand

from cache.files import atomic, trash
from tasks.core.workspace import BUILD, STATE, TRASH

INTERRUPTED = 130  # as shells report SIGINT
UNREAD = 128 + signal.SIGPIPE  # as shells report it
SHOWN = 3  # suggestions


class Command(DoitCommand):  # type: ignore[misc]
    """To be named before the class of doit's that a command is made of."""

    loader: Any
    task_list: list[Any]

    def parse_execute(self, in_args: list[str]) -> int:
        """Do what is asked; of a name that there is not, say which are near."""
        with piped():
            self.outstream = sys.stdout  # doit took it when there may have been none
            try:
                return int(super().parse_execute(in_args) or 0)
            except CmdParseError as error:
                # doit adds all that it knows, as Python writes it.
                match = re.match(r"Error parsing Command: (.*?) \(parsing options: ", str(error))
                if match is None:
                    raise
                raise CmdParseError(f"{match[1]}. doit help {self.name} shows all.") from error
            except InvalidCommand as error:
                if name := _not_found(error):
                    raise InvalidCommand(self._unknown(name)) from error
                raise

    def execute(self, params: Any, args: list[str]) -> int:
        """Do what is asked; of options behind names that doit refuses, say where they go."""
        if params.get("outfile", "") is None:  # as outstream
            params["outfile"] = sys.stdout
        try:
            return int(super().execute(params, args) or 0)
        except (CmdParseError, InvalidCommand) as error:
            late = [arg for arg in args if arg.startswith("-")]
            if not late or not _not_found(error, late[0]).startswith("-"):
                raise
            raise InvalidCommand(
                f"{late[0]} stands behind {args[0]}: options go before names, as in "
                f"doit {self.name} {late[0]}."
            ) from error

    def _unknown(self, name: str) -> str:
        from difflib import get_close_matches  # that only a mistake pays

        depth = max(name.count(":"), 1)  # a layer's tasks only for a layer's name
        valid = [task.name for task in self.task_list if task.name.count(":") <= depth]
        kind = "task"
        if self.name == "run":  # doit lits is doit run lits
            if name in self.loader.cmd_names:
                return f"{name} is a command, which goes before its options: doit {name}."
            valid += self.loader.cmd_names
            kind = "command or task"
        # a target's name, or its folder
        near = [task for task in valid if task == f"pack:{PurePath(name).name}"]
        near = near or get_close_matches(name, dict.fromkeys(valid), SHOWN, 0.8)
        near = near or get_close_matches(name, dict.fromkeys(valid), 1)
        mend = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        return f"there is no {kind} {name!r}. {mend}doit list shows them, with --all each layer's."


def _not_found(error: Exception, default: str = "") -> str:
    """Return the name that there is not, if an error says so: doit has two ways to."""
    match = re.fullmatch(r"'(.*)' is not a task\.", str(error))
    return match[1] if match else getattr(error, "not_found", None) or default


@contextmanager
def piped() -> Iterator[None]:
    """End without a word, as other tools do, when nobody reads any more what is printed.

    The same when interrupted; with a word, when it cannot be written.
    """
    _reopen()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # arrows, where the locale has none
    try:
        yield
        sys.stdout.flush()  # what is left to Python's own end is complained of
    except BrokenPipeError:
        os._exit(UNREAD)
    except KeyboardInterrupt:  # of what does nothing that has to be said, or not yet
        os._exit(INTERRUPTED)
    except OSError as error:
        if _printable():
            raise
        print(f"ERROR: what is to be printed cannot be: {error}", file=sys.stderr, flush=True)
        os._exit(UNREAD)


def _reopen() -> None:
    """Put something in place of streams that were closed before the start (``>&-``).

    Else the next file to be opened would have the number that C libraries and other processes
    print to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _printable() -> bool:
    try:
        print(flush=True)
    except OSError:
        return False
    return True


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
        trash.remove_behind(*(state / TRASH).glob(f"{atomic.TEMPORARY}*"))
        for left in state.with_name(BUILD).glob(f"{atomic.TEMPORARY}*"):
            if (state / "manifests" / left.name.removeprefix(atomic.TEMPORARY)).exists():
                trash.discard(left, state / TRASH)
        yield

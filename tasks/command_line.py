"""command_line: what all commands make of mistakes, and of nobody reading what they print."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from doit.cmd_base import Command as DoitCommand
from doit.cmdparse import CmdParseError
from doit.exceptions import InvalidCommand

UNREAD = 128 + signal.SIGPIPE  # as shells report it
SHOWN = 3  # suggestions


class Command(DoitCommand):  # type: ignore[misc]
    """To be named before the class of doit's that a command is made of."""

    loader: Any
    task_list: list[Any]

    def parse_execute(self, in_args: list[str]) -> int:
        """Do what is asked; of a name that there is not, say which are near."""
        with piped():
            try:
                return int(super().parse_execute(in_args) or 0)
            except InvalidCommand as error:
                if name := _not_found(error):
                    raise InvalidCommand(self._unknown(name)) from error
                raise

    def execute(self, params: Any, args: list[str]) -> int:
        """Do what is asked; of options behind names that doit refuses, say where they go."""
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
            valid += self.loader.cmd_names
            kind = "command or task"
        near = [task for task in valid if task == f"pack:{name}"]  # a target's name
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
    """End without a word, as other tools do, when nobody reads any more what is printed."""
    try:
        yield
        sys.stdout.flush()  # what is left to Python's own end is complained of
    except BrokenPipeError:
        os._exit(UNREAD)

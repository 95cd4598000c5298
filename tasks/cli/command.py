"""command: what every command shares: its session, and what it makes of mistakes."""

from __future__ import annotations

import getopt
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from doit.cmd_base import Command as DoitCommand
from doit.cmdparse import CmdParseError
from doit.exceptions import InvalidCommand, InvalidDodoFile

from cache.errors import CacheError
from tasks.cli import failures
from tasks.cli.doit_adapter import models_file, name_not_found, parse_error_message
from tasks.cli.options import DEFAULT, Options
from tasks.cli.process import piped, printable
from tasks.cli.state_lock import alone
from tasks.core.program import COMMAND
from tasks.core.task_names import target_of

if TYPE_CHECKING:  # imported when the tasks are loaded
    from tasks.cli.session import Session

SUGGESTIONS = 3  # at most, of what a mistyped name may have meant


class Command(DoitCommand):  # type: ignore[misc]
    """To be named before the class of doit's that a command is made of.

    Attributes:
        options: what the tasks must know; to be set before they are loaded.
        names_tasks: whether its arguments are tasks, or the targets that they build.
    """

    options: Options = DEFAULT
    names_tasks = True
    loader: Any = None  # of a command that loads tasks
    task_list: list[Any]

    def __init__(self, **kwargs: Any) -> None:
        # doit takes it from sys.argv, which says -m of python -m doit.
        super().__init__(**{**kwargs, "bin_name": COMMAND})

    @property
    def session(self) -> Session:
        """What the tasks were made of.

        Raises:
            InvalidCommand: they are another dodo.py's.
        """
        session: Session | None = self.loader.session
        if session is None:
            raise InvalidCommand("there are no models here: run it where models.toml lies")
        return session

    def parse_execute(self, in_args: list[str]) -> int:
        """Do what is asked; of a name that there is not, say which are near."""
        with piped():
            self.outstream = sys.stdout  # doit took it when there may have been none
            try:
                if not self.names_tasks:  # a task's own options stand behind it
                    in_args = _options_first(in_args, self.cmdparser)
                return int(super().parse_execute(in_args) or 0)
            except CmdParseError as error:
                message = parse_error_message(error, self.cmd_options)
                if message is None:
                    raise
                raise CmdParseError(f"{message}. {self._all_options}") from error
            except getopt.GetoptError as error:
                raise CmdParseError(f"{error}. {self._all_options}") from error
            except InvalidCommand as error:
                if name := name_not_found(error):
                    raise InvalidCommand(self._unknown(name)) from error
                raise
            except CacheError as error:
                raise InvalidDodoFile(failures.message(error)) from error
            except OSError as error:
                _raise_of_output(error)
                raise InvalidDodoFile(failures.message(error)) from error
            finally:
                if self.loader and self.loader.session:
                    self.loader.session.close()

    @property
    def _all_options(self) -> str:
        return f"{COMMAND} help {self.name} shows all."

    def execute(self, params: Any, args: list[str]) -> int:
        """Do what is asked; of options behind names that doit refuses, say where they go."""
        if params.get("outfile", "") is None:  # as outstream
            params["outfile"] = sys.stdout
        try:
            return int(super().execute(params, args) or 0)
        except (CmdParseError, InvalidCommand) as error:
            late = [arg for arg in args if arg.startswith("-")]
            if not late or not (name_not_found(error) or late[0]).startswith("-"):
                raise
            raise InvalidCommand(
                f"{late[0]} stands behind {args[0]}: options go before names, as in "
                f"{COMMAND} {self.name} {late[0]}."
            ) from error

    def _unknown(self, name: str) -> str:
        from difflib import get_close_matches  # that only a mistake pays

        depth = max(name.count(":"), 1)  # a layer's tasks only for a layer's name
        session = self.loader and self.loader.session
        if session and (refused := session.refused.get(target_of(name))):
            from tasks.planning.refused import messages

            return messages([refused])[0]  # it has no layers
        valid = [task.name for task in self.task_list if task.name.count(":") <= depth]
        if self.names_tasks and session:
            valid += session.config.targets
        kind = "task"
        if self.name == "run":  # doit lits is doit run lits
            if name in self.loader.cmd_names:
                return f"{name} is a command, which goes before its options: {COMMAND} {name}."
            valid += self.loader.cmd_names
            kind = "command or task"
        typed = PurePath(name).name  # of build/TARGET, the target
        low = typed.lower()
        near = [task for task in valid if task.lower().startswith(low)][:SUGGESTIONS]
        near = near or get_close_matches(typed, dict.fromkeys(valid), SUGGESTIONS, 0.8)
        near = near or get_close_matches(typed, dict.fromkeys(valid), 1)
        mend = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        shown = f"{COMMAND} list shows them, with --all each layer's."
        return f"there is no {kind} {name!r}. {mend}{shown}"


def _options_first(args: list[str], parser: Any) -> list[str]:
    """Return arguments with the options first, which may stand behind names as well.

    Raises:
        getopt.GetoptError: there is no such option, or it has a value and takes none, or the
            reverse.
    """
    long = parser.get_long()
    options, names = getopt.gnu_getopt(args, parser.get_short(), long)
    first = []
    for option, value in options:
        if option.startswith("--"):
            first.append(f"{option}={value}" if f"{option[2:]}=" in long else option)
        else:
            first.append(option + value)
    return [*first, "--", *names]


def _raise_of_output(error: OSError) -> None:
    """Raise an error again if what is printed cannot be, or nobody reads it."""
    # A flush tells nothing: what could not be written is dropped.
    if isinstance(error, BrokenPipeError) or not printable():
        raise error


class StateCommand(Command):
    """A command that changes doit's database, and so does not run beside a build."""

    def execute(self, params: Any, args: list[str]) -> int:
        """Do it to the tasks named in ``args``."""
        with alone(models_file()):
            return super().execute(params, args)

"""builtin: doit's own commands, fitted to this project's tasks and messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doit.cmd_help import Help as DoitHelp
from doit.cmd_ignore import Ignore as DoitIgnore
from doit.cmd_resetdep import ResetDep as DoitResetDep

from tasks.cli.command import Command, StateCommand
from tasks.cli.doit_adapter import CleanCommand, ForgetCommand, InfoCommand
from tasks.core.program import COMMAND

USAGE = f"""\
mlx-make: Make for MLX model artifacts (https://pydoit.org with tasks for models.toml)

  {COMMAND}                         build every target of ./models.toml
  {COMMAND} pack:TARGET             build one target
  {COMMAND} quantize:TARGET         one stage of one target, and what it needs
  {COMMAND} models=PATH …           take another models.toml; all state and output lie beside it

Commands"""


class Clean(StateCommand, CleanCommand):
    """``doit clean``."""

    name = "clean"


class Forget(StateCommand, ForgetCommand):
    """``doit forget``."""

    name = "forget"


class Help(Command, DoitHelp):  # type: ignore[misc]
    """doit's ``help``, on mlx-make."""

    name = "help"

    def print_usage(self, cmds: Mapping[str, Any]) -> None:
        """Print what can be typed."""
        print(USAGE)
        for name, command in sorted(cmds.items()):
            print(f"  {COMMAND} {name:<15} {command.doc_purpose}")
        print(f"\n  {COMMAND} help COMMAND    show a command's options")


class Info(Command, InfoCommand):
    """``doit info``."""

    name = "info"


class Ignore(StateCommand, DoitIgnore):  # type: ignore[misc]
    """``doit ignore``."""

    name = "ignore"


class ResetDep(StateCommand, DoitResetDep):  # type: ignore[misc]
    """``doit reset-dep``."""

    name = "reset-dep"

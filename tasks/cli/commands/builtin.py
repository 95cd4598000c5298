"""builtin: doit's own commands, fitted to this project's tasks and messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doit.cmd_help import Help as DoitHelp
from doit.cmd_ignore import Ignore as DoitIgnore
from doit.cmd_resetdep import ResetDep as DoitResetDep
from doit.exceptions import InvalidCommand

from cache.errors import one_line
from tasks.cli.command import Command, StateCommand
from tasks.cli.doit_adapter import CleanCommand, ForgetCommand, InfoCommand
from tasks.cli.options import Options
from tasks.core.program import COMMAND, ROOT

USAGE = f"""\
mlx-make: Make for MLX model artifacts (https://pydoit.org with tasks for models.toml)

  {COMMAND}                         build every target of ./models.toml
  {COMMAND} TARGET                  build one target
  {COMMAND} quantize:TARGET         one stage of one target, and what it needs
  {COMMAND} models=PATH …           take another models.toml; all state and output lie beside it

Commands"""


ORPHANS = {
    "name": "orphans",
    "short": "",
    "long": "orphans",
    "type": bool,
    "default": False,
    "help": "remove what was built of targets that models.toml does not have any more",
}


class Clean(StateCommand, CleanCommand):
    """``doit clean``."""

    name = "clean"
    cmd_options = (*CleanCommand.cmd_options, ORPHANS)
    options = Options(cleans=True)

    def _execute(
        self,
        dryrun: bool,
        cleandep: bool,
        cleanall: bool,
        cleanforget: bool,
        orphans: bool,
        pos_args: list[str],
    ) -> None:
        if not orphans:
            super()._execute(dryrun, cleandep, cleanall, cleanforget, pos_args)
            return
        if pos_args:
            raise InvalidCommand(
                f"--orphans is of targets that models.toml does not have; {pos_args[0]} is for "
                f"{COMMAND} clean without it."
            )
        self._remove_orphans(dryrun=dryrun)
        self.dep_manager.close()

    def _remove_orphans(self, *, dryrun: bool) -> None:
        """Remove what was built here of the targets that are gone; what was not stays."""
        from tasks.cli.orphans import orphans
        from tasks.cli.session import last_stamps
        from tasks.execution import cleaning

        workspace = self.session.workspace
        for target in orphans(self.session):
            stamps, name = last_stamps(self.dep_manager, target), str(workspace.built(target))
            for line in cleaning.clean(workspace, target, stamps, name=name, dryrun=dryrun):
                print(one_line(line))


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
        print(f"\ndocumentation: {ROOT / 'docs'}")


class Info(Command, InfoCommand):
    """``doit info``."""

    name = "info"


class Ignore(StateCommand, DoitIgnore):  # type: ignore[misc]
    """``doit ignore``."""

    name = "ignore"


class ResetDep(StateCommand, DoitResetDep):  # type: ignore[misc]
    """``doit reset-dep``."""

    name = "reset-dep"

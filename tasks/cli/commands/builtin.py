"""builtin: ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doit.cmd_clean import Clean as DoitClean
from doit.cmd_forget import Forget as DoitForget
from doit.cmd_help import Help as DoitHelp
from doit.cmd_ignore import Ignore as DoitIgnore
from doit.cmd_info import Info as DoitInfo
from doit.cmd_resetdep import ResetDep as DoitResetDep
from doit.exceptions import InvalidCommand

from tasks.cli.command import Command, alone

USAGE = """\
mlx-make: Make for MLX model artifacts (https://pydoit.org with tasks for models.toml)

  {doit}                         build every target of ./models.toml
  {doit} pack:TARGET             build one target
  {doit} quantize:TARGET         one stage of one target, and what it needs
  {doit} models=PATH …           take another models.toml; all state and output lie beside it

Commands"""


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

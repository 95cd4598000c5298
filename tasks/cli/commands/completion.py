"""completion: ``doit completion``: has a shell complete names of commands, targets and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from doit.exceptions import InvalidCommand

from tasks.cli.command import Command
from tasks.cli.doit_adapter import models_file
from tasks.config import reader
from tasks.core.errors import ConfigError
from tasks.core.program import COMMAND
from tasks.core.task_names import task_name
from tasks.stages import registry

WORDS = "words"  # what the scripts ask for

BASH = """\
_mlx_make() {
    local IFS=$'\\n' typed=${COMP_LINE:0:COMP_POINT}
    typed=${typed##*[[:space:]]}
    COMPREPLY=($(compgen -W "$(mlx-make completion words 2>/dev/null)" -- "$typed"))
    if [[ $COMP_WORDBREAKS == *:* ]]; then  # what stands before a colon is not replaced
        COMPREPLY=("${COMPREPLY[@]#"${typed%"${typed##*:}"}"}")
    fi
}
complete -o default -F _mlx_make mlx-make
"""
ZSH = """\
#compdef mlx-make
_mlx_make() {
    local -a names
    names=(${(f)"$(mlx-make completion words 2>/dev/null)"})
    compadd -a names || _files
}
compdef _mlx_make mlx-make
"""
FISH = """\
complete --command mlx-make --no-files --arguments '(mlx-make completion words 2>/dev/null)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


class Completion(Command):
    """``doit completion``."""

    name = "completion"
    doc_purpose = "print a script by which a shell completes mlx-make's arguments"
    doc_usage = "|".join(SCRIPTS)
    doc_description = """\
It is read when the shell starts, by such a line of its own file:

    eval "$(mlx-make completion bash)"   # ~/.bashrc
    eval "$(mlx-make completion zsh)"    # ~/.zshrc
    mlx-make completion fish | source    # config.fish"""

    def __init__(self, cmds: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._commands = sorted(cmds)

    def execute(self, _params: Any, args: list[str]) -> int:
        """Print the script, or the names that may be typed.

        Raises:
            InvalidCommand: no shell is named, or another one.
        """
        if args == [WORDS]:
            print("\n".join([*self._commands, *_names()]))
            return 0
        if len(args) != 1 or args[0] not in SCRIPTS:
            raise InvalidCommand(
                f"{COMMAND} completion needs one shell's name: {', '.join(SCRIPTS)}."
            )
        print(SCRIPTS[args[0]], end="")
        return 0


def _names() -> Iterator[str]:
    """Yield the names of targets and of their tasks, none where models.toml has mistakes."""
    try:
        targets = reader.load(models_file()).targets
    except ConfigError:
        return
    yield from targets
    for group in registry.groups():
        yield from (task_name(group, target) for target in targets)

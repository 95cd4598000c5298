"""manual: ``python -m tasks.cli.commands.manual`` writes docs/cli.md, commands and options."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from doit.cmdparse import CmdOption
from doit.doit_cmd import DoitMain

from tasks.core.program import COMMAND

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "cli.md"
CHECKOUT_ALONE = {"dumpdb", "strace", "tabcompletion"}  # for a dodo.py of one's own


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page."""
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    plugins = configured["tool"]["doit"]["plugins"]["command"]
    doits = {command.get_name(): command for command in DoitMain.DOIT_CMDS}
    parts = [INTRODUCTION]
    rest = {**doits}
    for name in sorted(plugins):
        path, _, attribute = plugins[name].partition(":")
        module = import_module(path)
        command = getattr(module, attribute)
        if name in doits and _says(command) == _says(doits[name]):
            continue
        rest.pop(name, None)
        parts += _section(name, command, doits.get(name))
        for subname, subcommand in getattr(module, "SUBCOMMANDS", {}).items():
            options = [_option(CmdOption(option)) for option in subcommand.options]
            parts += [f"### `mlx-make {name} {subname}`", _sentence(subcommand.purpose), *options]
    names = sorted(rest.keys() - CHECKOUT_ALONE)
    parts += [REST, "\n".join(f"- `mlx-make {n}`: {rest[n].doc_purpose}" for n in names)]
    return "\n\n".join(parts) + "\n"


def _says(command: Any) -> tuple[Any, ...]:
    """Return what there is to say of a command."""
    return command.doc_purpose, command.doc_usage, command.doc_description, command.cmd_options


def _section(name: str, command: Any, doits: Any | None) -> Iterator[str]:
    yield f"## `mlx-make {name}`"
    if command.doc_usage:
        yield f"```text\nmlx-make {name} {command.doc_usage}\n```"
    yield _sentence(command.doc_purpose)
    if command.doc_description:  # which names what is called here, that of an install
        yield command.doc_description.strip().replace(f"{COMMAND} ", "mlx-make ")
    known = [option["name"] for option in doits.cmd_options] if doits else []
    ours = [CmdOption(option) for option in command.cmd_options if option["name"] not in known]
    if ours:
        yield "\n".join(_option(option) for option in ours)
    if known:
        yield f"All options of doit's own `{name}` hold."


def _option(option: CmdOption) -> str:
    spelled = ", ".join(f"`{form}`" for form in option.help_param().split(", "))
    meaning = re.sub(r" \[default: (.*?)\]", r". Default: `\1`", option.help)
    lines = [f"- {spelled}: {_sentence(meaning % {'default': option.default})}"]
    lines += [f"  - `{value}`: {_sentence(text)}" for value, text in option.choices.items()]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


INTRODUCTION = """\
<!-- Written by `python -m tasks.cli.commands.manual` from the commands: change those. -->

# Command line

It is [doit](https://pydoit.org)'s own, with the commands and options below on top. In a checkout,
type `doit` for `mlx-make`. `mlx-make help COMMAND` shows all that a command takes.

| | |
|---|---|
| `mlx-make` | builds every target: it is `mlx-make run` |
| `mlx-make llama-7b` | builds one; so do its folder, `mlx-make build/llama-7b`, the beginning of \
its name where no other target's name begins so, and its task, `mlx-make pack:llama-7b` |
| `mlx-make quantize:llama-7b` | one [stage](README.md#stages) of one target, and what it needs |
| `mlx-make quantize:llama-7b:layers.0` | the same for one layer |
| `mlx-make quantize` | one stage of every target |
| `mlx-make models=PATH` | takes another `models.toml`, before or after a command |
| `mlx-make -n 2` | runs two tasks at once; without `-n`, one a core, or four where a GPU computes |

A target that cannot be planned (its checkpoint is not there, nothing knows its architecture, a
setting does not fit) fails alone, and the last lines say why. If only others are asked for, it does
not matter.

| exit status | |
|---|---|
| 0 | all is well |
| 1 | a task failed, or a target cannot be planned |
| 2 | a task could not be tried |
| 3 | `models.toml` or the command line is wrong, or nothing that is asked for can be planned: \
nothing was done |
| 130 | interrupted |
| 141 | nobody reads the output any more (`mlx-make \\| head`), or it cannot be written |"""
REST = """\
## doit's own

These are as [doit](https://pydoit.org/cmd-other.html) has them."""

if __name__ == "__main__":
    main()

"""card_template: a project's own template of cards, filled in by a process that ends.

A template is a program, and a project may be anybody's: loops in loops go on for ever, and
``'x' * 10**10`` is all memory, in Jinja's sandbox as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.layouts import limited
from tasks.layouts.limited import Limits, Refused

if TYPE_CHECKING:
    from jinja2 import Template

LIMITS = Limits(seconds=20, nbytes=1 << 30)
MAX_CHARACTERS = 16 << 20  # of a card


def fill_in(template: str, variables: Sequence[Mapping[str, Any]]) -> list[str] | Refused:
    """Return the texts that a template makes of variables (JSON), or why it makes none."""
    answer = limited.call("tasks.planning.card_template", {}, LIMITS, [template, variables])
    if isinstance(answer, Refused):
        return answer
    texts, cause = answer
    return Refused(cause) if cause else list(texts)


@cache
def compiled(template: str) -> Template:
    """Return a template, ready to be filled in: to compile it takes as long as a small target."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template)


def _fill_in(_: Path, given: list[Any]) -> tuple[list[str], str]:
    """Return texts; or none, and what is wrong with the template, with its line if that is said."""
    template, variables = given
    try:
        texts = [compiled(template).render(each) for each in variables]
        for text in texts:
            text.encode()  # halves of characters are no text
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"it makes over {MAX_CHARACTERS:,} characters")
    except Exception as error:  # whatever a template leads to: 1 / 0
        line = getattr(error, "lineno", None)
        return [], f"{f'line {line}: ' if line else ''}{str(error) or type(error).__name__}"
    return texts, ""


if __name__ == "__main__":
    limited.serve(_fill_in)

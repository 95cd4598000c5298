"""Where a key stands in a text of TOML, as far as plain text tells: parsers do not say."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tasks.core.kinds import At

BARE = r"[\w-]+"
PART = rf"{BARE}|\"[^\"]*\"|'[^']*'"
KEY = rf"(?:{PART})(?:\s*\.\s*(?:{PART}))*"


@dataclass
class Text:
    """A file's text.

    Attributes:
        path: of the file.
        text: all of it.
    """

    path: Path
    text: str = field(repr=False)

    def place(self, at: At) -> str:
        """Return the file and, where it can be told, the line of the key ``at``."""
        line = self.line(at)
        return f"{self.path}:{line}" if line else str(self.path)

    def line(self, at: At) -> int | None:
        """Return the line where the key ``at`` stands."""
        deepest, depth = None, 0
        for key, number in self._keys:
            # The deepest key that the text names on its own: inline tables share a line.
            if len(key) >= depth and key == at[: len(key)]:
                deepest, depth = number, len(key)
        inside = (number for key, number in self._keys if at and key[: len(at)] == at)
        return deepest or next(inside, None)

    def open_inline_table(self) -> tuple[int, At] | None:
        """Return the line and the key of an inline table that its line does not close."""
        for number, line in enumerate(self.text.splitlines(), 1):
            if re.match(rf"\s*{KEY}\s*=\s*{{[^\[\]{{}}#]*(#.*)?$", line):
                return number, next((key for key, there in self._keys if there == number), ())
        return None

    @cached_property
    def _keys(self) -> list[tuple[At, int]]:
        """The keys that begin a line, tables' included, and the line."""
        table: At = ()
        elements: dict[At, int] = {}  # of arrays of tables, how many so far
        keys = []
        for number, line in enumerate(self.text.splitlines(), 1):
            if match := re.match(rf"\s*(\[\[?)\s*({KEY})\s*\]", line):
                table = tuple(_parts(match[2]))
                if match[1] == "[[":
                    elements[table] = elements.get(table, -1) + 1
                    table = (*table, elements[table])
                keys.append((table, number))
            elif match := re.match(rf"\s*({KEY})\s*=", line):
                keys.append(((*table, *_parts(match[1])), number))
        return keys


@dataclass(frozen=True, eq=False)
class Where:
    """Where a file asks for something; found only when it is shown.

    Any two are equal: where a thing is asked for is no part of what is asked for.

    Attributes:
        text: of the file.
        at: the key.
    """

    text: Text
    at: At

    def __str__(self) -> str:
        return self.text.place(self.at)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Where)

    def __hash__(self) -> int:
        return 0


def spelled(at: At) -> str:
    """Return a key as a message names it: ``models."a.b".quantize.rules[1]``."""
    text = ""
    for part in at:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += "." * bool(text) + (part if re.fullmatch(BARE, part) else f'"{part}"')
    return text


def _parts(key: str) -> list[str]:
    """Split a dotted key."""
    return [part.strip("\"'") for part in re.findall(PART, key)]

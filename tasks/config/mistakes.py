"""What is wrong with a models.toml: each mistake with its line, the nearest word and the mend."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, ValidationError, convert

from tasks.config import values
from tasks.config.keys import Key, count_in_words, keys_of
from tasks.config.lines import Text, spelled
from tasks.config.tables import Build, Cache, Document, Model
from tasks.config.values import nearest, show
from tasks.core.errors import ConfigError
from tasks.core.kinds import At, Mistake, Mistakes
from tasks.core.quantization import Candidate, Quantize, Rule
from tasks.core.spec import Quality, Settings
from tasks.core.text import toml

MAX_MISTAKES = 20  # of one file
# Where a key belongs that stands in another table.
HOMES: dict[type[Struct], str] = {
    Quantize: "quantize",
    Rule: "a rule of quantize.rules",
    Candidate: "a candidate of quantize.candidates",
    Settings: "[models.NAME]",
    Cache: "[cache]",
    Build: "[build]",
    Quality: "[quality]",
}
NEAR = 0.75  # how alike words must be before any other guess is better

Table = dict[str, Any]


class MistakeList:
    """The mistakes of one file.

    Attributes:
        text: of the file.
        variables: of the environment, by the key that they set.
    """

    def __init__(self, text: Text) -> None:
        self.text = text
        self.variables: dict[At, str] = {}
        self._mistakes: list[Mistake] = []  # with ``at`` from the top

    def __bool__(self) -> bool:
        return bool(self._mistakes)

    def note(self, fact: str, at: At, mend: str = "") -> None:
        """Note a mistake at the key ``at``."""
        self._mistakes.append(Mistake(fact, mend, at))

    def add(self, mistake: Mistake, at: At) -> None:
        """Note a mistake that was found in the table ``at``."""
        self.note(mistake.fact, (*at, *mistake.at), mistake.mend)

    def error(self, otherwise: str = "") -> ConfigError:
        """Return the error that tells them all, in the order of their lines.

        Args:
            otherwise: what to tell if there is none.
        """
        order = sorted(self._mistakes, key=lambda mistake: self.text.line(mistake.at) or 0)
        texts = [*dict.fromkeys(map(self._message, order))] or [f"{self.text.path}: {otherwise}"]
        if len(texts) > MAX_MISTAKES:
            texts[MAX_MISTAKES:] = [
                f"{self.text.path}: and {len(texts) - MAX_MISTAKES} more mistakes"
            ]
        return ConfigError(*texts)

    def _message(self, mistake: Mistake) -> str:
        place = self.variables.get(mistake.at[:2]) or self.text.place(mistake.at)
        text = " ".join(filter(None, [f"{place}:", spelled(mistake.at), mistake.fact]))
        mend = mistake.mend
        return f"{text}. {mend[0].upper()}{mend[1:]}" if mend else text

    def explain(self, value: Any, table: type[Struct], at: At = ()) -> None:
        """Note what is wrong with a table, and with all that lies in it."""
        if not isinstance(value, dict):
            self.note(f"is {show(value)}, must be a table", at)
            return
        keys = keys_of(table)
        right: Table = {}
        for name, given in value.items():
            before = len(self._mistakes)
            if name in keys:
                self._explain_value(given, keys[name], (*at, name))
            else:
                self._explain_unknown(given, table, (*at, name), value)
            if len(self._mistakes) == before:
                right[name] = given
        for key in keys.values():
            if key.required and key.name not in value and table is not Document:
                self.note(f"has no {key.name}", at, f"add {key.name} = {toml(key.example)}")
        if not any(key.required and key.name not in right for key in keys.values()):
            for mistake in _conflicts(right, table):
                if mistake.at or right == value:  # what is wrong as a whole may hang on a wrong key
                    self.add(mistake, at)

    def _explain_value(self, value: Any, key: Key, at: At) -> None:
        """Note what is wrong with the value of a key."""
        if key.table and value != [] and (inner := _tables_in(value, key)) is not None:
            for below, table in inner.items():
                self.explain(table, key.table, (*at, *below))
            return
        try:
            convert(value, key.type, dec_hook=values.decode)
        except ValidationError as error:
            if isinstance(error.__cause__, Mistakes):
                for mistake in error.__cause__.mistakes:
                    example = f"write {toml(key.example)}" if key.kind == "size" else ""
                    self.note(mistake.fact, at, mistake.mend or example)
            elif key.kind == "word" and isinstance(value, str):
                self._explain_word(value, key, at)
            elif key.kind in ("words", "texts") and isinstance(value, list):
                self._explain_list(value, key, at)
            else:
                fact = f"is {show(value)}, must be {_expected(key)}"
                self.note(fact, at, _mend_value(value, key))

    def _explain_list(self, value: list[Any], key: Key, at: At) -> None:
        for i, each in enumerate(value):
            if key.kind == "words":
                self._explain_word(each, key, (*at, i))
            elif not isinstance(each, str):
                self.note(f"is {show(each)}, must be a string", (*at, i))

    def _explain_word(self, word: Any, key: Key, at: At) -> None:
        if word not in key.valid:
            fact = f"is {show(word)}; valid: {', '.join(key.valid)}"
            self.note(fact, at, nearest(word, key.valid) if isinstance(word, str) else "")

    def _explain_unknown(self, value: Any, table: type[Struct], at: At, beside: Table) -> None:
        """Note a key that its table has not, with where it belongs or what it may have meant."""
        name, keys = str(at[-1]), keys_of(table)
        if table is Document and isinstance(value, dict) and "source" in value:
            mend = f"a model is a table in models: [models.{name}]"
        else:
            mend = _home(name, value, table) or nearest(name, keys, NEAR)
        if not mend and table is Model and isinstance(value, dict):
            model = at[-2]
            self.note(
                f"is a table in {model!r} to TOML, which parts names at a point",
                at,
                f"a variant is [models.{model}.variants.{name}]"
                if "source" in beside
                else f'quote the name: [models."{model}.{name}"]',
            )
            return
        mend = mend or _missing(value, table, beside)
        mend = mend or _near_home(name, table) or nearest(name, keys)
        self.note(f"is an unknown key; valid: {', '.join(keys)}", at, mend)


def is_split_name(table: Table) -> bool:
    """Return whether a model's table is but the first part of a name with a point in it."""
    holds_tables = any(isinstance(value, dict) for value in table.values())
    return holds_tables and not keys_of(Model).keys() & table.keys()


def _home(name: str, value: Any, table: type[Struct]) -> str:
    """Return where a key belongs that another table has, or nothing."""
    for home, place in HOMES.items():
        if name in keys_of(home) and not issubclass(table, home):
            shown = isinstance(value, (int, str)) and home is Quantize
            return f"it belongs in {place}" + (
                f": quantize = {{ {name} = {toml(value)} }}" if shown else ""
            )
    return ""


def _missing(value: Any, table: type[Struct], beside: Table) -> str:
    """Return what a text may be meant for that its table cannot do without, and does."""
    missing = [key for key in keys_of(table).values() if key.required and key.name not in beside]
    unknown = beside.keys() - keys_of(table).keys()
    if isinstance(value, str) and len(unknown) == len(missing) == 1:
        return f"did you mean {missing[0].name!r}?"
    return ""


def _near_home(name: str, table: type[Struct]) -> str:
    for home, place in HOMES.items():
        close = values.closest(name, keys_of(home), NEAR)
        if close and not issubclass(table, home):
            return f"did you mean {close!r}, which belongs in {place}?"
    return ""


def _conflicts(value: Table, table: type[Struct]) -> tuple[Mistake, ...]:
    """Return what does not go together in a table whose keys are right one by one."""
    try:
        read = convert(value, table, dec_hook=values.decode)
    except ValidationError as error:
        return error.__cause__.mistakes if isinstance(error.__cause__, Mistakes) else ()
    return tuple(values.wrong_numbers(read)) if isinstance(read, Quantize) else ()


def _tables_in(value: Any, key: Key) -> dict[At, Table] | None:
    """Return the tables in a value, by where they are below it; None if it should have and has not.

    What a table of named tables holds is not looked into.
    """
    if key.kind == "table" and isinstance(value, dict):
        return {(): value}
    if key.kind == "named" and isinstance(value, dict):
        return {(name,): table for name, table in value.items()}
    if key.kind == "tables" and _is_list_of(dict, value):
        return {(i,): table for i, table in enumerate(value)}
    return None


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _expected(key: Key) -> str:
    example = toml(key.example)
    if key.table is Quantize:
        return f'a table such as {example}, "keep" or false'
    return {
        "size": f"bytes or a size such as {example}",
        "number": "a whole number",
        "count": count_in_words(key.type),
        "decimal": "a number above 0",
        "files": f"a file or a list of files, such as {example}",
        "switch": "true or false",
        "table": f"a table such as {example}" if key.example else "a table",
        "tables": f"a list such as {example}",
        "texts": f"a list of strings, such as {example}",
        "words": f"a list such as {example}",
        "numbers": f"a list such as {example}",
        "named": "a table",
    }.get(key.kind, "a string")


def _mend_value(value: Any, key: Key) -> str:
    if key.kind == "texts" and isinstance(value, str):
        return f"write {toml([value])}"
    if key.name != "bits" or not isinstance(value, float):
        return ""
    if value.is_integer():
        return f"write {value:.0f}"
    return 'for a mixture of bits name a recipe, such as recipe = "mixed_3_6"'

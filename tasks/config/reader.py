"""models.toml, read into targets or refused: every mistake at once, with its line and its mend."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct, ValidationError, convert
from msgspec.structs import asdict, replace

from tasks.checkpoints import sources
from tasks.config import values
from tasks.config.keys import Key, keys_of, toml
from tasks.config.lines import Place, Text, spelled
from tasks.config.tables import Build, Cache, Document, variable
from tasks.config.values import nearest, show
from tasks.core.errors import ConfigError
from tasks.core.program import COMMAND
from tasks.core.spec import At, Mistake, Mistakes, Settings, Size, SourceName, Target
from tasks.core.workspace import BUILD
from tasks.layouts import LAYOUTS

MAX_NAME_BYTES = 200  # file systems take 255, and temporary names are longer
SHOWN = 20  # mistakes of one file

Table = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """models.toml.

    Attributes:
        path: the file, absolute.
        targets: by name, in the file's order.
        cache: the table [cache]; its folder is absolute.
        build: the table [build].
    """

    path: Path
    targets: dict[str, Target]
    cache: Cache
    build: Build


def load(path: Path) -> Config:
    """Read models.toml.

    Raises:
        ConfigError: it is missing, empty, or says what cannot be built.
    """
    path = path.absolute()
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin with a byte order mark
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: it lists the models to build. Make one that says\n"
            '    [models.NAME]\n    source = "FOLDER OF THE CHECKPOINT"\n'
            f"or name another with: {COMMAND} models=PATH"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        record = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: a number too long
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return _Validator(Text(path, text)).config(record)


class _Validator:
    """Reads one file's tables, and gathers what is wrong with them."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.folder = text.path.parent
        self.variables: dict[At, str] = {}  # of the environment, by the key that they set
        self.mistakes: list[Mistake] = []  # with ``at`` from the top

    def config(self, record: Table) -> Config:
        """Return what the file says.

        Raises:
            ConfigError: there are mistakes; it tells them all.
        """
        record = {**record, **self.from_environment(record)}
        targets = [*self.targets(record)]
        try:
            document = convert(record, Document, dec_hook=values.decode)
        except ValidationError as error:
            self.explain(record, Document, ())
            raise self.refusal(str(error)) from None
        cache = replace(document.cache, dir=(self.folder / document.cache.dir).absolute())
        self.check_cache_folder(cache.dir)
        config = Config(
            self.text.path,
            {name: self.target(name, keys, at) for name, keys, at in targets if "source" in keys},
            cache,
            document.build,
        )
        if self.mistakes:
            raise self.refusal()
        return config

    def from_environment(self, record: Table) -> Table:
        """Return [cache] and [build] with what the environment says laid over them."""
        overlaid: Table = {}
        for name, table in ("cache", Cache), ("build", Build):
            said: Table = {}
            for key in table.__struct_encode_fields__:
                if value := os.environ.get(variable(name, key)):
                    self.variables[name, key] = variable(name, key)
                    words = [word.strip() for word in value.split(",")]
                    is_list = keys_of(table)[key].kind == "words"
                    said[key] = list(filter(None, words)) if is_list else value
            if said and isinstance(record.get(name, {}), dict):
                overlaid[name] = {**record.get(name, {}), **said}
        return overlaid

    def targets(self, record: Table) -> Iterator[tuple[str, Table, At]]:
        """Yield the name of each target, the keys that hold for it and where it is asked for.

        What is no table is left out: ``explain`` tells of it.
        """
        models = record.get("models", {})
        if models == {}:
            self.note(
                "lists no model", (), 'add [models.NAME] with source = "FOLDER OF THE CHECKPOINT"'
            )
        defaults = _table(record, "defaults")
        names: dict[str, str] = {}
        for model in _table(record, "models"):
            at: At = ("models", model)
            keys = {**defaults, **_table(models, model)}
            if "source" not in keys and isinstance(models[model], dict):
                mend = 'add source = "FOLDER", relative to this file'
                self.note("has no source", at, mend)
            variants = _table(keys, "variants")
            keys.pop("variants", None)
            self.check_name(model, names, at)
            yield model, keys, at
            for variant in variants:
                name, over = f"{model}-{variant}", _table(variants, variant)
                self.check_name(name, names, (*at, "variants", variant))
                yield name, {**keys, **over}, (*at, "variants", variant)

    def check_name(self, name: str, names: dict[str, str], at: At) -> None:
        """Note what is wrong with a target's name, and add it to ``names``."""
        if not re.fullmatch(r"\w[\w.+-]*", name) or name.endswith("."):
            self.note(
                f"makes the target name {name!r}, which is no plain folder name",
                at,
                "use letters, digits, '-', '_', '+' and '.', a letter, digit or '_' first",
            )
        if len(name.encode()) > MAX_NAME_BYTES:
            self.note(
                f"makes a target name of {len(name.encode())} bytes, more than {MAX_NAME_BYTES}",
                at,
                "use a shorter one",
            )
        folded = name.casefold()  # as file systems of macOS compare names
        if first := names.get(folded):
            self.note(
                f"would be a second build/{name}"
                + (f" (the first is {first!r})" if first != name else ""),
                at,
                "rename the model or the variant",
            )
        names.setdefault(folded, name)

    def target(self, name: str, keys: Table, at: At) -> Target:
        """Return a target, of keys that are right one by one and name a source."""
        settings = convert(keys, Settings, dec_hook=values.decode)
        source = sources.spec(keys["source"], self.folder)
        self.check_outside_build(Path(source.location), (*at, "source"))
        loader = f" ({settings.loader})" if settings.loader else ""
        return Target(
            **{
                **asdict(settings),
                "source_name": SourceName(keys["source"] + loader),
                "max_shard_bytes": settings.max_shard_bytes
                or Size(LAYOUTS[settings.layout].default_shard_bytes),
            },
            name=name,
            source=source,
            where=Place(self.text, at),
        )

    def check_cache_folder(self, folder: Path) -> None:
        """Note what is wrong with the cache's folder."""
        at: At = ("cache", "dir")
        self.check_outside_build(folder, at)
        there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not there.is_dir():
            self.note(f"is {folder}, but {there} is a file", at, "name another")

    def check_outside_build(self, folder: Path, at: At) -> None:
        """Note a folder that a build would remove."""
        if folder.resolve().is_relative_to((self.folder / BUILD).resolve()):
            fact = f"{folder} lies in {BUILD}/, which {COMMAND} writes"
            self.note(fact, at, "move it elsewhere")

    def explain(self, value: Any, table: type[Struct], at: At) -> None:
        """Note what is wrong with a table, and with all that lies in it."""
        if not isinstance(value, dict):
            self.note(f"is {show(value)}, must be a table", at)
            return
        keys = keys_of(table)
        right: Table = {}
        for name, given in value.items():
            before = len(self.mistakes)
            if name in keys:
                self.explain_value(given, keys[name], (*at, name))
            else:
                valid = ", ".join(keys)
                self.note(f"is an unknown key; valid: {valid}", (*at, name), nearest(name, keys))
            if len(self.mistakes) == before:
                right[name] = given
        for key in keys.values():
            if key.required and key.name not in value and at:
                self.note(f"has no {key.name}", at, f"add {key.name} = {toml(key.example)}")
        if not any(key.required and key.name not in right for key in keys.values()):
            for mistake in _conflicts(right, table):
                if mistake.at or right == value:  # what is wrong as a whole may hang on a wrong key
                    self.note(mistake.fact, (*at, *mistake.at), mistake.mend)

    def explain_value(self, value: Any, key: Key, at: At) -> None:
        """Note what is wrong with the value of a key."""
        if key.table and (inner := _tables_in(value, key)) is not None:
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
            else:
                self.note_refused(value, key, at)

    def note_refused(self, value: Any, key: Key, at: At) -> None:
        """Note a value that is none of a key's, as its type tells."""
        if key.kind == "word" and isinstance(value, str):
            self.note_word(value, key, at)
        elif key.kind == "words" and _is_list_of(str, value):
            for i, word in enumerate(value):
                self.note_word(word, key, (*at, i))
        else:
            self.note(f"is {show(value)}, must be {_expected(key)}", at)

    def note_word(self, word: str, key: Key, at: At) -> None:
        """Note a word that is none of the valid ones."""
        if word not in key.valid:
            fact = f"is {show(word)}; valid: {', '.join(key.valid)}"
            self.note(fact, at, nearest(word, key.valid))

    def note(self, fact: str, at: At, mend: str = "") -> None:
        """Note a mistake."""
        self.mistakes.append(Mistake(fact, mend, at))

    def refusal(self, otherwise: str = "") -> ConfigError:
        """Return the error that tells the mistakes, in the order of their lines."""
        order = sorted(self.mistakes, key=lambda mistake: self.text.line(mistake.at) or 0)
        texts = [*dict.fromkeys(map(self.message, order))] or [f"{self.text.path}: {otherwise}"]
        if len(texts) > SHOWN:
            texts[SHOWN:] = [f"{self.text.path}: and {len(texts) - SHOWN} more mistakes"]
        return ConfigError("\n".join(texts))

    def message(self, mistake: Mistake) -> str:
        """Return a mistake for people."""
        place = self.variables.get(mistake.at[:2]) or self.text.place(mistake.at)
        text = " ".join(filter(None, [f"{place}:", spelled(mistake.at), mistake.fact]))
        mend = mistake.mend
        return f"{text}. {mend[0].upper()}{mend[1:]}" if mend else text


def _table(record: Any, key: str) -> Table:
    """Return the table ``key``; an empty one if there is none, or what is there is no table."""
    value = record.get(key, {}) if isinstance(record, dict) else {}
    return value if isinstance(value, dict) else {}


def _conflicts(value: Table, table: type[Struct]) -> tuple[Mistake, ...]:
    """Return what does not go together in a table whose keys are right one by one."""
    try:
        convert(value, table, dec_hook=values.decode)
    except ValidationError as error:
        return error.__cause__.mistakes if isinstance(error.__cause__, Mistakes) else ()
    return ()


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
    return {
        "size": f"bytes or a size such as {example}",
        "number": "a whole number",
        "switch": "true or false",
        "table": f"a table such as {example}" if key.example else "a table",
        "tables": f"a list such as {example}",
        "words": f"a list such as {example}",
        "named": "a table",
    }.get(key.kind, "a string")

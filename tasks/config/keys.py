"""The keys of models.toml as their structs declare them, for messages, schema and reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from msgspec import NODEFAULT, Meta, Struct
from msgspec.structs import FieldInfo, fields

from tasks.config import tables, values
from tasks.core import kinds
from tasks.core.text import toml

Kind = Literal[
    "folder", "file", "files", "text", "texts", "size", "URL", "cluster", "repository", "switch",
    "word", "words", "number", "numbers", "count", "decimal", "table", "tables", "named",
]  # fmt: skip
_KINDS: dict[Any, Kind] = {
    Path: "folder",
    kinds.SourceName: "folder",
    kinds.TextFile: "file",
    kinds.TextFiles: "files",
    kinds.RepositoryName: "repository",
    kinds.Size: "size",
    tables.RemoteURL: "URL",
    tables.ClusterAddress: "cluster",
    str: "text",
    int: "number",
    float: "decimal",
    bool: "switch",
}
_LISTS: dict[Kind, Kind] = {
    "text": "texts",
    "word": "words",
    "number": "numbers",
    "table": "tables",
}


class Key(Struct, frozen=True):
    """One key of a table.

    Attributes:
        name: as the file spells it.
        kind: what its value is; "named" is a table of tables, by names of the user's own.
        type: what msgspec reads it as.
        required: whether the table cannot do without it.
        valid: the words that a word, or one of several, may be.
        table: what a table, each of a list or each of the named ones is.
        meaning: one sentence on what it is for.
        default: what holds without it, for people; a value of TOML where it is all in backticks.
        change: what is done again when it changes, for people.
        example: a value.
    """

    name: str
    kind: Kind
    type: Any
    required: bool
    valid: tuple[str, ...]
    table: type[Struct] | None
    meaning: str
    default: str
    change: str
    example: Any


def keys_of(table: type[Struct]) -> Mapping[str, Key]:
    """Return the keys of a table, by name."""
    return {field.encode_name: _key(field) for field in fields(table)}


def _key(field: FieldInfo) -> Key:
    kind, detail = _kind(field.type)
    metas = [meta for meta in get_args(field.type)[1:] if isinstance(meta, Meta)]
    meta = metas[-1] if metas else Meta()
    said = meta.extra or {}
    value = field.default_factory() if callable(field.default_factory) else field.default
    return Key(
        field.encode_name,
        kind,
        field.type,
        field.required,
        detail if isinstance(detail, tuple) else (),
        None if isinstance(detail, tuple) else detail,
        meta.description or "",
        said.get("default") or ("" if value is NODEFAULT else f"`{toml(value)}`"),
        said.get("change", ""),
        meta.examples[0] if meta.examples else None,
    )


def _kind(declared: Any) -> tuple[Kind, tuple[str, ...] | type[Struct]]:
    """Return what a type says that a value is, with its valid words or its table's struct."""
    if get_origin(declared) is Annotated:
        if _limit(declared, "ge") is not None:
            return "count", ()
        return _kind(get_args(declared)[0])
    origin, args = get_origin(declared), get_args(declared)
    if origin is Literal:
        return "word", args
    if origin is dict:
        return "named", args[1]
    if origin is tuple:
        kind, detail = _kind(args[0])
        return _LISTS[kind], detail
    if args:  # a union: all else in it is "not said"
        return _kind(next(a for a in args if a is not NoneType and False not in get_args(a)))
    if issubclass(declared, kinds.Word):
        return "word", values.words(declared)
    if issubclass(declared, Struct):
        return "table", declared
    return _KINDS[declared], ()


def count_in_words(declared: Any) -> str:
    """Return what a number that counts may be."""
    most = _limit(declared, "le")
    bound = "" if most is None else f", at most {most}"
    return f"a whole number, at least {_limit(declared, 'ge')}{bound}"


def _limit(declared: Any, name: str) -> int | None:
    """Return the least (``ge``) or most (``le``) of a number, where its type says one."""
    of_a_union = get_args(get_args(declared)[0]) if get_args(declared) else ()
    metas = [*get_args(declared)[1:], *(meta for each in of_a_union for meta in get_args(each)[1:])]
    limits = [getattr(meta, name) for meta in metas if isinstance(meta, Meta)]
    return next((int(limit) for limit in limits if limit is not None), None)

"""config: models.toml, read into targets or refused with the mend."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from tasks.checkpoints import sources
from tasks.config import keys
from tasks.config.keys import MAX_NAME_BYTES, MAX_SHARD, REMOTES, UNITS, Key
from tasks.core.errors import ConfigError
from tasks.core.spec import MODES, Quantize, Rule, SourceSpec, Target
from tasks.core.workspace import BUILD, CACHE_DIR

BARE = r"[\w-]+"
PART = rf"{BARE}|\"[^\"]*\"|'[^']*'"
KEY = rf"(?:{PART})(?:\s*\.\s*(?:{PART}))*"
SIZE = rf"{keys.NUMBER}([A-Za-z]*)\s*"

At = tuple[str | int, ...]  # where in the file: keys, and indices of array elements


@dataclass(frozen=True)
class Config:
    """models.toml.

    Attributes:
        path: the file, absolute.
        targets: by name, in the file's order.
        cache: the cache's folder, absolute.
        keep: stages whose results the cache keeps; those of quantize it always does.
        remote: URL of the store shared with other machines, or None.
        mode: what is done with the remote.
        max_bytes: what ``doit cache gc`` leaves in the cache, in bytes, or None for no bound.
        memory_bytes: what the layers in flight may take together, in bytes, or None if not said.
    """

    path: Path
    targets: dict[str, Target]
    cache: Path
    keep: frozenset[str] = frozenset({"cast"})
    remote: str | None = None
    mode: str = "read-write"
    max_bytes: int | None = None
    memory_bytes: int | None = None


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
            "or name another with: doit models=PATH"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        record = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: a number too long
        raise ConfigError(f"{path} is not TOML: {error}") from error
    return _Reader(path, text).config(record)


def size_bytes(text: str) -> int | None:
    """Return the bytes that a size such as ``2.5GB`` says, rounded down, or None if it is none."""
    match = re.fullmatch(SIZE, text)
    if not match or match[3] not in UNITS:
        return None
    part = int((match[2] or "").ljust(18, "0"))  # in 10⁻¹⁸, since a float would round
    return int(match[1]) * UNITS[match[3]] + part * UNITS[match[3]] // 10**18


class _Reader:
    """Checks one file's tables; knows the text, so that errors can name a line."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text
        self.variables: dict[At, str] = {}  # of the environment, by the key that they set

    def config(self, record: dict[str, Any]) -> Config:
        self.known(record, ("cache", "build", "defaults", "models"), ())
        cache = self.settings(record, "cache", keys.CACHE)
        build = self.settings(record, "build", keys.BUILD)
        folder = self.cache_dir(cache)
        targets = self.targets(record)
        built = (self.path.parent / BUILD).resolve()
        for place, at in [
            (folder, ("cache", "dir")),
            *((Path(t.source.location), ("models",)) for t in targets.values()),
        ]:
            if place.resolve().is_relative_to(built):  # removed as targets are built
                self.refuse(
                    f"{place} lies in {BUILD}/, which doit writes", at, mend="move it elsewhere"
                )
        return Config(
            self.path,
            targets,
            folder,
            self.keep(cache),
            self.remote(cache),
            self.one_of(cache, keys.CACHE["mode"], ("cache",)) or Config.mode,
            self.size(cache, keys.CACHE["max_size"], ("cache",)),
            self.size(build, keys.BUILD["memory"], ("build",)),
        )

    def settings(self, record: dict[str, Any], name: str, known: dict[str, Key]) -> dict[str, Any]:
        """Return the table ``name``, with what the environment says laid over it."""
        table = self.table(record, name, ())
        self.known(table, known, (name,))
        said: dict[str, Any] = {}
        for key in known.values():
            variable = keys.variable(name, key.name)
            if value := os.environ.get(variable):  # CI sets what it does not know to ""
                self.variables[name, key.name] = variable
                words = [word.strip() for word in value.split(",")]
                said[key.name] = list(filter(None, words)) if key.kind == "words" else value
        return {**table, **said}

    def cache_dir(self, cache: dict[str, Any]) -> Path:
        at: At = ("cache", "dir")
        folder = self.folder(self.text_of(cache, "dir", ("cache",), CACHE_DIR), at)
        there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not there.is_dir():
            self.refuse(f"is {folder}, but {there} is a file", at, mend="name another")
        return folder

    def keep(self, cache: dict[str, Any]) -> frozenset[str]:
        key = keys.CACHE["keep"]
        at: At = ("cache", key.name)
        stages = cache.get(key.name, list(Config.keep))
        if not isinstance(stages, list) or not all(isinstance(stage, str) for stage in stages):
            self.wrong_type(stages, f"a list such as {key.example}", at)
        for i, stage in enumerate(stages):
            self.check(stage, key.valid, (*at, i))
        return frozenset(stages)

    def remote(self, cache: dict[str, Any]) -> str | None:
        at: At = ("cache", "remote")
        url = cache.get("remote")
        if url is not None and not isinstance(url, str):
            self.refuse("is no string", at, mend=f'write "{REMOTES["s3"]}"')
        if url is not None and not re.fullmatch(keys.REMOTE, url):
            fact, mend = _no_remote(url)
            self.refuse(fact, at, mend)
        return url

    def targets(self, record: dict[str, Any]) -> dict[str, Target]:
        defaults = self.table(record, "defaults", ())
        self.known(defaults, keys.MODEL, ("defaults",))
        # By themselves, so that a mistake in them is shown there and not in the first model.
        self.target("defaults", {"source": ".", **defaults}, ("defaults",))
        models = self.table(record, "models", ())
        if not models:
            self.refuse(
                "lists no model",
                (),
                mend='add [models.NAME] with source = "FOLDER OF THE CHECKPOINT"',
            )
        targets: dict[str, Target] = {}
        for name in models:
            model = self.table(models, name, ("models",))
            at: At = ("models", name)
            variants = self.table(model, "variants", at)
            model = {key: value for key, value in model.items() if key != "variants"}
            self.known(model, keys.MODEL, at, more=("variants",))
            self.add(targets, name, {**defaults, **model}, at)
            for variant in variants:
                over = self.table(variants, variant, (*at, "variants"))
                where = (*at, "variants", variant)
                self.known(over, keys.MODEL, where)
                self.add(targets, f"{name}-{variant}", {**defaults, **model, **over}, where)
        return targets

    def add(self, targets: dict[str, Target], name: str, model: dict[str, Any], at: At) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", name) or name.endswith("."):
            self.refuse(
                f"makes the target name {name!r}, which is no plain folder name",
                at,
                mend="use letters, digits, '-', '_', '+' and '.', a letter, digit or '_' first",
            )
        if len(name.encode()) > MAX_NAME_BYTES:
            self.refuse(
                f"makes a target name of {len(name.encode())} bytes, more than {MAX_NAME_BYTES}",
                at,
                mend="use a shorter one",
            )
        for other in targets:
            if other.casefold() == name.casefold():  # as file systems of macOS compare names
                self.refuse(
                    f"would be a second build/{name}"
                    + (f" (the first is {other!r})" if other != name else ""),
                    at,
                    mend="rename the model or the variant",
                )
        targets[name] = self.target(name, model, at)

    def target(self, name: str, model: dict[str, Any], at: At) -> Target:
        source = self.text_of(model, "source", at)
        if not source:
            self.refuse("has no source", at, mend='add source = "FOLDER", relative to this file')
        loader = self.one_of(model, keys.MODEL["loader"], at)
        layout = self.one_of(model, keys.MODEL["layout"], at) or "mlx-lm"
        return Target(
            name,
            self.source(source, (*at, "source")),
            f"{source} ({loader})" if loader else source,
            loader,
            layout,
            self.one_of(model, keys.MODEL["dtype"], at),
            self.quantize(model.get("quantize", False), (*at, "quantize")),
            self.one_of(model, keys.MODEL["device"], at),
            self.size(model, keys.MODEL["max_shard_size"], at) or MAX_SHARD[layout],
            self.where(at),
        )

    def source(self, text: str, at: At) -> SourceSpec:
        if sources.kind(text) == "folder":
            self.folder(text, at)  # refuses what no folder can be called
        return sources.spec(text, self.path.parent)

    def folder(self, text: str, at: At) -> Path:
        try:
            path = Path(text).expanduser()
        except RuntimeError:
            self.refuse(f"is {text!r}, but there is no such user", at, mend="write the folder out")
        if not text or "\0" in text:
            self.refuse(f"is {text!r}, which no folder can be called", at, mend="name a folder")
        return (self.path.parent / path).absolute()

    def quantize(self, value: Any, at: At) -> Quantize | None:
        if value is False:  # so that a variant can take back what its model asks for
            return None
        if not isinstance(value, dict):
            self.wrong_type(value, "a table such as { bits = 4 }", at)
        self.known(value, keys.QUANTIZE, at)
        mode = self.one_of(value, keys.QUANTIZE["mode"], at) or "affine"
        recipe = self.one_of(value, keys.QUANTIZE["recipe"], at)
        if recipe and "bits" in value:
            self.refuse("has both recipe and bits", at, mend="a recipe sets bits itself: drop one")
        if recipe and mode != "affine":
            self.refuse(
                f"has recipe {recipe!r} with mode {mode!r}",
                at,
                mend="drop one: mlx-lm's recipes are for mode 'affine'",
            )
        bits, group_size = self.numbers(value, mode, at)
        rules = value.get("rules", [])
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            wanted = 'a list such as [{ match = "lm_head", skip = true }]'
            self.wrong_type(rules, wanted, (*at, "rules"))
        found = [self.rule(rule, mode, (*at, "rules", i)) for i, rule in enumerate(rules)]
        return Quantize(bits, group_size, mode, recipe, tuple(found))

    def rule(self, value: dict[str, Any], mode: str, at: At) -> Rule:
        self.known(value, keys.RULE, at)
        match = self.text_of(value, "match", at)
        if not match:
            self.refuse("has no match", at, mend='add match = "*.mlp.down_proj"')
        skip = value.get("skip", False)
        if not isinstance(skip, bool):
            self.wrong_type(skip, "true or false", (*at, "skip"))
        own_mode = self.one_of(value, keys.RULE["mode"], at)
        bits, group_size = self.numbers(value, own_mode or mode, at)
        if not skip and not (own_mode or bits or group_size):
            self.refuse(
                f"({match!r}) changes nothing", at, mend="add bits, group_size, mode or skip = true"
            )
        if skip and (own_mode or bits or group_size):
            self.refuse(f"({match!r}) skips and quantizes", at, mend="drop skip or the rest")
        return Rule(match, bits, group_size, own_mode, skip)

    def numbers(self, value: dict[str, Any], mode: str, at: At) -> tuple[int | None, int | None]:
        group_sizes, all_bits = MODES[mode]
        return (
            self.number(value, "bits", all_bits, f"mode {mode!r}", at),
            self.number(value, "group_size", group_sizes, f"mode {mode!r}", at),
        )

    def number(
        self, value: dict[str, Any], key: str, valid: Iterable[int], what: str, at: At
    ) -> int | None:
        number = value.get(key)
        if number is None:
            return None
        if not isinstance(number, int) or isinstance(number, bool):
            self.wrong_type(number, "a whole number", (*at, key))
        if number not in valid:
            known = sorted(valid)
            near = min(known, key=lambda n: abs(n - number))
            self.refuse(
                f"is {number}; {what} takes {', '.join(map(str, known))}",
                (*at, key),
                mend=f"use {near}" if near != number else "",
            )
        return number

    def size(self, record: dict[str, Any], key: Key, at: At) -> int | None:
        """Return the size in bytes, rounded down."""
        if key.name not in record:
            return None
        value, at = record[key.name], (*at, key.name)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            self.wrong_type(value, f"bytes or a size such as {key.example}", at)
        text = value if isinstance(value, str) else _show(value)
        size = size_bytes(text)
        if size is None:
            match = re.fullmatch(SIZE, text)
            units = ", ".join(unit for unit in UNITS if len(unit) > 1)
            alike = [u for u in UNITS if u and match and u.casefold() == match[3].casefold()]
            self.refuse(
                f"is {_show(value)}, which is no size; units are {units}",
                at,
                mend=f'write "{match[0].strip().removesuffix(match[3])}{alike[0]}"'
                if match and alike
                else f"write {key.example}",
            )
        if size < 1:
            self.refuse(f"is {value!r}: no room for a tensor", at, mend=f"write {key.example}")
        return size

    def table(self, record: dict[str, Any], key: str, at: At) -> dict[str, Any]:
        value = record.get(key, {})
        if not isinstance(value, dict):
            self.wrong_type(value, "a table", (*at, key))
        return value

    def text_of(self, record: dict[str, Any], key: str, at: At, default: str = "") -> str:
        value = record.get(key, default)
        if not isinstance(value, str):
            self.wrong_type(value, "a string", (*at, key))
        return value

    def one_of(self, record: dict[str, Any], key: Key, at: At) -> str | None:
        if key.name not in record:
            return None
        value = self.text_of(record, key.name, at)
        self.check(value, key.valid, (*at, key.name))
        return value

    def check(self, value: str, valid: Iterable[str], at: At) -> None:
        if value not in valid:
            self.refuse(
                f"is {_show(value)}; valid: {', '.join(valid)}", at, mend=_nearest(value, valid)
            )

    def known(
        self,
        record: dict[str, Any],
        valid: Iterable[str],
        at: At,
        more: tuple[str, ...] = (),
    ) -> None:
        all_valid = (*valid, *more)
        for key in record:
            if key not in all_valid:
                self.refuse(
                    f"is an unknown key; valid: {', '.join(all_valid)}",
                    (*at, key),
                    mend=_nearest(key, all_valid),
                )

    def wrong_type(self, value: Any, wanted: str, at: At) -> NoReturn:
        self.refuse(f"is {_show(value)}, must be {wanted}", at)

    def refuse(self, fact: str, at: At, mend: str = "") -> NoReturn:
        key = ""
        for part in at:
            if isinstance(part, int):
                key += f"[{part}]"
            else:
                key += "." * bool(key) + (part if re.fullmatch(BARE, part) else f'"{part}"')
        text = " ".join(filter(None, [f"{self.where(at)}:", key, fact]))
        raise ConfigError(f"{text}. {mend[0].upper()}{mend[1:]}" if mend else text)

    def where(self, at: At) -> str:
        if variable := self.variables.get(at[:2]):
            return variable
        line = self.line(at)
        return f"{self.path}:{line}" if line else str(self.path)

    def line(self, at: At) -> int | None:
        """Return the line where the key ``at`` stands, as far as plain text tells."""
        found, depth = None, 0
        for key, number in self.lines:
            # The deepest key that the text names on its own: inline tables share a line.
            if len(key) >= depth and key == at[: len(key)]:
                found, depth = number, len(key)
        inside = (number for key, number in self.lines if at and key[: len(at)] == at)
        return found or next(inside, None)

    @cached_property
    def lines(self) -> list[tuple[At, int]]:
        """The keys that begin a line, tables' included, and the line."""
        table: At = ()
        elements: dict[At, int] = {}  # of arrays of tables, how many so far
        found = []
        for number, line in enumerate(self.text.splitlines(), 1):
            if match := re.match(rf"\s*(\[\[?)\s*({KEY})\s*\]", line):
                table = tuple(_parts(match[2]))
                if match[1] == "[[":
                    elements[table] = elements.get(table, -1) + 1
                    table = (*table, elements[table])
                found.append((table, number))
            elif match := re.match(rf"\s*({KEY})\s*=", line):
                found.append(((*table, *_parts(match[1])), number))
        return found


def _parts(key: str) -> list[str]:
    """Split a dotted key."""
    return [part.strip("\"'") for part in re.findall(PART, key)]


def _show(value: Any) -> str:
    """Return a value as the file may spell it, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # thousands of digits
        return "a number too long to show"
    return text if len(text) <= 100 else f"{text[:99]}…"


def _no_remote(url: str) -> tuple[str, str]:
    """Return what is wrong with a remote's URL and the mend.

    Neither shows more of it than the scheme, since the rest may hold a password.
    """
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", url, re.DOTALL)
    forms = ", ".join(REMOTES.values())
    if not match:
        return f"is no URL; valid: {forms}", ""
    scheme, host, rest = match.groups()
    if "@" in host:
        return "holds credentials", "take them out: credentials come from the environment"
    if scheme not in REMOTES:
        return f"has the scheme {scheme!r}; valid: {forms}", _nearest(scheme, REMOTES)
    if "?" in rest or "#" in rest:
        mend = "drop it: credentials come from the environment ('?' in a path is %3F, '#' %23)"
        return "has a query or a fragment", mend
    if re.search(r"[\x00-\x20\x7f]", url):
        return "has a space or a control character", "write a space as %20"
    wanted = {"s3": "bucket", "gs": "bucket", "az": "container", "file": "absolute path"}
    fact = f"has no {wanted.get(scheme, 'host')} after {scheme}://"
    return fact, f'write "{REMOTES[scheme]}"'


def _nearest(word: str, valid: Iterable[str]) -> str:
    from difflib import get_close_matches  # 5 ms that only a mistake pays

    close = get_close_matches(word.lower(), list(valid), 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else ""

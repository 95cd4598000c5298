"""models.toml, read into targets or refused: every mistake at once, with its line and its mend."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import ValidationError, convert
from msgspec.structs import asdict, replace

from tasks.checkpoints import sources
from tasks.config import values
from tasks.config.keys import keys_of
from tasks.config.lines import Text, Where, spelled
from tasks.config.mistakes import MistakeList, is_split_name
from tasks.config.tables import Build, Cache, ClusterAddress, Document, variable
from tasks.core.errors import ConfigError
from tasks.core.kinds import At, RepositoryName, Size, SourceName, TextFile, TextFiles
from tasks.core.program import COMMAND
from tasks.core.quantization import Quantize
from tasks.core.spec import Quality, Settings, Target
from tasks.core.workspace import BUILD
from tasks.layouts.registry import LAYOUTS
from tasks.stages import registry

HOST_AND_PORT = r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}"
MAX_NAME_BYTES = 200  # file systems take 255, and temporary names are longer

Table = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """models.toml.

    Attributes:
        path: the file, absolute.
        targets: by name, in the file's order.
        cache: the table [cache]; its folder is absolute.
        build: the table [build].
        quality: the table [quality]; its texts are absolute.
    """

    path: Path
    targets: dict[str, Target]
    cache: Cache
    build: Build
    quality: Quality


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
            f"{path} does not exist: it lists the models to build. {COMMAND} init writes "
            "one for the checkpoints here; or make one that says",
            "    [models.NAME]",
            '    source = "FOLDER OF THE CHECKPOINT"',
            f"or name another with: {COMMAND} models=PATH",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    try:
        record = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not only TOMLDecodeError: a number too long
        raise ConfigError(
            f"{path} is not TOML: {error}{_mend(Text(path, text), str(error))}"
        ) from error
    return _Reader(Text(path, text)).config(record)


class _Reader:
    """Reads one file's tables."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.folder = text.path.parent
        self.build = (self.folder / BUILD).resolve()
        self.resolved: dict[Path, Path] = {}  # folders, links followed
        self.mistakes = MistakeList(text)
        self.published: dict[str, str] = {}  # targets, by repository

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
            self.mistakes.explain(record, Document)
            raise self.mistakes.error(str(error)) from None
        for at, quantize in _quantizations(document):
            for mistake in values.wrong_numbers(quantize):
                self.mistakes.add(mistake, at)
        cache = replace(document.cache, dir=(self.folder / document.cache.dir).absolute())
        self.check_cache_folder(cache.dir)
        build = document.build
        if build.cluster and "://" not in build.cluster:
            build = replace(build, cluster=self.scheduler_file(build.cluster))
        config = Config(
            self.text.path,
            {name: self.target(name, keys, at) for name, keys, at in targets if "source" in keys},
            cache,
            build,
            self.quality(document.quality),
        )
        if self.mistakes:
            raise self.mistakes.error()
        return config

    def from_environment(self, record: Table) -> Table:
        """Return [cache] and [build] with what the environment says laid over them."""
        overlaid: Table = {}
        for name, table in ("cache", Cache), ("build", Build):
            said: Table = {}
            for key in table.__struct_encode_fields__:
                if value := os.environ.get(variable(name, key)):
                    self.mistakes.variables[name, key] = variable(name, key)
                    words = [word.strip() for word in value.split(",")]
                    is_list = keys_of(table)[key].kind == "words"
                    said[key] = list(filter(None, words)) if is_list else value
            if said and isinstance(record.get(name, {}), dict):
                overlaid[name] = {**record.get(name, {}), **said}
        return overlaid

    def targets(self, record: Table) -> Iterator[tuple[str, Table, At]]:
        """Yield the name of each target, the keys that hold for it and where it is asked for.

        What is no table is left out: ``MistakeList.explain`` tells of it.
        """
        models = record.get("models", {})
        if models == {}:
            self.mistakes.note(
                "lists no model", (), 'add [models.NAME] with source = "FOLDER OF THE CHECKPOINT"'
            )
        defaults = _table(record, "defaults")
        names: dict[str, str] = {}
        for model in _table(record, "models"):
            at: At = ("models", model)
            own = models[model]
            keys = {**defaults, **_table(models, model)}
            if "source" not in keys and isinstance(own, dict) and not is_split_name(own):
                mend = 'add source = "FOLDER", relative to this file'
                self.mistakes.note("has no source", at, mend)
            variants = _variants(keys)
            keys = {name: keys[name] for name in keys if name not in ("variants", "matrix")}
            for name, over, below in [("", {}, ()), *variants]:
                name = f"{model}-{name}" if below else model
                self.check_name(name, names, (*at, *below))
                yield name, {**keys, **over}, (*at, *below)

    def check_name(self, name: str, names: dict[str, str], at: At) -> None:
        """Note what is wrong with a target's name, and add it to ``names``."""
        if not re.fullmatch(r"\w[\w.+-]*", name) or name.endswith("."):
            self.mistakes.note(
                f"makes the target name {name!r}, which is no plain folder name",
                at,
                "use letters, digits, '-', '_', '+' and '.', a letter, digit or '_' first",
            )
        if name in registry.groups():
            self.mistakes.note(
                f"makes the target name {name!r}, which is the name of a stage: {COMMAND} {name} "
                "does that of every target",
                at,
                "rename the model or the variant",
            )
        if len(name.encode()) > MAX_NAME_BYTES:
            self.mistakes.note(
                f"makes a target name of {len(name.encode())} bytes, more than {MAX_NAME_BYTES}",
                at,
                "use a shorter one",
            )
        folded = name.casefold()  # as file systems of macOS compare names
        if first := names.get(folded):
            self.mistakes.note(
                f"would be a second build/{name}"
                + (f" (the first is {first!r})" if first != name else ""),
                at,
                "rename the model or the variant",
            )
        names.setdefault(folded, name)

    def target(self, name: str, keys: Table, at: At) -> Target:
        """Return a target, of keys that are right one by one and name a source."""
        if at[2:3] == ("matrix",):
            keys = {**keys, "quantize": self.without_choosers(keys["quantize"], at)}
        settings = convert(keys, Settings, dec_hook=values.decode)
        if at[2:3] == ("matrix",) and isinstance(settings.quantize, Quantize):
            self.check_matrix(settings.quantize, at)
        self.check_repository(name, settings.publish, at)
        source = sources.spec(keys["source"], self.folder)
        if folder := sources.folder_of(source):
            self.check_outside_build(folder, (*at, "source"))
        loader = f" ({settings.loader})" if settings.loader else ""
        return Target(
            **{
                **asdict(settings),
                "quantize": settings.quantize != "keep" and settings.quantize,
                "keep": settings.quantize == "keep",
                "source_name": SourceName(keys["source"] + loader),
                "max_shard_bytes": settings.max_shard_bytes
                or Size(LAYOUTS[settings.layout].default_shard_bytes),
                "files": settings.files and self.folder / settings.files,
                "adapter": settings.adapter_name
                and sources.spec(settings.adapter_name, self.folder),
                "card": settings.card_name and self.folder / settings.card_name,
            },
            name=name,
            source=source,
            where=Where(self.text, at),
        )

    def quality(self, table: Quality) -> Quality:
        """Return the table [quality] with its texts' paths absolute."""
        text, held_out, imatrix = table.text, table.evaluate_text, table.imatrix
        return replace(
            table,
            text=text and TextFiles(str((self.folder / name).absolute()) for name in text),
            evaluate_text=held_out and TextFile((self.folder / held_out).absolute()),
            imatrix=imatrix and TextFile((self.folder / imatrix).absolute()),
        )

    def scheduler_file(self, name: ClusterAddress) -> ClusterAddress:
        """Return a scheduler file's path, absolute; note what must be an address instead."""
        path = self.folder / name
        # A file may yet come into being, as the cluster starts.
        if re.fullmatch(HOST_AND_PORT, name, re.ASCII) and not path.exists():
            fact = f"is {name!r}, and there is no such file"
            self.mistakes.note(fact, ("build", "cluster"), f'did you mean "tcp://{name}"?')
        return ClusterAddress(path)

    def check_repository(self, target: str, publish: RepositoryName | None, at: At) -> None:
        """Note a repository that no hub takes, or that another target is published to."""
        if publish is None:
            return
        name = publish.of(target)
        if not values.is_repository(name):
            fact = f"makes {name!r} of the target's name, which no repository can be called"
            self.mistakes.note(fact, (*at, "publish"), "rename the target, or write ORG/NAME")
        elif first := self.published.get(name.casefold()):
            fact = f"is {name!r}, which {first} is published to as well"
            self.mistakes.note(fact, (*at, "publish"), 'write "ORG/{target}"')
        self.published.setdefault(name.casefold(), target)

    def without_choosers(self, quantize: Table, at: At) -> Table:
        """Note what chooses bits itself beside a matrix's, and return the rest."""
        choosers = {
            "recipe": f"recipe {quantize.get('recipe')!r}, which sets",
            "target_bpw": "target_bpw, which chooses",
            "fit": "fit, which chooses",
        }
        given = [name for name in choosers if quantize.get(name) is not None]
        for name in given:
            fact = f"is for {choosers[name]} bits itself"
            self.mistakes.note(fact, at[:-1], f"drop {name}, or the matrix")  # once for all bits
        return {"bits": quantize["bits"]} if given else quantize

    def check_matrix(self, quantize: Quantize, at: At) -> None:
        """Note what is wrong with the bits of a matrix's variant."""
        for mistake in values.wrong_numbers(quantize):
            if mistake.at == ("bits",):
                self.mistakes.note(mistake.fact, at, mistake.mend)

    def check_cache_folder(self, folder: Path) -> None:
        """Note what is wrong with the cache's folder."""
        at: At = ("cache", "dir")
        self.check_outside_build(folder, at)
        there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not there.is_dir():
            self.mistakes.note(f"is {folder}, but {there} is a file", at, "name another")

    def check_outside_build(self, folder: Path, at: At) -> None:
        """Note a folder that a build would remove."""
        if folder not in self.resolved:  # a thousand targets may have one source
            self.resolved[folder] = folder.resolve()
        if self.resolved[folder].is_relative_to(self.build):
            fact = f"{folder} lies in {BUILD}/, which {COMMAND} writes"
            self.mistakes.note(fact, at, "move it elsewhere")


def _mend(text: Text, error: str) -> str:
    """Return what to do about a text that is no TOML, if that can be told."""
    if not (unclosed := text.open_inline_table()):
        at_line = re.search(r"Invalid value \(at line (\d+)", error)
        line_text = text.text.splitlines()[int(at_line[1]) - 1].strip() if at_line else ""
        return (
            f". In {line_text}: text stands in quotes, true and false are small and without"
            if at_line
            else ""
        )
    line, at = unclosed
    table = f": [{spelled(at)}], and each key on a line of its own" if at else ""
    return f". The {{ in line {line} is not closed there, as TOML wants it. Write a table{table}"


def _variants(model: Table) -> Iterator[tuple[str, Table, At]]:
    """Yield what the variants of a model add to its name and to its keys, and where below it."""
    variants = _table(model, "variants")
    for name in variants:
        yield name, _table(variants, name), ("variants", name)
    all_bits = _table(model, "matrix").get("bits", [])
    for i, bits in enumerate(all_bits if isinstance(all_bits, list) else []):
        quantize = {**_table(model, "quantize"), "bits": bits}
        yield f"{bits}bit", {"quantize": quantize}, ("matrix", "bits", i)


def _quantizations(document: Document) -> Iterator[tuple[At, Quantize]]:
    """Yield the tables that say how to quantize, and where each is."""
    tables: dict[At, Settings] = {("defaults",): document.defaults}
    for name, model in document.models.items():
        tables["models", name] = model
        for variant, settings in model.variants.items():
            tables["models", name, "variants", variant] = settings
    for at, table in tables.items():
        if isinstance(table.quantize, Quantize):
            yield (*at, "quantize"), table.quantize


def _table(record: Any, key: str) -> Table:
    """Return the table ``key``; an empty one if there is none, or what is there is no table."""
    value = record.get(key, {}) if isinstance(record, dict) else {}
    return value if isinstance(value, dict) else {}

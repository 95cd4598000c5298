"""Values of models.toml that are more than TOML's own types, read or refused with the mend."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tasks.checkpoints import sources
from tasks.checkpoints.loaders import LOADERS
from tasks.config.tables import ClusterAddress, RemoteURL
from tasks.core.kinds import (
    At,
    LayoutName,
    LoaderName,
    Mistake,
    Mistakes,
    RepositoryName,
    Size,
    SourceName,
    StageName,
    TextFile,
    TextFiles,
    Word,
)
from tasks.core.paths import path_of
from tasks.core.quantization import MODES, Candidate, Quantize, Rule
from tasks.core.text import SIZE, UNITS, size_bytes
from tasks.layouts.registry import LAYOUTS
from tasks.stages import registry
from tasks.tensors import modes

# What a remote may be, by its URL's scheme.
REMOTES = {
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "az": "az://CONTAINER/PREFIX",
    "https": "https://HOST/PATH",
    "http": "http://HOST/PATH",
    "file": "file:///ABSOLUTE/PATH",
}
# Credentials and tokens (``user:password@``, ``?sig=``) have no place in it.
_HOST = r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
_PATH = r"/[^\x00-\x20\x7f?#]*"
# Of the hub's own names, without the digits that only it can tell to be taken.
_WORD = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPOSITORY = rf"(?=.{{3,96}}$){_WORD}/(?!.*\.(?:git|ipynb)$){_WORD}"
CLUSTER = r"(?:tcp|tls)://(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}|(?!.*://)[^\x00]+"
REMOTE = rf"(?:(?:s3|gs|az)://[A-Za-z0-9_.-]+|https?://{_HOST})(?:{_PATH})?|file://{_PATH}"


def words(kind: type[Word]) -> tuple[str, ...]:
    """Return the valid words of a kind, as its registry has them."""
    registries: dict[type[Word], Iterable[str]] = {
        LoaderName: LOADERS,
        LayoutName: LAYOUTS,
        StageName: registry.configurable(),
    }
    return tuple(registries[kind])


def decode(kind: type, value: Any) -> Any:
    """Read a value as a type that msgspec does not know, for which it calls this.

    Raises:
        Mistakes: it is no such value, with what is wrong with it.
        ValueError: it is no such value, and its type says all.
    """
    if issubclass(kind, Word):
        if value not in words(kind):
            raise ValueError
        return kind(value)
    if kind is Size:
        return _size(value)
    if kind in _READERS:
        return _READERS[kind](value)
    if kind in (TextFile, TextFiles):
        return _text(kind, value)
    if kind is RepositoryName:
        return _repository(value)
    if kind is SourceName:
        if not isinstance(value, str):
            raise ValueError
        sources.spec(value, Path())  # refuses what names none
        return SourceName(value)
    raise NotImplementedError(kind)


def _path(value: Any, what: str = "folder") -> Path:
    if not isinstance(value, str):
        raise ValueError
    return path_of(value, what)


def _text(kind: type, value: Any) -> TextFile | TextFiles:
    if kind is TextFile:
        return TextFile(_path(value, "file"))
    names = value if isinstance(value, list) and value else [value]
    return TextFiles(str(_path(name, "file")) for name in names)


def _repository(value: Any) -> RepositoryName:
    if not isinstance(value, str):
        raise ValueError
    name = RepositoryName(value)
    if not is_repository(name.of("target")):
        mend = 'write "ORG/NAME", or "ORG/{target}"'
        raise Mistakes(Mistake(f"is {value!r}, which no repository can be called", mend))
    return name


def is_repository(name: str) -> bool:
    """Tell whether the hub would take a repository of that name, with its owner's."""
    return re.fullmatch(REPOSITORY, name, re.ASCII) is not None


def _size(value: Any) -> Size:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    text = value if isinstance(value, str) else show(value)
    size = size_bytes(text)
    if size is None:
        match = re.fullmatch(SIZE, text)
        units = ", ".join(unit for unit in UNITS if len(unit) > 1)
        unit = match[3].casefold() if match else ""
        # "5g" may be either; of "5gb" only the case is wrong.
        alike = [u for u in UNITS if u and unit and u.casefold() in (unit, f"{unit}b", f"{unit}ib")]
        number = match[0].strip().removesuffix(match[3]) if match else ""
        raise Mistakes(
            Mistake(
                f"is {show(value)}, which is no size; units are {units}",
                "write " * bool(alike) + " or ".join(f'"{number}{unit}"' for unit in alike),
            )
        )
    if size < 1:
        raise Mistakes(Mistake(f"is {value!r}: no room for a tensor"))
    return Size(size)


def _remote(value: Any) -> RemoteURL:
    """Read a URL; messages show no more of it than the scheme: the rest may hold a password."""
    if not isinstance(value, str):
        raise Mistakes(Mistake("is no string", f'write "{REMOTES["s3"]}"'))
    if not re.fullmatch(REMOTE, value):
        raise Mistakes(_no_remote(value))
    return RemoteURL(value)


def _cluster(value: Any) -> ClusterAddress:
    """Read a scheduler's address, or the path of a file that Dask wrote."""
    if not isinstance(value, str) or not re.fullmatch(CLUSTER, value):
        fact = "is no address of a Dask scheduler, and no file"
        mend = 'write "tcp://HOST:8786", "tls://HOST:8786" or the path of a scheduler file'
        raise Mistakes(Mistake(fact, mend))
    return ClusterAddress(value)


def _no_remote(url: str) -> Mistake:
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(.*)", url, re.DOTALL)
    forms = ", ".join(REMOTES.values())
    if not match:
        return Mistake(f"is no URL; valid: {forms}")
    scheme, host, rest = match.groups()
    if "@" in host:
        return Mistake("holds credentials", "take them out: credentials come from the environment")
    if scheme not in REMOTES:
        return Mistake(f"has the scheme {scheme!r}; valid: {forms}", nearest(scheme, REMOTES, 0.5))
    if "?" in rest or "#" in rest:
        mend = "drop it: credentials come from the environment ('?' in a path is %3F, '#' %23)"
        return Mistake("has a query or a fragment", mend)
    if re.search(r"[\x00-\x20\x7f]", url):
        return Mistake("has a space or a control character", "write a space as %20")
    wanted = {"s3": "bucket", "gs": "bucket", "az": "container", "file": "absolute path"}
    fact = f"has no {wanted.get(scheme, 'host')} after {scheme}://"
    return Mistake(fact, f'write "{REMOTES[scheme]}"')


def wrong_numbers(quantize: Quantize) -> Iterator[Mistake]:
    """Yield the numbers that the installed MLX does not take in their mode."""
    yield from _wrong_numbers(quantize, quantize.mode, ())
    for i, rule in enumerate(quantize.rules):
        yield from _wrong_numbers(rule, rule.mode or quantize.mode, ("rules", i))
    for i, candidate in enumerate(quantize.candidates):
        mode = candidate.mode or quantize.mode
        yield from _wrong_numbers(candidate, mode, ("candidates", i))


def _wrong_numbers(table: Quantize | Rule | Candidate, mode: str, at: At) -> Iterator[Mistake]:
    for i, (name, number) in enumerate([("group_size", table.group_size), ("bits", table.bits)]):
        if number is None or number in MODES[mode][i]:  # which need not be asked
            continue
        valid = modes.numbers(mode)[i]
        if number not in valid:
            near = min(valid, key=lambda n: abs(n - number))
            known = ", ".join(map(str, valid))
            yield Mistake(f"is {number}; mode {mode!r} takes {known}", f"use {near}", (*at, name))


_READERS: dict[type, Callable[[Any], Any]] = {
    RemoteURL: _remote,
    ClusterAddress: _cluster,
    Path: _path,
}


def closest(word: str, valid: Iterable[str], near: float = 0.6) -> str | None:
    """Return the valid word that is most like another, or None if none is ``near``, of 1."""
    from difflib import get_close_matches  # 5 ms that only a mistake pays

    return next(iter(get_close_matches(word.lower(), list(valid), 1, near)), None)


def nearest(word: str, valid: Iterable[str], near: float = 0.6) -> str:
    """Return a mend that names the closest valid word, or nothing if none is near."""
    close = closest(word, valid, near)
    return f"did you mean {close!r}?" if close else ""


def show(value: Any) -> str:
    """Return a value as the file may spell it, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # thousands of digits
        return "a number too long to show"
    return text if len(text) <= 100 else f"{text[:99]}…"

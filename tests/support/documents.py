"""documents: what `models.toml` might say: what is right, one mistake in it, anything at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

from tasks.config.keys import Key, keys_of
from tasks.config.tables import Build, Cache, Matrix
from tasks.core import quantization, spec
from tasks.core.quantization import MODES
from tasks.tensors import modes

Table = dict[str, Any]

# The keys of each table.
CACHE = keys_of(Cache)
BUILD = keys_of(Build)
QUALITY = keys_of(spec.Quality)
MODEL = keys_of(spec.Settings)
QUANTIZE = keys_of(quantization.Quantize)
RULE = keys_of(quantization.Rule)
CANDIDATE = keys_of(quantization.Candidate)
MATRIX = keys_of(Matrix)

# With a key on each line.
EXAMPLE = """\
[cache]
dir = "cache"
keep = ["cast"]
remote = "s3://bucket/prefix"
mode = "read-only"
max_size = "20GB"
[build]
memory = "4GiB"
[quality]
text = ["calibration.txt"]
evaluate_text = "held-out.txt"
samples = 8
[defaults]
dtype = "float16"
[models.a]
source = "b"
quantize = { bits = 4, group_size = 64, mode = "affine", rules = [{ match = "*", skip = true }] }
max_shard_size = "5GiB"
[models.a.variants.c]
device = "cpu"
[[models.a.variants.c.quantize.rules]]
match = "lm_head"
bits = 8
"""


def toml(document: Mapping[str, Any]) -> str:
    """A document as TOML."""
    return "\n".join(f"{_quoted(key)} = {spelled(value)}" for key, value in document.items())


def spelled(value: object) -> str:
    """A value as TOML, in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(k)} = {spelled(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(spelled, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return str(value).lower()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# What is right


def _numbers(mode: str) -> dict[str, st.SearchStrategy[int]]:
    group_sizes, bits = modes.numbers(mode)
    return {"bits": st.sampled_from(bits), "group_size": st.sampled_from(group_sizes)}


@st.composite
def _rule(draw: st.DrawFn, mode: str) -> Table:
    rule = {"match": draw(st.sampled_from(["*", "lm_head"]))}
    if draw(st.booleans()):
        return {**rule, "skip": True}
    own = draw(st.none() | st.sampled_from(list(MODES)))
    numbers = draw(st.fixed_dictionaries({}, optional=_numbers(own or mode)))
    if not own and not numbers:
        numbers = {"bits": MODES[mode][1][0]}
    return {**rule, **numbers, **({"mode": own} if own else {})}


@st.composite
def _quantize(draw: st.DrawFn) -> Table:
    own = draw(st.none() | st.sampled_from(list(MODES)))
    mode = own or "affine"
    rules = {"rules": st.lists(_rule(mode), max_size=2)}
    table = draw(st.fixed_dictionaries({}, optional={**_numbers(mode), **rules}))
    if own:
        table["mode"] = own
    if "bits" not in table and draw(st.booleans()):
        return table | draw(_budget(mode))
    if mode == "affine" and draw(st.booleans()):
        table["recipe"] = draw(st.sampled_from(quantization.RECIPES))
    return table


@st.composite
def _budget(draw: st.DrawFn, mode: str) -> Table:
    candidates = st.lists(
        st.fixed_dictionaries({}, optional=_numbers(mode)), min_size=1, max_size=2
    )
    table = draw(
        st.fixed_dictionaries({}, optional={"candidates": candidates, "min_bits": st.just(3)})
    )
    if draw(st.booleans()):
        return {**table, "target_bpw": draw(st.sampled_from([4, 4.5]))}
    return {**table, "fit": draw(_right(QUANTIZE["fit"])), "context": draw(st.just(8192))}


def _right(key: Key) -> st.SearchStrategy[Any]:
    if key.kind == "word":
        return st.sampled_from(key.valid)
    if key.kind == "words":
        return st.lists(st.sampled_from(key.valid), max_size=3)
    if key.kind == "table":
        return st.just(False) | _quantize()
    values = {
        "folder": ["b", "~", "/", "../c d", "β"],
        "file": ["b.txt", "~/c d", "/β"],
        "files": ["b.txt", ["~/c d", "/β"]],
        "count": [2, 1000],
        "text": ["a b", "ß"],
        "texts": [[], ["a", "b c"]],
        "switch": [True, False],
        "decimal": [4, 4.5],
        "size": [1, 10**9, "5GiB", "1 MB", "7", "0.5kB"],
        "URL": ["s3://b/c", "gs://b", "az://c/ß/", "https://h:8443/a%20b", "http://[::1]/a@b",
                "file:///a"],
        "cluster": ["tcp://10.0.0.2:8786", "tls://[::1]:1", "scheduler.json", "/ß c.json"],
    }  # fmt: skip
    return st.sampled_from(values[key.kind])


def _optional(table: Mapping[str, Key]) -> dict[str, st.SearchStrategy[Any]]:
    # Whether a repository is right depends on the targets' names, and on those of others.
    return {key.name: _right(key) for key in table.values() if key.kind != "repository"}


def _some(table: Mapping[str, Key]) -> st.SearchStrategy[Table]:
    return st.fixed_dictionaries({}, optional=_optional(table))


def _models(source: bool) -> st.SearchStrategy[Table]:
    fixed = {"source": _right(MODEL["source"])} if source else {}
    optional = {name: some for name, some in _optional(MODEL).items() if name not in fixed}
    # No model or variant makes the target of another.
    names = st.sampled_from(["8bit", "ß", "", ".5", "c-", "d_", "e+"])
    variants = st.dictionaries(names, _some(MODEL), max_size=3)
    model = st.fixed_dictionaries(fixed, optional={**optional, "variants": variants})
    return st.dictionaries(
        st.sampled_from(["a", "b_", "_llama-3.1+", "größe", "7-"]), model, min_size=1, max_size=2
    )


@st.composite
def right(draw: st.DrawFn) -> Table:
    """A document without a mistake."""
    document = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "cache": _some(CACHE),
                "build": _some(BUILD),
                "quality": _some(QUALITY),
                "defaults": _some(MODEL),
            },
        )
    )
    defaults = document.get("defaults", {})
    models = draw(_models("source" not in defaults))
    for model in models.values():
        if not {**defaults, **model}.get("quantize") and draw(st.booleans()):
            bits = st.sampled_from([2, 3, 6])  # others might be a variant's name
            model["matrix"] = {"bits": draw(st.lists(bits, unique=True))}
    return {**document, "models": models}


# One mistake


WRONG: dict[str, list[Any]] = {
    "folder": [5, True, [], {}, "", "a\0"],
    "file": [5, True, [], {}, "", "a\0"],
    "files": [5, True, [], {}, "", "a\0", [5], ["a", ""]],
    "repository": [5, True, [], "", "a", "/a", "a/", "a/b/c", "a/b c", "{target}", "a/{name}"],
    "texts": ["a", [5], [[]], {}, True],
    "word": [5, True, "no-such-word", "", []],
    "words": ["cast", ["no-such-word"], [5], [[]], {}, True],
    "size": [0, -1, 1.5, 10**18, True, [], "", "GiB", "0", "0.0GiB", "-1GiB", "5 gib", "1e3", ".5B",
             "1,5GiB", "1" * 19],
    "URL": [5, [], "", "bucket/a", "ftp://host", "S3://b", "s3://", "https:///a", "https://u:p@h",
            "https://h:port", "s3://k@b", "az://c/a?sig=s", "gs://b/#", "file://a/b", "s3://b/a c"],
    "cluster": [5, [], "", "tcp://host", "http://host:8786", "tcp://host:x", "tcp://:8786"],
    "count": [-1, 5.5, "4", True, []],
    "decimal": [0, -1.5, "4", True, []],
    "number": [0, 7, 5.5, "4", True, []],
    "numbers": [4, [0], [4, 7], [5.5], ["4"], [True], {}],
    "text": [5, "", [], True],
    "switch": [0, "yes", []],
    "table": [True, 4, "4", [],
                 {"recipe": "mixed_3_6", "mode": "mxfp4"}, {"mode": "mxfp8", "bits": 4},
                 {"mode": "nvfp4", "group_size": 32}, {"group_size": 16}, {"bits": 7},
                 {"mode": "mxfp8", "rules": [{"match": "*", "bits": 4}]},
                 {"rules": [{"match": "*", "group_size": 16}]}],
    "tables": [{}, "x", [8], [{}], [{"bits": 4}], [{"match": "*"}], [{"match": "*", "skip": False}],
              [{"match": "*", "skip": True, "bits": 4}],
              [{"match": "*", "skip": True, "mode": "affine"}],
              [{"match": "*", "mode": "nvfp4", "bits": 8}]],
}  # fmt: skip
WRONG_CANDIDATES = [{}, "x", [8], [{"bits": 7}], [{"mode": "nvfp4", "bits": 8}]]


def wrong_values(key: Key) -> list[Any]:
    """What a key cannot be."""
    return WRONG_CANDIDATES if key.name == "candidates" else WRONG[key.kind]


NO_NAMES = ("a/b", "/", "..", "a b", "a:b", "a=b", "a.", "\x7f", "a\0b", "a" * 201)


def _tables(document: Table) -> Iterator[tuple[Table, Mapping[str, Key]]]:
    """Every table in it that has keys of ours, and which."""
    for name, known in (("cache", CACHE), ("build", BUILD), ("quality", QUALITY)):
        if name in document:
            yield document[name], known
    models = list(document["models"].values())
    variants = [table for model in models for table in model.get("variants", {}).values()]
    yield from ((model["matrix"], MATRIX) for model in models if "matrix" in model)
    for table in (*models, *variants, *filter(None, [document.get("defaults")])):
        yield table, MODEL
        if quantize := table.get("quantize"):
            yield quantize, QUANTIZE
            for rule in quantize.get("rules", []):
                yield rule, RULE


@st.composite
def wrong(draw: st.DrawFn) -> Table:
    """A document with one mistake, which makes it wrong whatever else it says."""
    document = copy.deepcopy(draw(right()))
    kind = draw(st.sampled_from(["value"] * 5 + ["key", "key", "name", "table", "source"]))
    if kind in ("value", "key"):
        table, known = draw(st.sampled_from(list(_tables(document))))
        key = draw(st.sampled_from(list(known.values())))
        if kind == "key":
            table[f"{key.name}s"] = draw(_right(MODEL["source"]))
        else:
            table[key.name] = draw(st.sampled_from(wrong_values(key)))
    elif kind == "name":
        model = draw(st.sampled_from(list(document["models"].values())))
        names = draw(st.sampled_from([document["models"], model.setdefault("variants", {})]))
        names[draw(st.sampled_from(NO_NAMES))] = {"source": "b"}
    elif kind == "table":
        document[
            draw(st.sampled_from(["cache", "build", "quality", "defaults", "models", "model"]))
        ] = draw(st.sampled_from([5, "a", [], True]))
    else:
        for table in (document.get("defaults", {}), *document["models"].values()):
            table.pop("source", None)
    return document


# Anything at all


WORDS = (
    *("models", "cache", "build", "defaults", "variants", "a", "b", "A", "", "a/b", ".."),
    *CACHE,
    *BUILD,
    *QUALITY,
    *MODEL,
    *QUANTIZE,
    *RULE,
    *MATRIX,
    "matrix",
    *(word for key in (*MODEL.values(), *CACHE.values()) for word in key.valid),
    *quantization.RECIPES,
    *quantization.MODES,
    *("5GiB", "0", "~", "~nobody-of-that-name", "*", "\0", "\x7f", "s3://b", "s3://u:p@b", "://"),
)
_texts = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]))
_numbers_of_any_kind = (
    st.sampled_from([4, 8, 32, 64]) | st.integers(-(2**63), 2**63 - 1) | st.floats()
)
_values = st.recursive(
    _texts | _numbers_of_any_kind | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def anything(draw: st.DrawFn) -> Table:
    """A document of which up to three values, anywhere, were replaced by any; or any at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.dictionaries(_texts, _values, max_size=3))
    document = copy.deepcopy(draw(right()))
    for _ in range(draw(st.integers(0, 3))):
        table: Any = document
        while isinstance(table, dict) and table:
            name = draw(st.sampled_from(list(table)))
            if not isinstance(table[name], dict) or not draw(st.integers(0, 4)):
                table[draw(st.just(name) | _texts)] = draw(_values)
                break
            table = table[name]
    return document

"""schema: ``python -m tasks.config.schema`` writes models.toml's JSON Schema and reference."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tasks.config.keys import Key, count_in_words, keys_of
from tasks.config.reader import MAX_NAME_BYTES
from tasks.config.tables import Build, Cache, ClusterAddress, Document, Matrix, Model, RemoteURL
from tasks.config.values import CLUSTER, REMOTE, REMOTES, words
from tasks.core.kinds import RepositoryName, Size, SourceName, TextFile, TextFiles, Word
from tasks.core.quantization import MODES, Candidate, Quantize, Rule
from tasks.core.spec import Quality, Settings
from tasks.core.text import NUMBER, UNITS, toml
from tasks.layouts.registry import LAYOUTS
from tasks.tensors import modes

DOCS = Path(__file__).resolve().parents[2] / "docs"

Schema = dict[str, Any]

# Not ``\w``, which is ASCII alone to editors: what is not ASCII is let through.
FIRST = r"[^\x00-/:-@\[-^`{-\x7f]"
INNER = r"[^\x00-*,/:-@\[-^`{-\x7f]"
LAST = r"[^\x00-*,./:-@\[-^`{-\x7f]"
# Some digit is not 0.
SIZE = rf"^(?=[\s0.]*[1-9]){NUMBER}({'|'.join(UNITS)})\s*$"


def main() -> None:
    """Write both files."""
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")


def files() -> dict[Path, str]:
    """Return what the files are to hold, by path."""
    return {
        DOCS / "models.schema.json": json.dumps(schema(), indent=1, ensure_ascii=False) + "\n",
        DOCS / "models-toml.md": page(),
    }


def schema() -> Schema:
    """Return the JSON Schema (draft 2020-12).

    It refuses nothing that ``reader.load`` reads. ``load`` alone refuses what it cannot say: two
    targets of one name, a folder in build/, 4.0 where a whole number is wanted.
    """
    whole = _without_null(msgspec.json.schema(Document, schema_hook=_custom))
    tables: dict[str, Schema] = whole["$defs"]
    for table in (Cache, Build, Quality, Settings, Model, Matrix, Quantize, Rule, Candidate):
        for key in keys_of(table).values():
            if key.change:
                _describe_default(tables[table.__name__]["properties"][key.name], key)
    document = tables["Document"]
    models, variants = document["properties"]["models"], tables["Model"]["properties"]["variants"]
    names = {"pattern": f"^{FIRST}({INNER}*{LAST})?$", "maxLength": MAX_NAME_BYTES}
    more = {"pattern": f"^({INNER}*{LAST})?$", "maxLength": MAX_NAME_BYTES - len("a-")}
    models |= {"minProperties": 1, "propertyNames": names}
    variants |= {"propertyNames": more}
    document |= {
        "if": {"properties": {"defaults": {"required": ["source"]}}, "required": ["defaults"]},
        "else": {"properties": {"models": {"additionalProperties": {"required": ["source"]}}}},
    }
    bits = {number for mode in MODES for number in modes.numbers(mode)[1]}
    tables["Matrix"]["properties"]["bits"]["items"] = {"enum": sorted(bits)}
    tables["Quantize"] |= _quantize()
    tables["Rule"] |= _rule()
    tables["Candidate"] |= {"allOf": _by_mode()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "models.toml",
        **whole,
    }


def _custom(kind: type) -> Schema:
    """Return what a type is that msgspec does not know."""
    if issubclass(kind, Word):
        return {"enum": list(words(kind))}
    if kind is Size:
        number = {"minimum": 1, "maximum": 10**18 - 1}
        return {"type": ["integer", "string"], **number, "pattern": SIZE}
    if kind is RemoteURL:
        return {"type": "string", "pattern": f"^({REMOTE})$"}
    if kind is ClusterAddress:
        return {"type": "string", "pattern": f"^({CLUSTER})$"}
    if kind is RepositoryName:
        return {"type": "string", "pattern": r"^[A-Za-z0-9._-]+/([A-Za-z0-9._-]|\{target\})+$"}
    file = {"type": "string", "pattern": r"^[^\x00]+$"}
    if kind is TextFiles:
        return {"anyOf": [file, {"type": "array", "items": file, "minItems": 1}]}
    if kind in (Path, SourceName, TextFile):
        return file
    raise NotImplementedError(kind)


def _without_null(schema: Any) -> Any:
    """Return a schema without null, which TOML has not: there a key is left out."""
    if isinstance(schema, list):
        return [_without_null(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    clean = {k: _without_null(v) for k, v in schema.items() if (k, v) != ("default", None)}
    kinds = [kind for kind in clean.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del clean["anyOf"]
        clean |= kinds[0]
    return clean


def _describe_default(schema: Schema, key: Key) -> None:
    """Say a key's default, which msgspec leaves out where it has no JSON for it."""
    schema["description"] = f"{key.meaning} Default: {key.default}."
    if value := re.fullmatch(r"`([^`]*)`", key.default):  # a single one, as TOML spells it
        schema["default"] = tomllib.loads(f"value = {value[1]}")["value"]
    else:
        schema.pop("default", None)


def _quantize() -> Schema:
    """Return which keys of ``quantize`` go together."""
    return {
        "dependentSchemas": {
            "recipe": {"properties": {"mode": {"const": "affine"}}},
            "target_bpw": _without("bits", "recipe", "fit"),
            "fit": _without("bits", "recipe", "target_bpw"),
            "exact": {"if": {"properties": {"exact": {"const": True}}}}
            | {"then": _with("target_bpw", "fit")},
            "min_bits": _with("target_bpw", "fit"),
            "context": _with("fit"),
            "candidates": _with("target_bpw", "fit"),
        },
        "allOf": [
            {
                "if": _mode_is(mode, by_default=mode == "affine"),
                "then": {
                    "properties": {
                        **_numbers(mode),
                        **{key: {"items": _of_target(mode)} for key in ("rules", "candidates")},
                    }
                },
            }
            for mode in MODES
        ],
    }


def _with(*keys: str) -> Schema:
    return {"anyOf": [{"required": [key]} for key in keys]}


def _without(*keys: str) -> Schema:
    return {"not": _with(*keys)}


def _rule() -> Schema:
    """Return which keys of an exception go together: either it skips, or it says how."""
    return {
        "allOf": _by_mode(),
        "if": {"properties": {"skip": {"const": True}}, "required": ["skip"]},
        "then": {"properties": {"bits": False, "group_size": False, "mode": False}},
        "else": {"anyOf": [{"required": [name]} for name in ("bits", "group_size", "mode")]},
    }


def _by_mode() -> list[Schema]:
    return [{"if": _mode_is(mode), "then": {"properties": _numbers(mode)}} for mode in MODES]


def _of_target(mode: str) -> Schema:
    """Return what a rule may be in a target of a mode, which is the rule's if it has none."""
    return {"anyOf": [{"required": ["mode"]}, {"properties": _numbers(mode)}]}


def _mode_is(mode: str, by_default: bool = False) -> Schema:
    return {"properties": {"mode": {"const": mode}}, "required": [] if by_default else ["mode"]}


def _numbers(mode: str) -> Schema:
    group_sizes, bits = modes.numbers(mode)
    return {"bits": {"enum": [*bits]}, "group_size": {"enum": [*group_sizes]}}


def page() -> str:
    """Return the reference page."""
    units = ", ".join(f"`{unit}`" for unit in UNITS if unit)
    return "\n\n".join(
        [
            INTRODUCTION,
            *_section("`[models.NAME]`", MODELS, Model),
            _layouts(),
            *_section("Quantization", QUANTIZE, Quantize),
            _modes(),
            *_section("Exceptions", RULES, Rule),
            *_section("Candidates", CANDIDATES, Candidate),
            *_section("`[cache]`", CACHE, Cache),
            *_section("`[build]`", "How the work is done.", Build),
            *_section("`[quality]`", QUALITY, Quality),
            "## Sizes",
            "A whole number is bytes, in quotes or not. A string may also have a point, and a unit "
            f"after it: {units}.",
            "## Remotes",
            REMOTE_URLS,
            "```text\n" + "\n".join(REMOTES.values()) + "\n```",
            ENVIRONMENT,
        ]
    ).strip() + "\n"  # fmt: skip


def _section(heading: str, meaning: str, table: type[msgspec.Struct]) -> Iterator[str]:
    yield f"## {heading}"
    yield meaning
    # The section tells of variants, and of what a rule has in common with its target.
    described = keys_of(Quantize).keys() if table is Rule else ()
    keys = [key for key in keys_of(table).values() if key.change and key.name not in described]
    changes = {key.change for key in keys}
    if len(changes) == 1 < len(keys):
        yield f"Each, when changed, redoes {changes.pop()}."
    for key in keys:
        yield f"### `{key.name}`"
        yield key.meaning
        shown = "" if key.kind in ENUMERATED else f", such as `{key.name} = {toml(key.example)}`"
        facts = [f"Value: {_kind(key)}{shown}", f"Default: {key.default}"]
        if changes:
            facts.append(f"Redoes: {key.change}")
        yield "\n".join(f"- {fact}" for fact in facts)


# Kinds of value whose text says which there are.
ENUMERATED = ("word", "switch", "number", "count")


def _kind(key: Key) -> str:
    valid = ", ".join(f'`"{word}"`' for word in key.valid)
    return {
        "folder": "a folder",
        "file": "a file",
        "files": "a file, or a list of files",
        "text": "a string",
        "texts": "a list of strings",
        "repository": "a string, `ORG/NAME`",
        "word": valid,
        "words": f"a list of {valid}",
        "size": "a [size](#sizes)",
        "URL": "a [URL](#remotes)",
        "cluster": "a string, `tcp://HOST:PORT`, `tls://HOST:PORT` or a file",
        "number": "a whole number that the [mode](#modes) takes",
        "count": count_in_words(key.type),
        "decimal": "a number above 0",
        "switch": "`true` or `false`",
        "numbers": "a list of whole numbers that the [mode](#modes) takes",
        "table": '`false`, `"keep"`, or a table of [these keys](#quantization)'
        if key.table is Quantize
        else "a table of " + ", ".join(f"`{name}`" for name in keys_of(key.table or Model)),
        "tables": "a list of tables of [these keys](#exceptions)"
        if key.table is Rule
        else "a list of tables of [these keys](#candidates)",
    }[key.kind]


def _layouts() -> str:
    lines = ["### Layouts", "", "| `layout` | `max_shard_size` |", "|---|---|"]
    for name, layout in LAYOUTS.items():
        lines.append(f"| `{name}` | {layout.default_shard_bytes >> 30}GiB |")
    return "\n".join([*lines, "", "The default of each layout; it is what its peer writes."])


def _modes() -> str:
    lines = ["### Modes", "", "| `mode` | `bits` | `group_size` |", "|---|---|---|"]
    for mode, defaults in MODES.items():
        cells = [
            ", ".join(f"**{n}**" if n == usual else f"{n}" for n in valid)
            for (usual, *_), valid in zip(defaults[::-1], modes.numbers(mode)[::-1], strict=True)
        ]
        lines.append(f"| `{mode}` | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, "", "The default of each mode is in bold; it is MLX's own."])


INTRODUCTION = """\
<!-- Written by `python -m tasks.config.schema` from the structs in tasks/core/ and
tasks/config/tables.py: change those. -->

# models.toml

The models to build. `mlx-make` reads it from the current folder, or from `models=PATH`. Paths in
it are relative to it, and `~` is your home. Mistakes are errors before any work, all at once,
each with its line, the nearest valid word and the mend.

```toml
[cache]
remote = "s3://bucket/prefix"        # optional, as all of [cache], [build] and [quality] is

[defaults]                           # optional: keys for all models
dtype = "bfloat16"

[models.llama-7b]                    # built into build/llama-7b
source = "checkpoints/llama-7b"
quantize = { bits = 4 }

[models.llama-7b.variants.8bit]      # built into build/llama-7b-8bit
quantize = { bits = 8 }

[models.llama-7b.variants.mixed]     # exceptions by module, the first that matches wins
quantize = { bits = 4, rules = [
  { match = "lm_head", skip = true },
  { match = "*.mlp.down_proj", bits = 6, group_size = 32 },
] }
```

Editors (Even Better TOML, Taplo, Tombi) complete and explain keys and mark mistakes with
[models.schema.json](models.schema.json), if the first line names it, by a relative path or a URL:

```toml
#:schema docs/models.schema.json
```"""

MODELS = """\
A model, built into `build/NAME`: letters, digits, `-`, `_`, `+` and `.`, the first a letter,
digit or `_`, the last no `.`. With a `.` it stands in quotes: `[models."llama-3.1"]`. The name of
a stage, such as `awq`, is no target's.

`[defaults]` takes the same keys but `matrix`, for all models; `[models.NAME.variants.VARIANT]`
takes them for another target, `NAME-VARIANT`. What is said nearest holds. A table such as
`quantize` is replaced as a whole."""

QUANTIZE = """\
The keys of `quantize`. `quantize = {}` is MLX's default: mode affine, 4 bits, group size 64. What
mlx-lm does not quantize stays so here, unless a rule says otherwise."""

RULES = """\
The keys of each element of `quantize.rules`, beside `bits`, `group_size` and `mode`: what of
these a rule does not say is the target's, or its own mode's. One that matches no module is an
error.

`dtype` makes norms or a router wider or narrower than the rest, as in
`{ match = "*norm", dtype = "float32" }`; `config.json` need not say it, since loaders keep what
they find. MLX computes in what holds both operands: of `float16` and `bfloat16` that is `float32`,
for all that follows. A last rule `{ match = "*", skip = true }` is for what is cast and not
quantized."""

CANDIDATES = """\
The keys of each element of `quantize.candidates`, which `target_bpw` and `fit` choose of, module by
module. See [quality.md](quality.md#a-budget)."""

CACHE = """\
Where [results](caching.md) are kept, here and on a store shared with other machines."""

QUALITY = """\
On what texts models are calibrated and [evaluated](quality.md), and how much of them."""

REMOTE_URLS = """\
`https` and `http` are servers that take plain GET, PUT and HEAD, as WebDAV servers do.
[Credentials](sharing.md#a-remote-store) come from the environment. A space, `?` or `#` in a path
is written `%20`, `%3F` or `%23`."""

ENVIRONMENT = """\
## Environment variables

Each key of `[cache]` and `[build]` has one, such as `MLX_MAKE_CACHE_DIR` and
`MLX_MAKE_BUILD_MEMORY`, which wins over the file. A list is separated by commas
(`MLX_MAKE_CACHE_KEEP=unshard,cast`); a comma alone is the empty list. An empty variable counts
as not set."""

if __name__ == "__main__":
    main()

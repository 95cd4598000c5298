"""schema: ``python -m tasks.config.schema`` writes models.toml's JSON Schema and reference."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.config import keys
from tasks.config.keys import MAX_NAME_BYTES, REMOTES, UNITS, Key
from tasks.core.spec import MODES

DOCS = Path(__file__).resolve().parents[2] / "docs"

Schema = dict[str, Any]

# Not ``\w``, which is ASCII alone to editors: what is not ASCII is let through.
FIRST = r"[^\x00-/:-@\[-^`{-\x7f]"
INNER = r"[^\x00-*,/:-@\[-^`{-\x7f]"
LAST = r"[^\x00-*,./:-@\[-^`{-\x7f]"
# Some digit is not 0.
SIZE = rf"^(?=[\s0.]*[1-9]){keys.NUMBER}({'|'.join(UNITS)})\s*$"


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

    It refuses nothing that ``config.load`` reads. ``load`` alone refuses what it cannot say: two
    targets of one name, a folder in build/, 4.0 where a whole number is wanted.
    """
    names = {"pattern": f"^{FIRST}({INNER}*{LAST})?$", "maxLength": MAX_NAME_BYTES}
    more = {"pattern": f"^({INNER}*{LAST})?$", "maxLength": MAX_NAME_BYTES - len("a-")}
    keys_alone = _object(keys.MODEL, "Keys of a model.")
    model = _object(keys.MODEL, "A model to build.")
    model["properties"]["variants"] = {
        "description": "More targets, MODEL-VARIANT each: the model with these keys laid over it.",
        "type": "object",
        "propertyNames": more,
        "additionalProperties": {"$ref": "#/$defs/keys"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "models.toml",
        "description": "The models that mlx-make builds.",
        "type": "object",
        "required": ["models"],
        "additionalProperties": False,
        "properties": {
            "cache": _object(keys.CACHE, "Where results are kept."),
            "build": _object(keys.BUILD, "How the work is done."),
            "defaults": {"description": "Keys for all models.", "$ref": "#/$defs/keys"},
            "models": {
                "description": "The models to build, by name.",
                "type": "object",
                "minProperties": 1,
                "propertyNames": names,
                "additionalProperties": {"$ref": "#/$defs/model"},
            },
        },
        "if": {"properties": {"defaults": {"required": ["source"]}}, "required": ["defaults"]},
        "else": {"properties": {"models": {"additionalProperties": {"required": ["source"]}}}},
        "$defs": {"model": model, "keys": keys_alone},
    }


def _object(table: Mapping[str, Key], description: str = "") -> Schema:
    return {
        **({"description": description} if description else {}),
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property(key) for name, key in table.items()},
    }


def _property(key: Key) -> Schema:
    default = _default(key)
    return {
        "description": f"{key.meaning} Default: {key.default}.",
        **({} if default is None else {"default": _toml(default)}),
        "examples": [_toml(key.example)],
        **_value(key),
    }


def _value(key: Key) -> Schema:
    match key.kind:
        case "folder":
            return {"type": "string", "pattern": r"^[^\x00]+$"}
        case "text":
            return {"type": "string", "minLength": 1}
        case "word":
            return {"enum": list(key.valid)}
        case "words":
            return {"type": "array", "items": {"enum": list(key.valid)}}
        case "size":
            number = {"minimum": 1, "maximum": 10**18 - 1}
            return {"type": ["integer", "string"], **number, "pattern": SIZE}
        case "URL":
            return {"type": "string", "pattern": f"^({keys.REMOTE})$"}
        case "number":
            return {"type": "integer"}
        case "switch":
            return {"type": "boolean"}
        case "quantize":
            return _quantize()
        case "rules":
            return {"type": "array", "items": _rule()}


def _quantize() -> Schema:
    """Return what ``quantize`` may be: false or a table, to which alone most of this applies."""
    settings = _object(keys.QUANTIZE)
    settings["type"] = ["object", "boolean"]
    settings["not"] = {"const": True}
    # A recipe sets bits itself, and is for mode affine.
    settings["dependentSchemas"] = {
        "recipe": {"properties": {"bits": False, "mode": {"const": "affine"}}}
    }
    settings["allOf"] = [
        {
            "if": _mode_is(mode, by_default=mode == "affine"),
            "then": {"properties": {**_numbers(mode), "rules": {"items": _of_target(mode)}}},
        }
        for mode in MODES
    ]
    return settings


def _rule() -> Schema:
    """Return what an exception may be."""
    rule = _object(keys.RULE)
    rule["required"] = ["match"]
    rule["allOf"] = [
        {"if": _mode_is(mode), "then": {"properties": _numbers(mode)}} for mode in MODES
    ]
    # Either it skips, or it says how.
    rule["if"] = {"properties": {"skip": {"const": True}}, "required": ["skip"]}
    rule["then"] = {"properties": {"bits": False, "group_size": False, "mode": False}}
    rule["else"] = {"anyOf": [{"required": [name]} for name in ("bits", "group_size", "mode")]}
    return rule


def _of_target(mode: str) -> Schema:
    """Return what a rule may be in a target of a mode, which is the rule's if it has none."""
    return {"anyOf": [{"required": ["mode"]}, {"properties": _numbers(mode)}]}


def _mode_is(mode: str, by_default: bool = False) -> Schema:
    return {"properties": {"mode": {"const": mode}}, "required": [] if by_default else ["mode"]}


def _numbers(mode: str) -> Schema:
    group_sizes, bits = MODES[mode]
    return {"bits": {"enum": sorted(bits)}, "group_size": {"enum": sorted(group_sizes)}}


def page() -> str:
    """Return the reference page."""
    units = ", ".join(f"`{unit}`" for unit in UNITS if unit)
    return "\n\n".join(
        [
            INTRODUCTION,
            *_section("`[models.NAME]`", MODELS, keys.MODEL),
            *_section("Quantization", QUANTIZE, keys.QUANTIZE),
            _modes(),
            *_section("Exceptions", RULES, keys.RULE),
            *_section("`[cache]`", CACHE, keys.CACHE, "cache"),
            *_section("`[build]`", "How the work is done.", keys.BUILD, "build"),
            "## Sizes",
            "A whole number is bytes, in quotes or not. A string may also have a point, and a unit "
            f"after it: {units}.",
            "## Remotes",
            REMOTE,
            "```text\n" + "\n".join(REMOTES.values()) + "\n```",
            ENVIRONMENT,
        ]
    ).strip() + "\n"  # fmt: skip


def _section(
    heading: str, meaning: str, table: Mapping[str, Key], variables: str = ""
) -> Iterator[str]:
    yield f"## {heading}"
    yield meaning
    for key in table.values():
        yield f"### `{key.name}`"
        yield key.meaning
        facts = {"Value": _kind(key), "Default": key.default, "A change redoes": key.change}
        if variables:
            facts["Environment"] = f"`{keys.variable(variables, key.name)}`"
        facts["Example"] = f"`{key.name} = {key.example}`"
        yield "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def _kind(key: Key) -> str:
    valid = ", ".join(f'`"{word}"`' for word in key.valid)
    return {
        "folder": "a folder, relative to `models.toml`; `~` is your home",
        "text": "a string",
        "word": valid,
        "words": f"a list of {valid}",
        "size": "a [size](#sizes)",
        "URL": "a [URL](#remotes)",
        "number": "a whole number that the [mode](#modes) takes",
        "switch": "`true` or `false`",
        "quantize": "`false`, or a table of [these keys](#quantization)",
        "rules": "a list of tables of [these keys](#exceptions)",
    }[key.kind]


def _modes() -> str:
    lines = ["### Modes", "", "| `mode` | `bits` | `group_size` |", "|---|---|---|"]
    for mode, (group_sizes, bits) in MODES.items():
        cells = [
            f"**{valid[0]}**" + "".join(f", {number}" for number in sorted(valid[1:]))
            for valid in (bits, group_sizes)
        ]
        lines.append(f"| `{mode}` | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, "", "The default of each mode is in bold; it is MLX's own."])


def _default(key: Key) -> str | None:
    """Return the default as TOML spells it, None if it is no single value."""
    value = re.fullmatch(r"`([^`]*)`", key.default)
    return value[1] if value else None


def _toml(value: str) -> Any:
    return tomllib.loads(f"value = {value}")["value"]


INTRODUCTION = """\
<!-- Written by `python -m tasks.config.schema` from tasks/config/keys.py: change that. -->

# models.toml

The models to build. `doit` reads it from the current folder, or from where `doit models=PATH` says.
An unknown key, a value that is none of the valid ones, or two that do not go together: each is an
error before any work, with the line, the nearest valid word and the mend.

```toml
[cache]
remote = "s3://bucket/prefix"        # optional, as all of [cache] and [build] is

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

Editors that know TOML (Even Better TOML, Taplo, Tombi) complete keys, explain them and mark
mistakes with [models.schema.json](models.schema.json). Name it in the first line, by a path
relative to `models.toml` or by a URL:

```toml
#:schema docs/models.schema.json
```"""

MODELS = """\
A model. Its name is that of its folder in `build/`: letters, digits, `-`, `_`, `+` and `.`, the
first a letter, digit or `_`, the last no `.`. A name with a `.` stands in quotes:
`[models."llama-3.1"]`.

`[defaults]` takes the same keys, for all models. `[models.NAME.variants.VARIANT]` takes them too
and makes another target, `NAME-VARIANT`. What is said nearest holds: a variant's key, else its
model's, else the default's. A table such as `quantize` is replaced as a whole, not key by key."""

QUANTIZE = """\
The keys of the table `quantize`. `quantize = {}` is MLX's default: mode affine, 4 bits, group size
64. Modules that mlx-lm does not quantize are not quantized here either, unless a rule says so."""

RULES = """\
The keys of each element of `quantize.rules`: which modules, and how they are quantized, or that
they are not. What a rule does not say is the target's. One that matches no module is an error."""

CACHE = """\
Where results are kept, here and on a store shared with other machines. See
[caching.md](caching.md) for what a result depends on."""

REMOTE = """\
`https` and `http` are servers that take plain GET, PUT and HEAD, as WebDAV servers do. No user,
password or token stands in the URL: credentials come from the environment. A space, `?` or `#` in a
path is written `%20`, `%3F` or `%23`."""

ENVIRONMENT = """\
## Environment variables

A variable wins over the file, and means the same as its key; a list is separated by commas
(`MLX_MAKE_CACHE_KEEP=unshard,cast`; a comma alone is the empty list), and a relative folder is
relative to `models.toml`, not to the current folder. An empty variable counts as not set."""

if __name__ == "__main__":
    main()

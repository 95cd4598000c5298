"""tests of tasks/config/schema.py: that what it wrote is what the code does."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from support import documents
from support.front_door import REPOSITORY
from tasks.config import reader, schema
from tasks.config.keys import Key, keys_of, toml
from tasks.config.tables import Model
from tasks.core.errors import ConfigError
from tasks.core.quantization import Quantize, Rule

VALIDATOR = Draft202012Validator(schema.schema())
BUDGETED = "[defaults.quantize]\ntarget_bpw = 4.5\n[[defaults.quantize.candidates]]"
TABLES = {
    "[cache]": documents.CACHE,
    "[build]": documents.BUILD,
    "[quality]": documents.QUALITY,
    "[defaults]": documents.MODEL,
    "[defaults.quantize]": documents.QUANTIZE,
    "[[defaults.quantize.rules]]": documents.RULE,
    BUDGETED: documents.CANDIDATE,
}
TABLES["[models.m]"] = {"matrix": keys_of(Model)["matrix"]}
OTHERS = {
    "[[defaults.quantize.rules]]": {"match": '"*"', "bits": "8"},
    "[models.m]": {"source": '"b"'},
}
# What a key needs beside it.
PARTNERS = {
    "candidates": {"target_bpw": "4.5"},
    "exact": {"target_bpw": "4.5"},
    "min_bits": {"target_bpw": "4.5"},
    "context": {"fit": '"16GB"'},
}
every_key = pytest.mark.parametrize(
    ("header", "key"),
    [(header, key) for header, known in TABLES.items() for key in known.values()],
    ids=lambda part: part.name if isinstance(part, Key) else part.strip("[]"),
)
calm = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples: each overwrites its `models.toml`."""
    return tmp_path_factory.mktemp("schema")


def read(folder: Path, text: str) -> reader.Config | None:
    """What config makes of it; None if it refuses."""
    (folder / "models.toml").write_text(text, encoding="utf-8")
    try:
        return reader.load(folder / "models.toml")
    except ConfigError:
        return None


def saying(header: str, values: dict[str, str]) -> str:
    """A table that says these values, and a model."""
    lines = [header, *(f"{name} = {value}" for name, value in values.items())]
    return "\n".join([*lines, "[models.a]", 'source = "b"'])


def accepts(text: str) -> bool:
    """Whether the schema does."""
    valid: bool = VALIDATOR.is_valid(tomllib.loads(text))
    return valid


@pytest.mark.parametrize("path", schema.files(), ids=lambda path: path.name)
def test_what_is_committed_is_what_the_code_makes(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == schema.files()[path], "python -m tasks.config.schema"


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema.schema())


def test_the_checkout_s_own_models() -> None:
    text = (REPOSITORY / "models.toml").read_text(encoding="utf-8")
    named = re.match(r"#:schema (\S+)\n", text)
    assert named is not None
    assert json.loads((REPOSITORY / named[1]).read_bytes()) == schema.schema()
    assert accepts(text)


@pytest.mark.parametrize("page", ["README.md", "docs/models-toml.md"])
def test_examples_of_the_documentation(folder: Path, page: str) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (REPOSITORY / page).read_text("utf-8"), re.DOTALL)
    whole = [block for block in blocks if "[models." in block]
    assert whole
    for block in whole:
        assert read(folder, block) is not None
        assert accepts(block)


@every_key
def test_each_key_s_example_and_default(folder: Path, header: str, key: Key) -> None:
    """The example is accepted; the default, where it is one value, is what holds without it."""
    others = {**OTHERS.get(header, {}), **PARTNERS.get(key.name, {})}
    example = {**others, key.name: toml(key.example)}
    if key.name == "skip":
        del example["bits"]
    assert read(folder, saying(header, example)) is not None
    assert accepts(saying(header, example))
    if default := re.fullmatch("`(.*)`", key.default):
        said = read(folder, saying(header, {**others, key.name: default[1]}))
        assert said is not None
        assert said == read(folder, saying(header, others))


def test_the_page_tells_every_key() -> None:
    page = schema.page()
    for known in TABLES.values():
        for key in known.values():
            told = f"### `{key.name}`\n\n{key.meaning}\n" in page
            assert told or (key in keys_of(Rule).values() and key.name in keys_of(Quantize))
    for link in re.findall(r"\]\(#([\w-]+)\)", page):
        headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
        assert link in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


# That the schema and config agree


@every_key
def test_each_key_s_mistakes(folder: Path, header: str, key: Key) -> None:
    """Both refuse them."""
    others = {**OTHERS.get(header, {}), **PARTNERS.get(key.name, {})}
    values = documents.wrong_values(key)
    wrong = [{key.name: documents.spelled(value)} for value in values]
    for values in (*wrong, {f"{key.name}s": "5"}):
        text = saying(header, {**others, **values})
        assert read(folder, text) is None, text
        assert not accepts(text), text


@pytest.mark.parametrize("name", documents.NO_NAMES)
def test_what_is_no_name(folder: Path, name: str) -> None:
    variants = {f"b{name}": {}}
    for models in ({name: {"source": "b"}}, {"a": {"source": "b", "variants": variants}}):
        text = documents.toml({"models": models})
        assert read(folder, text) is None
        assert not accepts(text)


@given(document=documents.right())
@calm
def test_what_is_right(folder: Path, document: dict[str, Any]) -> None:
    text = documents.toml(document)
    assert read(folder, text) is not None
    assert accepts(text)


@given(document=documents.wrong())
@settings(calm, max_examples=150)
def test_a_mistake(folder: Path, document: dict[str, Any]) -> None:
    """Both refuse it."""
    text = documents.toml(document)
    assert read(folder, text) is None
    assert not accepts(text)


@given(document=documents.anything())
@settings(calm, max_examples=150)
def test_what_the_schema_refuses(folder: Path, document: dict[str, Any]) -> None:
    """Is refused by config too, whatever it is."""
    text = documents.toml(document)
    assert read(folder, text) is None or accepts(text)

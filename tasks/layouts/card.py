"""card: what a checkpoint's README.md and license files say, for the model that is built of it.

The built model's own README.md is made of that in ``planning/model_card.py``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from cache.digest import digest
from cache.records.memos import Memos
from tasks.checkpoints.small_files import check_own, read_bytes

CARD = "README.md"
LEGAL = re.compile(r"(licen[sc]e|notice)([-_.].*)?", re.IGNORECASE)
VERSION = 2  # raised when other keys are taken over
# What holds for a model in another format, too; https://huggingface.co/docs/hub/model-cards.
KEYS = ("license", "license_name", "license_link", "language", "base_model", "tags")
WORDS = ("language", "base_model", "tags")  # lists, or one word
MAX_FRONT_MATTER_BYTES = 64 << 10
FRONT_MATTER = re.compile(
    rb"\A(?:\xef\xbb\xbf)?\s*---\r?\n(.*?)\r?\n---\s*?(?:\r?\n|\Z)", re.DOTALL
)

Fields = dict[str, str | list[str]]  # of a card's front matter
OWN: Fields = {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx"]}
DEFAULT: Fields = {"language": "en", **OWN}  # where the checkpoint has no card


def is_legal(name: str) -> bool:
    """Tell whether a file of that name is a license or a notice."""
    return LEGAL.fullmatch(name) is not None


def is_document(name: str) -> bool:
    """Tell whether a checkpoint's file of that name is for people, and decides no weight."""
    return name == CARD or is_legal(name)


def legal_files(folder: Path) -> list[Path]:
    """Return the checkpoint's LICENSE and NOTICE files, whatever their case and suffix.

    Raises:
        CheckpointError: one is a link out of the folder.
    """
    paths = sorted(p for p in folder.iterdir() if is_legal(p.name) and not p.is_dir())
    for path in paths:
        check_own(path)
    return paths


def source_files(folder: Path) -> list[Path]:
    """Return the legal files, and README.md if it is there.

    Raises:
        CheckpointError: one is a link out of the folder.
    """
    path = folder / CARD
    if not path.is_file():
        return legal_files(folder)
    check_own(path)
    return [*legal_files(folder), path]


def front_matter(folder: Path, memos: Memos) -> tuple[Fields, tuple[str, ...]]:
    """Return the fields that a built model's card begins with, and notes for people.

    Args:
        folder: of the checkpoint, whose license, languages, tags and base model are taken over.
        memos: where the answer is remembered.
    """
    path = folder / CARD
    match = FRONT_MATTER.match(read_bytes(path)) if path.is_file() else None
    if match is None:
        return DEFAULT, ()
    question = [VERSION, digest(match[1])]
    answer = memos.get("cards", question, Fields)
    if answer is None:
        answer = _taken_over(match[1])
        memos.put("cards", question, answer)
    if fault := answer.get("error"):
        return DEFAULT, (
            f"{CARD} of the checkpoint begins with what is no YAML ({fault}): the built model's "
            f"{CARD} says nothing of its license",
        )
    return answer, ()


def to_yaml(fields: Fields) -> str:
    """Return a card's fields as they stand between its first lines."""
    import yaml  # 0.06 s

    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=math.inf)
    return str(text)


def _taken_over(data: bytes) -> Fields:
    """Return a card's fields made of the checkpoint's, or under ``error`` why there are none."""
    import yaml  # 0.06 s

    if len(data) > MAX_FRONT_MATTER_BYTES:
        return {"error": f"{len(data):,} bytes"}
    try:
        # Every scalar is text: the language no is not False, the version 1.10 not 1.1.
        front_matter = yaml.load(data, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        return {"error": str(error).splitlines()[0][:200]}
    if not isinstance(front_matter, dict):
        return {"error": "it has no keys"}
    fields = {key: value for key in KEYS if (value := _value(key, front_matter.get(key)))}
    tags = fields.pop("tags", [])
    tags = [tags] if isinstance(tags, str) else tags
    return {**fields, **OWN, "tags": [*tags, *(["mlx"] if "mlx" not in tags else [])]}


def _value(key: str, value: Any) -> str | list[str]:
    if isinstance(value, str):
        return "" if value in ("null", "~") else value
    if key in WORDS and isinstance(value, list):
        return [word for word in value if isinstance(word, str)]
    return ""

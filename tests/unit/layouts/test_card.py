"""What a built model's card takes over from the checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import ModelCard

from cache.records.memos import Memos
from tasks.core.errors import CheckpointError
from tasks.layouts import card

AUTHORS = """\
---
language:
- no
- en
license: other
license_name: llama3.1
license_link: https://example.org/LICENSE
base_model: meta-llama/Llama-3.1-8B
tags: [facebook, 3.10]
datasets: [secret]
extra_gated_prompt: "Do you agree?"
pipeline_tag: translation
library_name: transformers
---

# A model
"""


@pytest.fixture
def memos(tmp_path: Path) -> Memos:
    return Memos(tmp_path / "memos")


def made(folder: Path, memos: Memos, text: str) -> tuple[ModelCardData, tuple[str, ...]]:
    (folder / "README.md").write_text(text, encoding="utf-8")
    found = card.front_matter(folder, memos)
    assert card.front_matter(folder, memos) == found  # by the memo
    return ModelCard(f"---\n{card.to_yaml(found[0])}---\n").data, found[1]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_is_taken_over(tmp_path: Path, memos: Memos, ends: str) -> None:
    data, notes = made(tmp_path, memos, AUTHORS.replace("\n", ends))
    assert notes == ()
    assert data.to_dict() == {
        "language": ["no", "en"],  # Norwegian, no False
        "license": "other",
        "license_name": "llama3.1",
        "license_link": "https://example.org/LICENSE",
        "base_model": "meta-llama/Llama-3.1-8B",
        "tags": ["facebook", "3.10", "mlx"],
        "pipeline_tag": "text-generation",
        "library_name": "mlx",
    }


def test_tags(tmp_path: Path, memos: Memos) -> None:
    for tags, expected in (("mlx", ["mlx"]), ("[a, mlx]", ["a", "mlx"]), ("~", ["mlx"])):
        data, _ = made(tmp_path, memos, f"---\ntags: {tags}\n---\n")
        assert data.tags == expected


@pytest.mark.parametrize("text", ["", "# A model\n", "---\nlicense: mit\n", "a\n---\nb: c\n---\n"])
def test_no_front_matter(tmp_path: Path, memos: Memos, text: str) -> None:
    assert card.front_matter(tmp_path, memos) == (card.DEFAULT, ())
    assert made(tmp_path, memos, text)[0].to_dict() == {
        "language": "en",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx"],
    }
    assert card.front_matter(tmp_path, memos) == (card.DEFAULT, ())


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("license: [mit", "while parsing a flow"),
        ("- mit", "it has no keys"),
        ("a: " + "[" * 5000, "recursion depth"),
        ("a: " + "x" * card.MAX_FRONT_MATTER_BYTES, "bytes"),
        ("a: \x00", "unacceptable character"),
    ],
)
def test_what_is_no_front_matter_is_told(
    tmp_path: Path, memos: Memos, text: str, fact: str
) -> None:
    data, (note,) = made(tmp_path, memos, f"---\n{text}\n---\n")
    assert fact in note
    assert data.to_dict()["tags"] == ["mlx"]


def test_nothing_is_run_or_blown_up(tmp_path: Path, memos: Memos) -> None:
    ran = tmp_path / "ran"
    code = f"license: !!python/object/apply:os.system ['touch {ran}']"
    assert made(tmp_path, memos, f"---\n{code}\n---\n")[0].license is None
    assert not ran.exists()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    data, _ = made(tmp_path, memos, "\n".join(["---", *lines, "tags: *a39", "---", ""]))
    assert data.tags == ["mlx"]


def test_legal_files(tmp_path: Path) -> None:
    legal = {"LICENSE", "license.txt", "Licence.md", "NOTICE", "LICENSE-MODEL", "Notice.txt"}
    for name in {*legal, "licensed.txt", "README.md", "notices.json"}:
        (tmp_path / name).write_text(name)
    (tmp_path / "LICENSES").mkdir()
    (tmp_path / "LICENSE.d").mkdir()
    assert {path.name for path in card.legal_files(tmp_path)} == legal
    assert {path.name for path in card.source_files(tmp_path)} == {*legal, "README.md"}
    assert all(map(card.is_document, (*legal, "README.md")))
    assert not any(map(card.is_document, ("config.json", "tokenizer.json", "licensed.txt")))


def test_a_license_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_text("key")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"is a link to .*, outside of "):
        card.source_files(folder)

"""Tokenizers without tokenizer.json: it is made as mlx_lm.convert makes it."""

import json
import shutil
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from support import checkpoints, inside, meta, projects

TEXTS = ("The second build  takes no time.", " a\n\tthe ö 你 🙂", "</s> and <s>", "")


def without_fast(folder: Path, files: dict[str, bytes], tokenizer_class: str) -> None:
    (folder / "tokenizer.json").unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_bytes()) | {"tokenizer_class": tokenizer_class})
    )


def test_tokenizer_json_is_the_peers(tmp_path: Path) -> None:
    project = projects.Project(tmp_path, "huggingface")
    pieces = {"tokenizer.model": meta.tokenizer_model("sentencepiece")}
    kinds = {
        "sentencepiece": (pieces, "LlamaTokenizer"),
        "merges": ({}, "Qwen2Tokenizer"),
        "broken": ({"tekken.json": b'{"config": {}}'}, "LlamaTokenizer"),
    }
    whole = checkpoints.make("llama", tmp_path / "whole", files=1)
    checkpoints.write_tokenizer(whole, slow=True)
    for name, (files, tokenizer_class) in kinds.items():
        shutil.copytree(whole, tmp_path / name)
        if name != "merges":
            (tmp_path / name / "vocab.json").unlink()
            (tmp_path / name / "merges.txt").unlink()
        without_fast(tmp_path / name, files, tokenizer_class)
        project.configure(name, source=name)
    done = inside.doit(tmp_path)
    for name in ("sentencepiece", "merges"):
        built = tmp_path / "build" / name
        theirs = load_tokenizer(tmp_path / name)
        theirs.save_pretrained(tmp_path / f"peer-{name}")
        made = (built / "tokenizer.json").read_bytes()
        assert made == (tmp_path / f"peer-{name}" / "tokenizer.json").read_bytes(), name
        ours = load_tokenizer(built)
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text), (name, text)
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
        assert f"note: {name}: no tokenizer.json" not in done.stdout
    assert not (tmp_path / "build" / "broken" / "tokenizer.json").exists()
    assert "note: broken: mlx_lm.load will refuse its tokenizer, as transformers " in done.stdout
    with pytest.raises(KeyError):
        load_tokenizer(tmp_path / "build" / "broken")
    assert inside.doit(tmp_path).entries == []

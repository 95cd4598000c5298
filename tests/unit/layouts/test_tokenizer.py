"""tests of tasks/layouts/llama_tokenizer.py: a built folder tokenizes as Meta's own code does."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.front_door import REPOSITORY
from tasks.checkpoints import example
from tasks.layouts import llama_tokenizer

TEXTS = (
    "The second build should take no time at all.",
    "",
    " ",
    " a",
    "  a",
    "trailing   ",
    "\n",
    "\n\n  two\n\n\n",
    "if x:\n    return 1\n        # deeper\n\treturn 2\r\n",
    "    " * 9 + "far in",
    "x" + " " * 17 + "y",
    "naïve Überraschung, 你好世界, Привет, こんにちは",
    "🙂👩‍👩‍👧 🇪🇺 e\u0301",
    "\x00\x7f\u200b\ufeff",
    "▁ is U+2581",
    "12345678 3.14 it's IT'S we'll",
    "ththththe thing in the ending ing",
)


def samples(count: int) -> Iterator[str]:
    """Texts that people do not write, the same ones each time."""
    rng = random.Random(7)
    for _ in range(count):
        yield "".join(rng.choices("aaehhiinntt .\n\té漢🙂0'", k=rng.randrange(60)))
        yield " " * rng.randrange(40) + rng.choice(("the", "\n", "")) + " " * rng.randrange(40)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "llama"
    example.make(folder)
    return folder / "tokenizer.model"


# A Llama 3 in small: every byte, in an order that is not that of the bytes, then some merges.
BYTES = [bytes([(7 * i + 33) % 256]) for i in range(256)]
MERGES = [
    "  ",
    "    ",
    "th",
    "in",
    " t",
    "er",
    "the",
    "\n\n",
    "ing",
    " the",
    " \n",
    "ll",
    "'ll",
    "12",
]
MERGES += ["thing", "ther", "123", "aa", "aaa", "aaaa", "  the"]
RANKS = [
    *BYTES,
    *(merge.encode() for merge in MERGES),
    b"\xf0\x9f",
    b"\xcc\x81",
    "e\u0301".encode(),
]


@pytest.fixture
def llama3(tmp_path: Path) -> Path:
    return ranks_file(tmp_path, RANKS)


def ranks_file(folder: Path, tokens: list[bytes]) -> Path:
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    file = folder / "tokenizer.model"
    file.write_bytes(b"".join(lines))
    return file


def tiktoken_encode(text: str) -> list[int]:
    """What tiktoken does: split by the pattern; join the pair of lowest rank until none has one."""
    import regex  # type: ignore[import-untyped]

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    rank = {token: rank for rank, token in enumerate(RANKS)}
    ids = []
    for word in regex.findall(pattern, text):
        data = word.encode()
        parts = [data] if data in rank else [bytes([byte]) for byte in data]
        while True:
            pairs = [
                (rank[a + b], i)
                for i, (a, b) in enumerate(itertools.pairwise(parts))
                if a + b in rank
            ]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] for part in parts]
    return ids


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load tokenizer files as mlx_lm.load does with a built folder, and without a network."""
    from mlx_lm import tokenizer_utils

    def refuse(*_: object) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    def load(files: dict[str, bytes]) -> Any:
        folder = tmp_path / "built"
        folder.mkdir()
        for name, content in {**files, "config.json": b'{"model_type": "llama"}'}.items():
            (folder / name).write_bytes(content)
        return tokenizer_utils.load(folder)

    return load


def test_sentencepiece_ids_and_text_are_the_originals(llama2: Path, load: Any) -> None:
    import sentencepiece
    from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer

    original = sentencepiece.SentencePieceProcessor(model_file=str(llama2))
    loaded = load(llama_tokenizer.files(llama2))

    for text in (*TEXTS, *samples(500)):
        ids = original.encode(text)
        assert loaded.encode(text) == [1, *ids], text
        assert loaded.encode(text, add_special_tokens=False) == ids, text
        assert loaded.decode(ids) == original.decode(ids) == text.replace("▁", " "), text
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
    assert loaded.chat_template is None
    assert isinstance(loaded.detokenizer, SPMStreamingDetokenizer)


def test_transformers_own_conversion_differs(llama2: Path) -> None:
    """Why files() does not leave it to transformers; should this fail, it may be able to."""
    import sentencepiece
    from transformers import LlamaTokenizer

    original = sentencepiece.SentencePieceProcessor(model_file=str(llama2))
    left_alone = LlamaTokenizer.from_pretrained(llama2.parent)

    differ = [
        text
        for text in TEXTS
        if left_alone.encode(text, add_special_tokens=False) != original.encode(text)
    ]
    assert {" a", "  a", "if x:\n    return 1\n        # deeper\n\treturn 2\r\n"} <= {*differ}


def test_tiktoken_ids_and_text_are_the_originals(llama3: Path, load: Any) -> None:
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer

    loaded = load(llama_tokenizer.files(llama3))
    bos = len(RANKS)

    for text in (*TEXTS, *samples(500)):
        ids = tiktoken_encode(text)
        assert loaded.encode(text) == [bos, *ids], text
        assert loaded.decode(ids) == text, text
    assert isinstance(loaded.detokenizer, BPEStreamingDetokenizer)
    assert loaded.chat_template is None


@pytest.mark.parametrize(
    ("release", "named"),
    [
        ("3", {"<|reserved_special_token_4|>": 8, "<|reserved_special_token_250|>": 255}),
        (
            "3.1",
            {
                "<|finetune_right_pad_id|>": 4,
                "<|eom_id|>": 8,
                "<|python_tag|>": 10,
                "<|reserved_special_token_247|>": 255,
            },
        ),
    ],
)
def test_special_tokens_follow_the_ranks(
    release: llama_tokenizer.Release, named: dict[str, int], llama3: Path, load: Any
) -> None:
    first = len(RANKS)
    loaded = load(llama_tokenizer.files(llama3, release=release))
    alike = {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|start_header_id|>": 6,
        "<|eot_id|>": 9,
    }

    assert len(loaded) == first + 256
    for token, place in {**alike, **named}.items():
        assert loaded.encode(f"in{token}in", add_special_tokens=False) == [
            *tiktoken_encode("in"),
            first + place,
            *tiktoken_encode("in"),
        ]
    assert (loaded.bos_token, loaded.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert llama_tokenizer.token_ids(llama3, release=release) == {
        "bos_token_id": first,
        "eos_token_id": [first + 1, *([first + 8] if release == "3.1" else []), first + 9],
    }


def test_release_is_told_by_scaled_rope() -> None:
    assert llama_tokenizer.release_of({"rope_theta": 500000.0}) == "3"
    assert llama_tokenizer.release_of({"rope_theta": 500000.0, "use_scaled_rope": True}) == "3.1"


@pytest.mark.parametrize("which", ["llama2", "llama3"])
def test_files_are_the_same_each_time(which: str, request: pytest.FixtureRequest) -> None:
    file = request.getfixturevalue(which)
    script = (
        "import pathlib, sys; from tasks.layouts import llama_tokenizer as tokenizer; "
        "files = tokenizer.files(pathlib.Path(sys.argv[1])); "
        "sys.stdout.buffer.write(repr(files).encode())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(file)],
        check=True,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        # Another order of sets than here, whatever it is here.
        env={
            **os.environ,
            "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2",
        },
    )
    assert run.stdout == repr(llama_tokenizer.files(file)).encode()


def test_kind_and_ids_import_nothing(llama2: Path, llama3: Path) -> None:
    script = (
        "import pathlib, sys; from tasks.layouts import llama_tokenizer as tokenizer; "
        "files = [pathlib.Path(arg) for arg in sys.argv[1:]]; "
        "print([(tokenizer.kind(f), tokenizer.token_ids(f)['bos_token_id']) for f in files], "
        "{'transformers', 'tokenizers', 'sentencepiece', 'numpy'} & {*sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(llama2), str(llama3)],
        check=True,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    expected = [("sentencepiece", 1), ("tiktoken", len(RANKS))]
    assert run.stdout.strip() == f"{expected} set()"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes that begin b''"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (b'{"version": "1.0", "model": {}}', "JSON"),
        (b"\n\n\n\n\n\n", "another format"),
        (b"IQ==\n", "another format"),
    ],
)
def test_neither_format_is_an_error(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(llama_tokenizer.TokenizerError, match="neither a sentencepiece") as error:
        llama_tokenizer.files(file)
    assert says in str(error.value)
    assert str(file) in str(error.value)
    assert "replace it by the tokenizer.model that came with the checkpoint" in str(error.value)


def test_damage_is_an_error(llama2: Path, llama3: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.model"
    cut.write_bytes(llama2.read_bytes()[:-1000])
    with pytest.raises(llama_tokenizer.TokenizerError, match="cut short or damaged"):
        llama_tokenizer.files(cut)
    for other, fact in ((b"<0x4\xff>", "is no text"), (b"<0x42>", "is there twice")):
        cut.write_bytes(llama2.read_bytes().replace(b"<0x41>", other))
        with pytest.raises(llama_tokenizer.TokenizerError, match=f"its piece .* {fact}"):
            llama_tokenizer.files(cut)

    lines = llama3.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join([*lines[:100], *lines[101:]]))
    with pytest.raises(llama_tokenizer.TokenizerError, match="ranks are not 0 to"):
        llama_tokenizer.files(cut)
    cut.write_bytes(b"".join(lines[:250]))
    with pytest.raises(llama_tokenizer.TokenizerError, match="lack some of the 256 bytes"):
        llama_tokenizer.files(cut)
    cut.write_bytes(b"".join([*lines[:100], b"!!!! 100\n", *lines[101:]]))
    with pytest.raises(llama_tokenizer.TokenizerError, match=r"cut\.model:101: b'!!!! 100'"):
        llama_tokenizer.files(cut)


def test_what_would_tokenize_otherwise_is_refused(llama2: Path, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(llama2.read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    model.pieces[300].type = model.pieces[300].USER_DEFINED
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(llama_tokenizer.TokenizerError) as error:
        llama_tokenizer.files(file)
    assert "add_dummy_prefix is False, Llama's is True" in str(error.value)
    assert f"piece 300 {model.pieces[300].piece!r} is USER_DEFINED" in str(error.value)

    llama4 = ranks_file(tmp_path, [*BYTES, *(i.to_bytes(3, "big") for i in range(128_000))])
    with pytest.raises(
        llama_tokenizer.TokenizerError, match="128256 ranks, where Llama 3 has 128000"
    ):
        llama_tokenizer.files(llama4)


def test_config_says_no_more_than_it_must(llama2: Path) -> None:
    """add_bos_token, say, would have transformers put a post-processor of its own in place."""
    files = llama_tokenizer.files(llama2)
    assert json.loads(files["tokenizer_config.json"]).keys() == {
        "bos_token",
        "clean_up_tokenization_spaces",
        "eos_token",
        "tokenizer_class",
        "unk_token",
    }
    assert files["tokenizer.model"] == llama2.read_bytes()

"""The same checkpoint each time, and of the shape of Meta's."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.front_door import REPOSITORY
from tasks.checkpoints import example


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module") / "deeper" / "llama"
    example.make(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_two_makes_are_equal(checkpoint: Path, tmp_path: Path) -> None:
    again = tmp_path / "another-name"
    example.make(again)
    assert content(again) == content(checkpoint)
    assert {*content(again)} == {*example.FILES}
    assert [*tmp_path.iterdir()] == [again]
    assert sum(len(data) for data in content(again).values()) < 8e6


def test_shards_are_split_as_meta_splits_them(checkpoint: Path) -> None:
    import torch

    shards = [
        torch.load(checkpoint / f"consolidated.{i:02}.pth", weights_only=True) for i in range(2)
    ]
    params = json.loads((checkpoint / "params.json").read_bytes())
    dim, heads, kv_heads = params["dim"], params["n_heads"], params["n_kv_heads"]
    kv_dim, hidden = kv_heads * dim // heads, 768
    split = {  # axis, whole shape
        "tok_embeddings.weight": (1, (512, dim)),
        "output.weight": (0, (512, dim)),
        "norm.weight": (None, (dim,)),
        "rope.freqs": (None, (dim // heads // 2,)),
    }
    for layer in range(params["n_layers"]):
        split |= {
            f"layers.{layer}.attention.wq.weight": (0, (dim, dim)),
            f"layers.{layer}.attention.wk.weight": (0, (kv_dim, dim)),
            f"layers.{layer}.attention.wv.weight": (0, (kv_dim, dim)),
            f"layers.{layer}.attention.wo.weight": (1, (dim, dim)),
            f"layers.{layer}.feed_forward.w1.weight": (0, (hidden, dim)),
            f"layers.{layer}.feed_forward.w2.weight": (1, (dim, hidden)),
            f"layers.{layer}.feed_forward.w3.weight": (0, (hidden, dim)),
            f"layers.{layer}.attention_norm.weight": (None, (dim,)),
            f"layers.{layer}.ffn_norm.weight": (None, (dim,)),
        }
    assert kv_heads < heads
    assert params["vocab_size"] == -1
    assert split.keys() == shards[0].keys() == shards[1].keys()

    digest = hashlib.sha256()
    for name, (axis, shape) in split.items():
        parts = [shard[name] for shard in shards]
        for part in parts:
            assert part.dtype == torch.bfloat16
            assert part.is_contiguous()
            # Nothing of the other shard in the file.
            assert part.untyped_storage().nbytes() == part.nbytes
        if axis is None:
            assert torch.equal(*parts)
            whole = parts[0]
        else:
            assert parts[0].shape == parts[1].shape
            assert not torch.equal(*parts)
            whole = torch.cat(parts, dim=axis)
        assert whole.shape == shape, name
        digest.update(whole.view(torch.int16).numpy().astype("<i2").tobytes())
    # The weights hang on no version of anything; a change here is a change of the example.
    assert digest.hexdigest() == (
        "7ac02a200860c73287ee16093b0c28ad0c7da77dcab0776f006849ab973e994b"
    )


def test_is_made_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; sys.modules['torch'] = None; "
        "from tasks.checkpoints import example; example.make(pathlib.Path(sys.argv[1]))"
    )
    call = [sys.executable, "-c", script, tmp_path / "made"]
    subprocess.run(call, check=True, cwd=REPOSITORY)
    assert content(tmp_path / "made") == content(checkpoint)


def test_tokenizer_is_of_llamas_make(checkpoint: Path) -> None:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert pieces.vocab_size() == 512
    assert pieces.encode("🙂", out_type=str) == ["▁", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    # As Llama's: runs of spaces are numbered first and merged last.
    assert pieces.get_score(pieces.piece_to_id("▁▁")) == -1e9
    assert pieces.piece_to_id("▁▁") == 259


def test_a_complete_folder_is_left_alone(checkpoint: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    script = (
        "import pathlib, sys; from tasks.checkpoints import example; "
        "example.make(pathlib.Path(sys.argv[1])); "
        "print({'torch', 'numpy', 'sentencepiece'} & {*sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)],
        check=True,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert run.stdout.strip() == "set()"
    assert {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before


def test_what_is_missing_is_made_again(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "consolidated.00.pth").write_bytes(b"of another")
    (folder / "notes.txt").write_text("mine")
    example.make(folder)
    assert content(folder) == {**content(checkpoint), "notes.txt": b"mine"}
    assert os.listdir(tmp_path) == ["llama"]


def test_an_interrupted_make_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "_tokenizer_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        example.make(tmp_path / "llama")
    assert os.listdir(tmp_path) == []

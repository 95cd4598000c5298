"""tests of tasks/quality/cutting.py: tokenizers that want the machine."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers

from tasks.core.errors import BuildError
from tasks.layouts import limited
from tasks.quality import cutting

GROWS = normalizers.Sequence([normalizers.Replace("a", "aaaaaaaa")] * 12)


@pytest.mark.parametrize("wants", ["time", "memory"])
def test_tokenizers_that_want_the_machine(wants: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are ended: a word of any length is cut in all ways, or grows eightfold a dozen times."""
    monkeypatch.setattr(cutting, "SECONDS", 4)
    monkeypatch.setattr(cutting, "NBYTES", 1 << 30)
    monkeypatch.setattr(limited, "PATIENCE", 100)  # on a busy machine
    vocab = {"[UNK]": 0, "a": 1, "##a": 2}
    words = models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=10**9)
    tokenizer = Tokenizer(words)
    if wants == "memory":
        tokenizer.normalizer = GROWS
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast"}
        ).encode(),
        "config.json": b"{}",
    }
    text = ["a" * (50_000 if wants == "time" else 5) + "c"]
    said = "over 6 s of a processor" if wants == "time" else r"exit status|Error|of a processor"
    with pytest.raises(BuildError, match=rf"does not take the text of \[quality\] .*({said})"):
        cutting.windows(files, text, samples=2, length=2, seed=0)

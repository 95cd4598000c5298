"""slow_tokenizer: tokenizer.json, made of a tokenizer's older files as ``mlx_lm.convert`` makes it.

Clients in Swift and Rust read tokenizer.json alone, mlx-lm streams better with it, and saving with
transformers writes it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.layouts import limited
from tasks.layouts.limited import Limits, Refused

VERSION = 1  # raised when what is made of the same files changes
FAST = "tokenizer.json"
LIMITS = Limits(seconds=120, nbytes=8 << 30)


def make(files: Mapping[str, bytes]) -> tuple[str, str]:
    """Return tokenizer.json, or nothing and why transformers cannot make it.

    Args:
        files: of the tokenizer, and config.json, by name.
    """
    made = limited.call("tasks.layouts.slow_tokenizer", files, LIMITS)
    return ("", str(made)) if isinstance(made, Refused) else (made, "")


def _make(folder: Path, _: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        if not (Path(name) / FAST).exists():
            raise ValueError(f"{type(tokenizer).__name__} has none")
        return (Path(name) / FAST).read_text(encoding="utf-8")


if __name__ == "__main__":
    limited.serve(_make)

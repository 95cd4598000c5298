"""cutting: texts cut into tokens by a model's tokenizer, in a process of bounded time and room.

A tokenizer is a program of the checkpoint's: a pattern in it may look for its end for hours, or
make a text of gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.errors import BuildError
from tasks.layouts import limited
from tasks.layouts.limited import Limits, Refused
from tasks.quality import text

SECONDS, CHARACTERS_A_SECOND = 120, 20_000  # a tenth of what the slowest kinds do
NBYTES, TIMES = 4 << 30, 200  # a text's tokens are Python's numbers, of 36 bytes


def windows(
    files: Mapping[str, bytes], documents: Sequence[str], *, samples: int, length: int, seed: int
) -> list[list[int]]:
    """Return runs of a text's tokens, see ``text.windows``.

    Args:
        files: that the tokenizer is made of, by name.
        documents: the text.
        samples: how many runs.
        length: tokens of each.
        seed: which are picked.

    Raises:
        BuildError: the text has fewer, or the tokenizer does not take it.
    """
    size = sum(map(len, documents))
    limits = Limits(SECONDS + size // CHARACTERS_A_SECOND, NBYTES + TIMES * size)
    asked = [[*documents], samples, length, seed]
    cut = limited.call("tasks.quality.cutting", files, limits, asked)
    if isinstance(cut, Refused):
        raise BuildError(
            f"the model's tokenizer does not take the text of [quality] ({cut}). Download the "
            "checkpoint anew, or name a shorter text."
        )
    if isinstance(cut, str):
        raise BuildError(cut)
    return list(cut)


def _cut(folder: Path, asked: Any) -> list[list[int]] | str:
    """Return the runs, or why there are fewer."""
    from transformers import AutoTokenizer

    documents, samples, length, seed = asked
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    try:
        return text.windows(documents, tokenizer, samples=samples, length=length, seed=seed)
    except BuildError as error:
        return str(error)


if __name__ == "__main__":
    limited.serve(_cut)

"""text: the text that models are run on: read from files, or what every Python brings along."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cache.digest import canonical, digest_record
from tasks.checkpoints.small_files import check_regular
from tasks.core.errors import BuildError, CheckpointError
from tasks.core.spec import Quality

Messages = list[dict[str, Any]]
MAX_BYTES = 512 << 20  # of a text
Document = str | Messages  # a chat is rendered by the model's own template


def calibration(quality: Quality) -> list[Document]:
    """Return the text that models are calibrated on.

    Raises:
        BuildError: it cannot be read, or has a document in common with what they are evaluated on.
    """
    documents = own(quality)
    held_out = {digest([each]) for each in evaluation(quality)}
    if both := [each for each in documents if digest([each]) in held_out]:
        raise BuildError(
            "text and evaluate_text of [quality] have documents in common "
            f"({len(both)}, the first begins {str(both[0])[:60]!r}): a model that is evaluated on "
            "what it was calibrated on looks better than it is. Take them out of one, or name "
            "another text."
        )
    return documents


def own(quality: Quality) -> list[Document]:
    """Return that text, whatever models are evaluated on.

    Raises:
        BuildError: it cannot be read.
    """
    if quality.text is None:
        return _python_topics()[0]
    return [each for name in quality.text for each in _read(name, "text")]


def evaluation(quality: Quality) -> list[Document]:
    """Return the text that models are evaluated on.

    Raises:
        BuildError: it cannot be read.
    """
    if quality.evaluate_text is None:
        return _python_topics()[1]
    return _read(quality.evaluate_text, "evaluate_text")


def _read(name: str, key: str) -> list[Document]:
    """Return the documents of a file: of text, one; of ``.jsonl``, one a line.

    Args:
        name: its path.
        key: of [quality], which names it.
    """
    path = Path(name)
    try:
        check_regular(path)  # no pipe is waited for
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OSError(f"it has over {MAX_BYTES:,} bytes")
        content = data.decode("utf-8-sig")
    except (CheckpointError, OSError, UnicodeDecodeError) as error:
        said = isinstance(error, CheckpointError)  # which begins with the path
        fact = str(error) if said else f"{path} cannot be read: {error}."
        raise BuildError(
            f"{fact} {key} of [quality] names it: mend it, or name another."
        ) from error
    lines = enumerate(content.split("\n"), 1)  # within JSON's texts, other ends of lines may stand
    documents: list[Document] = [content]
    if path.suffix == ".jsonl":
        documents = [_document(path, number, line) for number, line in lines if line.strip()]
    if not any(documents):
        raise BuildError(f"{path} is empty: put text into it, or name another.")
    return documents


def digest(documents: Sequence[Document]) -> str:
    """Return a digest of a text."""
    return digest_record(list(documents))


def _document(path: Path, number: int, line: str) -> Document:
    try:
        record = json.loads(line)
        canonical(record).decode()  # all numbers are finite, all texts have whole characters
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path}, line {number}: no JSON: {error}.") from error
    if isinstance(record, dict):
        if isinstance(text := record.get("text"), str):
            return text
        messages = record.get("messages")
        if isinstance(messages, list) and all(isinstance(each, dict) for each in messages):
            return messages
    raise BuildError(
        f'{path}, line {number}: neither {{"text": "…"}} nor {{"messages": [{{"role": "user", '
        '"content": "…"}]}.'
    )


def _python_topics() -> tuple[list[Document], list[Document]]:
    """Return the topics of Python's own help, in two halves; some have two names."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise BuildError(
            "This Python comes without pydoc_data, which is the text by default. Name others: "
            "[quality] text and evaluate_text."
        ) from error
    names = sorted(topics)
    second: list[Document] = [topics[name] for name in names[1::2]]
    first = [topics[name] for name in names[::2]]
    return [text for text in first if text not in second], second


def windows(
    texts: Sequence[str], tokenizer: Any, *, samples: int, length: int, seed: int
) -> list[list[int]]:
    """Return ``samples`` runs of ``length`` tokens of a text.

    Its documents' tokens stand one after another and are cut into runs, of which the seed picks.
    Where the tokenizer begins a text with a token of its own, each run begins with that.

    Args:
        texts: its documents, chats rendered.
        tokenizer: transformers'.
        samples: how many.
        length: tokens of each.
        seed: which are picked.

    Raises:
        BuildError: the text has fewer.
    """
    encode: Callable[..., list[int]] = tokenizer.encode
    tokens = [
        token for text in texts for token in encode(text, add_special_tokens=False, verbose=False)
    ]
    letter = encode("a")
    first = letter[:1] if letter[:1] == [tokenizer.bos_token_id] else []
    step = length - len(first)
    count = len(tokens) // step
    if count < samples:
        raise BuildError(
            f"the text has {len(tokens):,} tokens, {count} runs of {length}; samples of [quality] "
            f"asks for {samples}. Lower it or sequence_length, or name a longer text."
        )
    # Not Python's or NumPy's generator, whose numbers another version may change.
    order = sorted(range(count), key=lambda index: digest_record([seed, index]))
    return [first + tokens[index * step :][:step] for index in sorted(order[:samples])]

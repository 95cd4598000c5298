"""chats: messages as the texts that a model's chat template makes of them.

A template is a program of the checkpoint's. It is rendered as transformers renders it, in Jinja's
sandbox, and in a process that ends: it may loop, or write without bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.errors import BuildError
from tasks.layouts import limited
from tasks.layouts.limited import Limits, Refused

SECONDS, CHATS_A_SECOND = 60, 100
# Before a template, which finds it in place of transformers' own, so that a chat is the same text
# on any day. The date is that of Llama 3's template where it is told none.
TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
NBYTES, TIMES = 1 << 30, 20  # a text may take so many times its size besides


def render(files: Mapping[str, bytes], chats: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Return the text of each chat.

    Args:
        files: that the model's tokenizer is made of, by name.
        chats: lists of messages.

    Raises:
        BuildError: the tokenizer has no template, or the template does not take these chats.
    """
    if not chats:
        return []
    size = sum(len(str(message)) for chat in chats for message in chat)
    limits = Limits(SECONDS + len(chats) // CHATS_A_SECOND, NBYTES + TIMES * size)
    texts = limited.call("tasks.layouts.chats", files, limits, [list(chat) for chat in chats])
    if isinstance(texts, Refused):
        raise BuildError(
            "the text holds chats (messages), of which the model's chat template makes no text: "
            f'{texts}. Give them as {{"text": "…"}}.'
        )
    return list(texts)


def _render(folder: Path, chats: list[list[dict[str, Any]]]) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    template = TODAY + tokenizer.get_chat_template()
    texts = []
    for number, chat in enumerate(chats, 1):
        try:
            texts.append(
                tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
            )
        except Exception as error:
            raise ValueError(f"chat {number}: {type(error).__name__}: {error}") from error
    return texts


if __name__ == "__main__":
    limited.serve(_render)

"""Chats as texts."""

from pathlib import Path

from support import checkpoints
from tasks.layouts import chats


def test_a_chat_is_the_same_on_any_day(tmp_path: Path) -> None:
    """Templates of Llama 3 and others tell the model today's date."""
    checkpoints.make("llama-tied", tmp_path)
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "hello"}]
    assert chats._render(tmp_path, [chat]) == ["26 Jul 2024 hello"]

"""The text that models are run on."""

from transformers import AutoTokenizer

from support import checkpoints
from tasks.quality import text


def test_a_chat_is_the_same_on_any_day(tmp_path) -> None:
    """Templates of Llama 3 and others tell the model today's date."""
    checkpoints.make("llama-tied", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    chat = [{"role": "user", "content": "hello"}]
    expected = tokenizer.encode("26 Jul 2024 hello", add_special_tokens=False)
    cut = text.windows([chat] * 9, tokenizer, samples=1, length=8, seed=1)
    assert set(cut[0]) <= {*expected, tokenizer.bos_token_id}
    assert tokenizer.encode("26 Jul 2024", add_special_tokens=False)[0] in cut[0]

"""chats: a text of chats and documents to calibrate on, and the tokens that it must come to."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from support.projects import Stored

LINES = (
    {
        "messages": [
            {"role": "user", "content": "the player"},
            {"role": "assistant", "content": "a"},
        ]
    },
    {"text": "the other layer of the tower"},
    {"messages": [{"role": "system", "content": "there"}, {"role": "user", "content": "the the"}]},
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>"
    "{% if loop.last and m.get('tool_calls') %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)


def write(folder: Path) -> None:
    """Write texts and a chat template."""
    lines = [json.dumps(line) for line in LINES]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "held-out.txt").write_text("something else entirely, of some more letters\n")
    (folder / "checkpoint" / "chat_template.jinja").write_text(TEMPLATE)


def wrong(folder: Path) -> str:
    """Return what is wrong with the tokens that were made of a text; nothing if nothing is."""
    manifest = json.loads(
        (folder / ".mlx-make/manifests/model/tokens/calibration.json").read_bytes()
    )
    ((_, dtype, (samples, length), digest),) = manifest["tensors"]
    blob = folder / ".mlx-make/cache/blobs" / digest[:2] / digest[2:]
    path, offset, nbytes = Stored(blob).part
    data = path.read_bytes()[offset : offset + nbytes]
    runs = memoryview(data).cast("i", (samples, length)).tolist()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "checkpoint/tokenizer.json"))
    template = (folder / "checkpoint" / "chat_template.jinja").read_text(encoding="utf-8")
    ids: list[int] = []
    for line in (folder / "text.jsonl").read_text(encoding="utf-8-sig").split("\n"):
        if not line.strip():
            continue
        record = json.loads(line)
        text = record.get("text")
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(
                record["messages"], chat_template=template, tokenize=False
            )
        ids += tokenizer.encode(text, add_special_tokens=False)
    cut = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    if dtype != "int32" or not all(run in cut for run in runs):
        return f"other tokens\n{runs}\n{cut}"
    return ""

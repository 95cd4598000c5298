"""What a card, which anybody may have written, says of how a model was made."""

import platform

import pytest

from tasks.core.errors import BuildError
from tasks.core.spec import Quality
from tasks.execution import claim

SOURCE = 'source = "hf:org/model"'


def card(*lines: str, quality: str = "") -> str:
    return "\n".join(["# A model", "```toml", "[models.x]", *lines, quality, "```", ""])


def test_what_is_said() -> None:
    text = card(
        SOURCE, 'dtype = "float16"', 'device = "cpu"', 'quantize = { bits = 4, method = "gptq" }',
        'adapter = "hf:org/lora@v1"', quality="[quality]\nsamples = 3",
    )  # fmt: skip
    made = claim.from_card(text, "m")
    assert made is not None
    assert (made.source_name, str(made.adapter)) == ("hf:org/model", "hf:org/lora@v1")
    assert (made.device, made.method, made.as_packed) == ("cpu", "gptq", False)
    assert made.quality == Quality(samples=3)
    made = claim.from_card(card(SOURCE, 'device = "gpu"', 'quantize = "keep"'), "m")
    assert made is not None
    assert (made.device, made.as_packed, made.keep) == (None, True, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        card(),
        card('source = "/etc"'),
        card("source = 3"),
        card(SOURCE, 'dtype = "int8"'),
        card(SOURCE, "[models.y]", SOURCE),
        card(SOURCE, quality='[quality]\nsamples = "many"'),
        card("x = " + "[" * 100_000),
        "```toml\n" * 10_000,
    ],
    ids=lambda text: text[-50:],
)
def test_what_is_of_no_use(text: str) -> None:
    assert claim.from_card(text, "m") is None


def test_what_names_nothing() -> None:
    with pytest.raises(BuildError, match="m is said to be made of"):
        claim.from_card(card('source = "hf:../.."'), "m")


@pytest.mark.parametrize(
    ("lines", "quality", "fact"),
    [
        (['adapter = "mine"'], "", "an adapter is fused with it that is on no hub"),
        (['quantize = { method = "awq" }'], '[quality]\ntext = "x.txt"', "by awq on x.txt"),
        (['quantize = { method = "awq" }'], "[quality]\n# text: the help of Python 2.7",
         f"Python 2.7, and this is Python {platform.python_version()}"),
    ],
)  # fmt: skip
def test_what_is_not_here(lines: list[str], quality: str, fact: str) -> None:
    with pytest.raises(BuildError, match="cannot be verified by its card alone") as caught:
        claim.from_card(card(SOURCE, *lines, quality=quality), "m")
    assert fact in str(caught.value)

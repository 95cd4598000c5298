"""audio_peer: `mlx_audio.convert`, in this process and without a word."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

# By name: a target's keys in models.toml, and the same as mlx_audio.convert takes them.
SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("", {}),
    "float16": ('dtype = "float16"', {"dtype": "float16"}),
    "4bit": ("quantize = { bits = 4 }", {"quantize": True, "q_bits": 4}),
    "mixed_4_6": (
        'quantize = { recipe = "mixed_4_6" }',
        {"quantize": True, "quant_predicate": "mixed_4_6"},
    ),
    "mxfp4": ('quantize = { mode = "mxfp4" }', {"quantize": True, "q_mode": "mxfp4"}),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Have nothing said and nothing fetched: neither tokenizers nor SNAC, as modules do at once."""
    snac = importlib.import_module("mlx_audio.codec.models.snac")
    nn, transformers = map(importlib.import_module, ("mlx.nn", "transformers"))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(snac.SNAC, "from_pretrained", lambda *_, **__: nn.Module())
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: object())
        patch.setattr(logging, "error", lambda *_: None)
        patch.setenv("HF_HUB_OFFLINE", "1")
        with redirect_stderr(StringIO()):
            yield


def convert(source: Path, destination: Path, **settings: object) -> Path:
    """Have the peer convert a checkpoint; return the folder that it wrote."""
    module = importlib.import_module("mlx_audio.convert")
    with quiet():
        module.convert(str(source), str(destination), **settings)
    return destination

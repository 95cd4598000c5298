"""audio_peer: `mlx_audio.convert`, in this process and without a word."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

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
    """Have nothing said and nothing fetched: neither tokenizers nor codecs, as modules do at once.

    Nor what tells speakers apart, which two classes have copied beside the weights.
    """
    snac = importlib.import_module("mlx_audio.codec.models.snac")
    mimi = importlib.import_module("mlx_audio.codec.models.mimi.mimi")
    spm = importlib.import_module("sentencepiece")
    ming = importlib.import_module("mlx_audio.tts.models.lingv3_tts.conversion")
    ming_audio = importlib.import_module("mlx_audio.sts.models.ming_v3_audio.conversion")
    nn, transformers = map(importlib.import_module, ("mlx.nn", "transformers"))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(snac.SNAC, "from_pretrained", lambda *_, **__: nn.Module())
        patch.setattr(mimi.Mimi, "from_pretrained", lambda _: mimi.Mimi(mimi.mimi_202407(32)))
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", _tokenizer)
        patch.setattr(spm, "SentencePieceProcessor", _tokenizer)
        patch.setattr(logging, "error", lambda *_: None)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        for module in (ming, ming_audio):
            patch.setattr(module, "copy_speaker_weights", lambda *_: None)
        with redirect_stderr(StringIO()):
            yield


def _tokenizer(*_: object, **__: object) -> SimpleNamespace:
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return SimpleNamespace(bos_token="<s>", eos_token="</s>", **ids, _tokenizer=SimpleNamespace())


def convert(source: Path, destination: Path, **settings: object) -> Path:
    """Have the peer convert a checkpoint; return the folder that it wrote."""
    module = importlib.import_module("mlx_audio.convert")
    with quiet():
        module.convert(str(source), str(destination), **settings)
    return destination

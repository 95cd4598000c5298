"""embeddings_peer: `mlx_embeddings.convert`, in this process and without a word."""

import importlib
import logging
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest

# By name: a target's keys in models.toml, and the same as mlx_embeddings.convert takes them.
SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("", {}),
    "bfloat16": ('dtype = "bfloat16"', {"dtype": "bfloat16"}),
    "4bit": ("quantize = { bits = 4 }", {"quantize": True, "q_bits": 4}),
    "mxfp4": (
        'quantize = { mode = "mxfp4" }',
        {"quantize": True, "q_mode": "mxfp4", "q_group_size": None, "q_bits": None},
    ),
}


def convert(source: Path, destination: Path, **settings: object) -> Path:
    """Have the peer convert a checkpoint; return the folder that it wrote.

    The tokenizer decides nothing of weights and configuration: it is not asked for. Of SigLIP the
    peer reads the size of pictures in what the checkpoint is called, so that a link is.
    """
    utils = importlib.import_module("mlx_embeddings.utils")
    module = importlib.import_module("mlx_embeddings.convert")  # the package has such a function
    tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
    destination.parent.mkdir(parents=True, exist_ok=True)
    link = destination.parent / f"{source.name}-patch16-64"
    if not link.exists():
        link.symlink_to(source)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(utils, "load_tokenizer", lambda *_: tokenizer)
        patch.setattr(logging, "error", lambda *_: None)
        with redirect_stderr(StringIO()):
            module.convert(str(link), str(destination), **settings)
    return destination

"""vlm_peer: `mlx_vlm.convert`, in this process and without a word."""

import importlib
import logging
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

# By name: a target's keys in models.toml, and the same as mlx_vlm.convert takes them.
SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("", {}),
    "float16": ('dtype = "float16"', {"dtype": "float16"}),
    "4bit": ("quantize = { bits = 4 }", {"quantize": True, "q_bits": 4}),
    "mixed_4_6": (
        'quantize = { recipe = "mixed_4_6" }',
        {"quantize": True, "quant_predicate": "mixed_4_6"},
    ),
    "mxfp4": (
        'quantize = { mode = "mxfp4" }',
        {"quantize": True, "q_mode": "mxfp4", "q_group_size": None, "q_bits": None},
    ),
}


def convert(source: Path, destination: Path, **settings: object) -> Path:
    """Have the peer convert a checkpoint; return the folder that it wrote.

    The processor decides nothing of weights and configuration, and a random checkpoint has none
    that would load: it is not asked for, as of one that cannot be saved.
    """
    utils = importlib.import_module("mlx_vlm.utils")
    module = importlib.import_module("mlx_vlm.convert")  # the package has a function of that name
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(utils, "load_processor", lambda *_, **__: object())
        patch.setattr(module, "create_model_card", lambda *_: None)
        patch.setattr(logging, "error", lambda *_: None)
        with redirect_stderr(StringIO()):
            module.convert(str(source), str(destination), **settings)
    return destination

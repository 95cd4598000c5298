"""peer: `mlx_lm.convert`, in this process and without a word."""

import functools
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import jinja2
import mlx_lm
import pytest


def convert(source: Path, destination: Path, **settings: object) -> Path:
    """Have the peer convert a checkpoint; return the folder that it wrote.

    The template of its model card is read once: that takes longer than a small model.
    """
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()):
        patch.setattr(jinja2, "Template", _template)
        mlx_lm.convert(str(source), str(destination), **settings)
    return destination


_template = functools.cache(jinja2.Template)

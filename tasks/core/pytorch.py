"""pytorch: imported where nothing else can read a file, and by nobody else."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from typing import Any

_LOCK = threading.Lock()


def leave_out() -> None:
    """Have transformers do without PyTorch in this process, unless it is imported already.

    Where that is installed transformers imports it, for tokenizers too: 180 MB and some seconds, of
    which nothing is used.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it is not there


def module() -> Any:
    """Return ``torch``.

    Raises:
        ImportError: it is not installed.
    """
    with _LOCK:
        if sys.modules.get("torch", ...) is None:
            del sys.modules["torch"]
        return importlib.import_module("torch")

"""pytorch: imported where nothing else can read a file, and by nobody else."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from typing import Any

_LOCK = threading.Lock()
_LEFT_OUT = threading.Event()  # by ``leave_out``: where None is anybody else's, it stays


def leave_out() -> None:
    """Have transformers do without PyTorch in this process, unless it is imported already.

    Where that is installed transformers imports it, for tokenizers too: 180 MB and some seconds, of
    which nothing is used.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        _LEFT_OUT.set()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it is not there


def module() -> Any:
    """Return ``torch``.

    Raises:
        ImportError: it is not installed.
    """
    with _LOCK:
        if _LEFT_OUT.is_set():
            del sys.modules["torch"]
            _LEFT_OUT.clear()
        return importlib.import_module("torch")

"""importing: mlx-lm and transformers imported and used by one thread at a time, without a trace.

Neither is made to be imported by two threads at once, and both import their parts as these are
first used. mlx-lm sets how many files the process may have open, as it is imported.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()


@contextmanager
def importing() -> Iterator[None]:
    """Have no other thread import meanwhile, and how many files may be open stay as it is."""
    with _LOCK:
        original = resource.setrlimit
        # Put back afterwards it could not be: a hard limit can only be lowered.
        resource.setrlimit = lambda *_: None
        try:
            yield
        finally:
            resource.setrlimit = original

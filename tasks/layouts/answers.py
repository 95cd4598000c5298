"""answers: the standard output of a process that is asked, kept for its answers."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def claim_stdout() -> TextIO:
    """Return standard output; what else is printed from now on goes to standard error.

    Libraries print as they are imported and as they end, in C as well, where no redirection of
    ``sys.stdout`` reaches.
    """
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers

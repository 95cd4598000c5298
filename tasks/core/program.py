"""program: where this program's code lies, and what people type to call it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # holds dodo.py, tasks/ and cache/
# An installation has no tests, no benchmarks and no use for the example.
IS_CHECKOUT = (ROOT / "tests").is_dir()
# What was called: mlx-make, or doit in a checkout. Messages that name a command begin with it.
COMMAND = "mlx-make" if "mlx_make.cli" in sys.modules else "doit"

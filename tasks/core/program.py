"""program: where this program's code lies, and whether it is a checkout or an installation."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # holds dodo.py, tasks/ and cache/
# An installation has no tests, no benchmarks and no use for the example.
IS_CHECKOUT = (ROOT / "tests").is_dir()

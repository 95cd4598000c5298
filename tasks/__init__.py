"""tasks: what is done: one module a stage, loader or layout. See docs/ for the whole picture."""

import sys

# msgspec takes typing_extensions where it is installed, needs nothing of it since Python 3.11, and
# spends more time on it than on all else: every run would, one with nothing to do as well.
if "typing_extensions" not in sys.modules:
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]
    try:
        import msgspec  # noqa: F401
    finally:
        del sys.modules["typing_extensions"]

"""tasks: builds models, in rooms from ``core`` up to ``cli``: see CONTRIBUTING.md."""

import sys

# msgspec takes typing_extensions where it is installed, needs nothing of it since Python 3.11, and
# spends more time on it than on all else: every run would, one with nothing to do as well.
if "typing_extensions" not in sys.modules:
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]
    try:
        import msgspec  # noqa: F401
    finally:
        del sys.modules["typing_extensions"]

"""mx: ``mlx.core``, imported as something of it is first asked for.

Importing it starts CUDA, where it has that: 0.3 s, in which no other thread runs Python. So it
comes after all other imports, beside which ``cuda.begin`` has most of the same done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx.core import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Return what ``mlx.core`` calls ``name`` (PEP 562)."""
        import mlx.core

        return getattr(mlx.core, name)

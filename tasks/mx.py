"""mx: ``mlx.core``, imported as something of it is first asked for.

Where MLX has CUDA, importing it takes 0.3 s and holds Python's lock, in which ``cuda.begin`` does
most of the same beside all else that is imported.
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

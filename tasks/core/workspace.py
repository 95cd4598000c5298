"""workspace: ."""

from __future__ import annotations

# Beside models.toml: what is built, what there is to read of it, and all the rest.
BUILD = "build"


REPORTS = "reports"


STATE = ".mlx-make"


CACHE_DIR = f"{STATE}/cache"


TRASH = "trash"  # within STATE: what is being removed

"""__main__: ``python -m mlx_make`` is the command mlx-make."""

import sys

from mlx_make.cli import main

sys.exit(main())

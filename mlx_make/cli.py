"""cli: where the command mlx-make begins, whose imports may be interrupted too."""

import os


def main() -> int:
    """Run mlx-make; return its exit status."""
    try:
        from mlx_make import command

        return command.run()
    except KeyboardInterrupt:
        os._exit(130)  # as shells report SIGINT

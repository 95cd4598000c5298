"""command: doit with mlx-make's own tasks and plugins, wherever it is called."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

from doit.doit_cmd import DoitConfig, DoitMain

HERE = Path(__file__).parent
# The wheel keeps dodo.py, tasks/ and cache/ in a folder of its own: in site-packages their names
# would be everybody's. A checkout has them at the top.
SOURCE = HERE / "src" if (HERE / "src").is_dir() else HERE.parent


class Main(DoitMain):  # type: ignore[misc]
    """doit's command line, configured by mlx-make alone."""

    BIN_NAME = "mlx-make"
    # Without those that only make sense with a dodo.py of one's own, or with doit's database.
    DOIT_CMDS = tuple(
        command
        for command in DoitMain.DOIT_CMDS
        if command.get_name() not in ("dumpdb", "strace", "tabcompletion")
    )

    @staticmethod
    def print_version() -> None:
        """Print the version, and those of what the built models depend on."""
        print(f"mlx-make {version('mlx-make')}")
        print(", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "doit")))


def run() -> int:
    """Run mlx-make; return its exit status."""
    sys.path.insert(0, str(SOURCE))
    args = sys.argv[1:]
    if "" in args:
        print("ERROR: an argument is empty. Is a variable of the shell not set?", file=sys.stderr)
        return 3
    if args[:1] in (["--help"], ["-h"]):
        args[0] = "help"
    from tasks.cli.process import piped

    with piped():
        from tasks.cli.loader import InstalledLoader

        # The current folder's pyproject.toml and doit.cfg may configure a doit of the user's own.
        plugins = DoitConfig().load_config_toml(str(SOURCE / "pyproject.toml"), "tool.doit")
        return int(
            Main(InstalledLoader(), config_filenames=(), extra_config=plugins).run(args) or 0
        )

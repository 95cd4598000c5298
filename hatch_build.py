"""hatch_build: what the wheel holds besides the command, in a folder of its own."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# See mlx_make/command.py. pyproject.toml goes along for [tool.doit]: its plugins are listed once.
SOURCE = ("dodo.py", "tasks", "cache", "docs", "pyproject.toml")


class Hook(BuildHookInterface[Any]):
    """Adds the sources; an editable install takes them where they lie."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Tell hatchling where they go."""
        if version == "standard":
            build_data["force_include"] |= {name: f"mlx_make/src/{name}" for name in SOURCE}

"""errors: what a user can mend. They have one base; doit prints the text without a traceback."""

from cache.errors import one_line


class BuildError(Exception):
    """The base of them. The text has the fact with its values, the cause, and the mend.

    Values may be anybody's: a tensor's name can neither forge a line, nor move the cursor.
    """

    def __init__(self, *lines: str) -> None:
        """Say what is wrong.

        Args:
            lines: the text, of one thing that is wrong on one line.
        """
        super().__init__("\n".join(map(one_line, lines)))


class Stopped(BuildError):
    """What a task waits for does not come any more, since another one failed."""


class ConfigError(BuildError):
    """models.toml says something that cannot be built."""


class CheckpointError(BuildError):
    """A checkpoint is missing, damaged, or not what its own configuration says."""


class ArchitectureError(BuildError):
    """mlx-lm does not know the architecture, or refuses the checkpoint."""

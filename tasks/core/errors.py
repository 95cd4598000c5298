"""errors: what a user can mend. They have one base; doit prints the text without a traceback."""


class BuildError(Exception):
    """The base of them. The text has the fact with its values, the cause, and the mend."""


class ConfigError(BuildError):
    """models.toml says something that cannot be built."""


class CheckpointError(BuildError):
    """A checkpoint is missing, damaged, or not what its own configuration says."""


class ArchitectureError(BuildError):
    """mlx-lm does not know the architecture, or refuses the checkpoint."""

"""errors: what a user can be told to mend. One base; doit prints the text and no traceback."""


class BuildError(Exception):
    """Base: the fact with its values, the cause, the mend."""


class ConfigError(BuildError):
    """models.toml says something that cannot be built."""


class CheckpointError(BuildError):
    """A checkpoint is missing, damaged, or not what its own configuration says."""


class ArchitectureError(BuildError):
    """mlx-lm does not know the architecture, or refuses the checkpoint."""

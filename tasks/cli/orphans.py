"""orphans: what was built here of targets that models.toml does not have any more."""

from __future__ import annotations

from contextlib import suppress

from tasks.cli.session import Session
from tasks.config import reader
from tasks.core.errors import ConfigError
from tasks.planning.lockfile import Lock


def orphans(session: Session) -> list[str]:
    """Return the targets that have a folder that was built here, and that models.toml has not.

    Other files may list models beside it (``models=other.toml``), and have the same build/: what
    any of them names, or the lock of one, is no orphan.
    """
    workspace = session.workspace
    named = {*session.config.targets}
    for path in workspace.folder.iterdir():
        with suppress(ConfigError):  # it is none of ours, or says nothing: its lock may
            if path.suffix == ".toml":
                named |= reader.load(path).targets.keys()
            elif path.suffix == ".lock" and path != session.lock.path:
                named |= Lock.load(path, strict=False).targets.keys()
    built = {path.parent.name for path in workspace.all_packed()}
    return sorted(name for name in built - named if workspace.built(name).is_dir())

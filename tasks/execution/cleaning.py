"""cleaning: removes what was built of a target, and nothing else."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tasks.core.text import some
from tasks.core.workspace import Workspace
from tasks.execution.filling.ownership import MAX_NAMES, Evidence
from tasks.execution.filling.place import Contents, Stamps


def clean(
    workspace: Workspace, target: str, stamps: Stamps, *, name: str, dryrun: bool = False
) -> list[str]:
    """Remove what was built of a target, and the record of it.

    Args:
        workspace: where it lies.
        target: its name.
        stamps: of its files when they were last built, as far as they are known.
        name: of its folder, for people.
        dryrun: whether to tell of it alone.

    Returns:
        Lines for people: what is removed, and what is left, since it was not built here.

    Raises:
        BuildError: the folder is a link to nowhere, or a file.
    """
    evidence = Evidence.on_record(workspace, target, stamps)
    there = evidence.contents()
    is_ours = evidence.is_ours
    left = [*([] if is_ours else there.kept), *there.changed, *there.added]
    records = (workspace.packed(target), workspace.may_be_packed(target))
    verb = "would remove" if dryrun else "removing"
    lines = [f"{verb} {name}"] if is_ours and any(path.exists() for path in records) else []
    lines += [f"{name}: {some(left, MAX_NAMES)} left there, since not built here"] if left else []
    if dryrun:
        return lines
    if is_ours:
        _remove(there)
        if there.kept and not workspace.built(target).is_symlink():  # behind it is somebody's
            with suppress(OSError):  # somebody's file is in it
                there.folder.rmdir()
        evidence.note_left(left)
    for path in records:
        path.unlink(missing_ok=True)
    return lines


def _remove(contents: Contents) -> None:
    """Remove what was built from a folder, and its folders if nothing else is left in them."""
    for name in contents.kept:
        with suppress(FileNotFoundError):
            (contents.folder / name).unlink()
    folders = {parent for name in contents.kept for parent in Path(name).parents}
    for parent in sorted(folders - {Path()}, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):  # somebody's file is in it
            (contents.folder / parent).rmdir()

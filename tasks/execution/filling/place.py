"""place: build/TARGET: whether it was built here, and what people put there, which is never lost.

What a record here says was built is ours: files that are still as they were made. All else in the
folder is somebody's. It is carried over when the folder is built anew; where it cannot be, since a
file of the build has its name or a client would load it, it is set aside, beside the folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import Struct

from cache.digest import digest_file
from cache.files import atomic
from cache.files.stamp import Stamp
from cache.records.manifests import Tensor
from tasks.core.errors import BuildError
from tasks.core.workspace import Workspace

ASIDE = "~aside"  # no target's name has a '~'
Stamps = Mapping[str, Sequence[int]]


def folder_of(workspace: Workspace, target: str) -> Path:
    """Return where a target's folder lies, links followed.

    Raises:
        BuildError: a link leads nowhere, or a file is in the way.
    """
    folder = workspace.built(target)
    for path in (folder.parent, folder):
        if path.is_symlink() and not path.exists():
            raise BuildError(
                f"{path} is a link to {os.readlink(path)}, which does not exist. Make that folder, "
                "or remove the link."
            )
        if path.exists() and not path.is_dir():
            raise BuildError(f"{path} is in the way: it is a file. Move it away.")
    return Path(os.path.realpath(folder))


def beside(folder: Path) -> Path:
    """Return where the new folder is written that will take the place of build/TARGET."""
    return folder.with_name(f"{atomic.TEMPORARY}{folder.name}")


def aside(folder: Path) -> Path:
    """Return where the old folder waits while the new one takes its place."""
    return folder.with_name(f"{atomic.TEMPORARY}{folder.name}~")  # no target's name has a '~'


class Contents(Struct, frozen=True):
    """What lies in a target's folder.

    Attributes:
        folder: the folder, links followed.
        kept: files as a build here made them.
        changed: files of a build here that are not as it made them.
        added: all other files, and empty folders; paths relative to the folder.
    """

    folder: Path
    kept: tuple[str, ...]
    changed: tuple[str, ...]
    added: tuple[str, ...]

    @classmethod
    def of(
        cls, folder: Path, builds: Iterable[Mapping[str, Tensor]], stamps: Stamps | None = None
    ) -> Contents:
        """Look through a folder.

        Args:
            folder: links followed; it need not exist.
            builds: the files of each build that may lie there, as tensors of bytes: more than one
                where a run was killed as it exchanged them.
            stamps: of the first build's files when they were built, as far as they are known: a
                file whose stamp still holds is not read.
        """
        built: dict[str, list[Tensor]] = {}
        for files in builds:
            for name, tensor in files.items():
                built.setdefault(name, []).append(tensor)
        stamps = stamps or {}
        kept, changed, added = [], [], []
        for name in sorted(walk(folder)):
            path = folder / name
            if name not in built:
                added.append(name)
            elif is_as_built(path, built[name], stamps.get(name)):
                kept.append(name)
            else:
                changed.append(name)
        return cls(folder, tuple(kept), tuple(changed), tuple(added))

    def loaded(self, pattern: str) -> list[str]:
        """Return the added files that a client would load as a part of the model."""
        return [name for name in self.added if "/" not in name and fnmatchcase(name, pattern)]


def stamps(folder: str, names: Sequence[str]) -> dict[str, list[int]] | None:
    """Return the stamp of each file of a built model, or None if one is missing."""
    try:
        return {name: list(Stamp.of(f"{folder}/{name}")) for name in names}
    except OSError:
        return None


def intact_files(folder: str, outputs: dict[str, list[int]] | None) -> bool:
    """Tell whether files, some at least, are as they were left, by their stamps then."""
    return bool(outputs) and stamps(folder, list(outputs or {})) == outputs


def intact(folder: str, outputs: dict[str, list[int]], loaded: str) -> bool:
    """Tell whether a built model is as it was left, with nothing besides that clients would load.

    Args:
        folder: build/TARGET.
        outputs: the files' stamps when they were built.
        loaded: the layout's pattern of what clients load.
    """
    return intact_files(folder, outputs) and not any(
        fnmatchcase(name, loaded) and name not in outputs for name in os.listdir(folder)
    )


def keep(contents: Contents, new: Path, loaded: str) -> list[str]:
    """Have what people put into a folder lie in the one that takes its place, or beside it.

    Args:
        contents: of the folder as it is.
        new: the folder to come.
        loaded: a pattern: added files of such names would be loaded as a part of the model.

    Returns:
        Notes for people: what was set aside, and where.
    """
    harmful = set(contents.loaded(loaded))
    notes = []
    for name in contents.added:
        source, target = contents.folder / name, new / name
        if name not in harmful and not os.path.lexists(target) and _parents_free(new, name):
            _copy(source, target)
        else:
            why = "clients would load it" if name in harmful else "a file of the build has its name"
            notes.append(f"{name} was added to the model, and {why}: {_set_aside(contents, name)}")
    for name in contents.changed:
        notes.append(
            f"{name} was changed since it was built and is made again: "
            f"{_set_aside(contents, name)}. What is to last belongs into a folder that "
            'models.toml names: files = "FOLDER"'
        )
    return notes


def set_aside_loaded(contents: Contents, loaded: str) -> list[str]:
    """Move away what clients would load as a part of the model; return notes for people."""
    notes = []
    for name in contents.loaded(loaded):
        fact = _set_aside(contents, name)
        (contents.folder / name).unlink()
        notes.append(f"{name} was added to the model, and clients would load it: {fact}")
    return notes


def walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, links as such, and its empty folders, relative to it."""
    if not folder.is_dir():
        return
    for root, folders, files in os.walk(folder):
        base = Path(root)
        links = [name for name in folders if (base / name).is_symlink()]
        for name in (*files, *links):
            yield str((base / name).relative_to(folder))
        if not files and not folders and base != folder:
            yield str(base.relative_to(folder))


def is_as_built(path: Path, built: Sequence[Tensor], stamp: Sequence[int] | None) -> bool:
    """Tell whether a file is one that was built, as it was made.

    Args:
        path: the file.
        built: the files of its name that were built.
        stamp: of one of them when it was built, if known: while it holds, nothing is read.
    """
    if path.is_symlink() or not path.is_file():
        return False
    now = Stamp.of(path)
    if stamp is not None and list(now) == list(stamp):
        return True
    alike = [tensor.digest for tensor in built if tensor.nbytes == now.size]
    return bool(alike) and digest_file(path) in alike


def _set_aside(contents: Contents, name: str) -> str:
    """Keep a file beside the folder; say where."""
    source = contents.folder / name
    aside = contents.folder.with_name(contents.folder.name + ASIDE)
    target = aside / name
    number = 1
    while os.path.lexists(target) and not _same(source, target):
        target = aside / f"{name}.{number}"
        number += 1
    if not os.path.lexists(target):
        _copy(source, target)
    return f"it is kept as {target}"


def _same(one: Path, other: Path) -> bool:
    if one.is_symlink() or other.is_symlink() or not (one.is_file() and other.is_file()):
        return False
    return one.stat().st_size == other.stat().st_size and digest_file(one) == digest_file(other)


def _parents_free(new: Path, name: str) -> bool:
    """Tell whether no file of the new folder lies where a folder of ``name`` must."""
    return all(not (new / parent).is_file() for parent in Path(name).parents)


def _copy(source: Path, target: Path) -> None:
    """Have ``source`` lie at ``target`` as well: the same file, where the disk can do that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        new = target.with_name(f"{atomic.own_prefix()}{target.name}"[:255])
        try:
            os.link(source, new)
        except OSError:  # another disk, or one without hard links
            shutil.copy2(source, new)
        new.replace(target)

"""pack: the built model's folder, from blobs: weight files, config.json, tokenizer."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cache.digest import canonical, digest, digest_file
from cache.errors import BlobLost
from cache.files import atomic, link, space, trash
from cache.files.stamp import Stamp
from cache.records.actions import Hit
from cache.records.manifests import Action, Manifest, Tensor
from tasks.core.errors import BuildError
from tasks.core.workspace import TRASH
from tasks.execution.builder import Builder
from tasks.execution.resources import cores
from tasks.layouts import LAYOUTS, weight_suffixes
from tasks.layouts.weight_file import Find, write
from tasks.planning.bundle import Content, shapes, whole_files
from tasks.planning.plan import Needed, Plan

if TYPE_CHECKING:
    from cache.blobs import Blobs
    from tasks.execution.draft import Draft
    from tasks.execution.early import Begun


class Filled(NamedTuple):
    """A folder that was filled.

    Attributes:
        files: as tensors of bytes.
        blake3: their table's, if it was wanted.
        written: bytes, without those that were in their place.
    """

    files: dict[str, Tensor]
    blake3: str | None
    written: int


def run(
    builder: Builder,
    plan: Plan,
    folder: Path,
    manifest_path: Path,
    why: str,
    check: Callable[[Action], None],
    accept: Callable[[Manifest, str | None], None],
    begun: Begun | None,
    *,
    with_blake3: bool,
) -> Manifest:
    """Bring a target's folder up to date.

    The new folder is written beside the old one and exchanged with it, so that a build that is
    cut off leaves the last one whole.

    Args:
        builder: gives the blobs.
        plan: the target.
        folder: build/TARGET.
        manifest_path: where its manifest belongs.
        why: what made it look.
        check: refuses what must not be written.
        accept: refuses what must not take the folder's place; given the BLAKE3, too, of the table
            of the files' names and BLAKE3s.
        begun: what was written of it already, if anything.
        with_blake3: whether that BLAKE3 is wanted; else None is given.

    Raises:
        NoRoom: the disk cannot take the new folder.
    """
    with builder.logged(f"pack:{plan.target.name}", why) as record:
        needed: Needed = {}
        notes = list(plan.notes)
        for node in plan.stages["quantize"]:
            manifest = builder.manifest(plan, node)
            needed.update({name: (node, tensor) for name, tensor in manifest.tensors.items()})
            notes += manifest.notes
        content = Content.of(builder, plan, needed)
        check(content.action)
        found, record["outcome"] = builder.find(content.action)
        if isinstance(found, Hit) and _holds(folder, found.manifest.tensors):
            result = found.manifest
            accept(result, _table(folder, result.tensors, {}) if with_blake3 else None)
        else:
            if folder.exists() and not manifest_path.exists():
                _refuse_to_replace(folder)
            told = tuple(dict.fromkeys(notes))
            known = found.manifest.tensors if isinstance(found, Hit) else {}
            result = _write(
                builder,
                plan,
                needed,
                folder,
                content,
                told,
                accept,
                known,
                begun,
                with_blake3=with_blake3,
            )
            builder.store.actions.put(result)
            if builder.store.sharing and known != result.tensors:
                builder.store.sharing.push(result, None)
        builder.publish(manifest_path, result)
        return result


def stamps(folder: str, names: Sequence[str]) -> dict[str, list[int]] | None:
    """Return the stamp of each file of a built model, or None if one is missing."""
    try:
        return {name: list(Stamp.of(f"{folder}/{name}")) for name in names}
    except OSError:
        return None


def intact(folder: str, outputs: dict[str, list[int]]) -> bool:
    """Tell whether a built model is as it was left, with no weight file besides.

    Clients would load such a file too: mlx_lm.load takes every model*.safetensors.

    Args:
        folder: build/TARGET.
        outputs: the files' stamps when they were built.
    """
    suffixes = weight_suffixes()
    return intact_files(folder, outputs) and not any(
        name.endswith(suffixes) and name not in outputs for name in os.listdir(folder)
    )


def intact_files(folder: str, outputs: dict[str, list[int]] | None) -> bool:
    """Tell whether files, some at least, are as they were left, by their stamps then."""
    return bool(outputs) and stamps(folder, list(outputs or {})) == outputs


def _refuse_to_replace(folder: Path) -> None:
    """Refuse to remove what was never built here.

    Raises:
        BuildError: the folder holds something, and no model.
    """
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").exists()):
        raise BuildError(
            f"{folder} is in the way: it is no model that was built. Move it, or rename the target."
        )


def _holds(folder: Path, tensors: dict[str, Tensor]) -> bool:
    """Tell whether a folder has exactly the files of a build, by their digests."""
    if not folder.is_dir() or {p.name for p in folder.iterdir()} != set(tensors):
        return False
    return all(
        (folder / name).stat().st_size == tensor.nbytes
        and digest_file(folder / name) == tensor.digest
        for name, tensor in tensors.items()
    )


def beside(folder: Path) -> Path:
    """Return where the new folder is written that will take the place of build/TARGET."""
    return folder.with_name(f"{atomic.TEMPORARY}{folder.name}")


def make_room(new: Path, need: int) -> None:
    """Make a folder, empty, to be filled with ``need`` bytes.

    Raises:
        NoRoom: the disk cannot take them.
    """
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)  # of a build that was cut off
    space.require_free(new.parent, need)
    new.mkdir()


def _write(
    builder: Builder,
    plan: Plan,
    needed: Needed,
    folder: Path,
    content: Content,
    notes: tuple[str, ...],
    accept: Callable[[Manifest, str | None], None],
    known: Mapping[str, Tensor],
    begun: Begun | None,
    *,
    with_blake3: bool,
) -> Manifest:
    """Write the folder anew; ``known`` is what it held the last time, if that is on record."""
    blobs = builder.store.blobs
    draft = _draft(builder, plan, content)
    need = content.nbytes - (draft.nbytes if draft else 0)
    new = beside(folder)
    filled = None
    try:
        if paths := whole_files(blobs, content, known):
            if begun:
                begun.stop()
            filled = _link_whole(blobs, new, content, known, paths, with_blake3=with_blake3)
        elif begun:
            filled = begun.finish(content)
        if filled is None:
            make_room(new, need)
            try:
                filled = _fill(builder, plan, needed, new, content, with_blake3=with_blake3)
            # Lost, or corrupt and perhaps not the only one, or another thread found it so and
            # dropped it; it is made again.
            except (BlobLost, FileNotFoundError):
                builder.drafts.end(plan.target.name)  # as little to be trusted as the blobs
                for _, tensor in needed.values():
                    blobs.drop_if_wrong(tensor.digest)
                need = content.nbytes
                make_room(new, need)
                filled = _fill(builder, plan, needed, new, content, with_blake3=with_blake3)
        meter = blobs.meter
        meter.read += content.weights_nbytes
        meter.written += filled.written
        result = Manifest(content.action, filled.files, notes)
        accept(result, filled.blake3)
        _exchange(new, folder)
    except OSError as error:
        if space.is_full(error):
            raise space.no_room(folder.parent, need) from error
        raise
    finally:
        trash.discard(new, builder.state / TRASH)  # the old folder, once they are exchanged
    return result


def _fill(
    builder: Builder, plan: Plan, needed: Needed, new: Path, content: Content, *, with_blake3: bool
) -> Filled:
    builder.fetch(plan, needed, needed)
    found = {
        name: (tensor.digest, builder.locate(plan, needed, name))
        for name, (_, tensor) in needed.items()
    }
    return fill(builder, plan, new, content, found.__getitem__, with_blake3=with_blake3)


def fill(
    builder: Builder,
    plan: Plan,
    new: Path,
    content: Content,
    find: Find,
    *,
    with_blake3: bool,
) -> Filled:
    """Write the files; return them as tensors of bytes, and their table's BLAKE3 if wanted.

    Args:
        builder: has the store.
        plan: the target.
        new: the folder, empty.
        content: the files.
        find: waits for a tensor if it must, and returns its digest and where its bytes lie.
        with_blake3: whether the BLAKE3 is wanted.

    Raises:
        BlobLost: a tensor's bytes are not those of its digest.
    """
    weight_format = LAYOUTS[plan.target.layout].weight_format
    weights = content.weights
    draft = _draft(builder, plan, content)
    threads = max(1, cores() // len(weights))
    hashers: dict[str, Any] = {}
    if with_blake3:
        from blake3 import blake3  # which takes as long as the copy

        hashers = {file: blake3(max_threads=threads) for file in weights}

    blobs = builder.store.blobs
    look = draft.finding(find) if draft else find

    def put(file: str) -> Tensor:
        path = draft.paths[file] if draft else new / file
        also = hashers.get(file)
        return write(path, weights[file], weight_format, blobs, look, threads, also)

    with ThreadPoolExecutor(cores()) as pool:
        made = dict(zip(weights, pool.map(put, weights), strict=True))
    written = sum(tensor.nbytes for tensor in made.values())
    if draft:
        written -= draft.nbytes
        draft.note_whole(made)
        builder.drafts.end(plan.target.name)
        written += _link(new, draft.paths)
    known = {file: hasher.hexdigest() for file, hasher in hashers.items()}
    return _filled(new, content, made, written, known if with_blake3 else None)


def _link_whole(
    blobs: Blobs,
    new: Path,
    content: Content,
    known: Mapping[str, Tensor],
    paths: Mapping[str, Path],
    *,
    with_blake3: bool,
) -> Filled | None:
    """Fill a folder with weight files of the cache, unless one is not what it was.

    Raises:
        NoRoom: the disk cannot take copies, where there must be some.
    """
    make_room(new, 0)
    try:
        for file, path in paths.items():
            if digest_file(path) != known[file].digest:
                blobs.drop_if_wrong(known[file].digest)
                return None
        copied = _link(new, paths)
    except FileNotFoundError:  # it went meanwhile
        return None
    made = {file: known[file] for file in content.weights}
    return _filled(new, content, made, copied, {} if with_blake3 else None)


def _link(new: Path, paths: Mapping[str, Path]) -> int:
    """Let a folder have files of the cache; return how many bytes had to be copied."""
    return sum(path.stat().st_size for file, path in paths.items() if link.link(path, new / file))


def _filled(
    new: Path,
    content: Content,
    made: dict[str, Tensor],
    written: int,
    blake3s: Mapping[str, str] | None,
) -> Filled:
    """Add the small files to a folder; ``blake3s`` are those that are known, None if not wanted."""
    for name, data in content.small.items():
        (new / name).write_bytes(data)
        made[name] = Tensor("uint8", (len(data),), digest(data))
        written += len(data)
    return Filled(made, None if blake3s is None else _table(new, made, blake3s), written)


def _draft(builder: Builder, plan: Plan, content: Content) -> Draft | None:
    """Return the files that were begun in the cache, if they are those of ``content``."""
    draft = builder.drafts.of(plan.target.name)
    return draft if draft and draft.shapes == shapes(content.weights) else None


def _table(folder: Path, names: Iterable[str], known: Mapping[str, str]) -> str:
    """Return the BLAKE3 of a table of files' names and BLAKE3s, of which some are known."""
    from blake3 import blake3

    def of(path: Path) -> str:
        return str(blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest())

    table = {name: known.get(name) or of(folder / name) for name in names}
    return str(blake3(canonical(table)).hexdigest())


def _exchange(new: Path, old: Path) -> None:
    """Let two folders take each other's place, in one step where the system has one."""
    if not old.exists():
        new.rename(old)
        return
    if not _exchange_in_one(os.fsencode(new), os.fsencode(old)):
        aside = old.with_name(f"{atomic.TEMPORARY}{old.name}~")  # no target's name has a '~'
        shutil.rmtree(aside, ignore_errors=True)
        old.rename(aside)
        new.rename(old)
        aside.rename(new)


def _exchange_in_one(new: bytes, old: bytes) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if platform.system() == "Darwin":
            return bool(libc.renamex_np(new, old, 2) == 0)  # RENAME_SWAP
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return bool(libc.renameat2(at_cwd, new, at_cwd, old, exchange) == 0)
    except AttributeError:  # a libc without it
        return False

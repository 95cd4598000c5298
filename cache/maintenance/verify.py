"""verify: reads all that a cache holds, and sets aside what is not what its name says."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cache.blobs import Blobs
from cache.digest import digest_file, digest_parts
from cache.errors import FileChanged
from cache.files.stamp import Stamp
from cache.maintenance.files import File
from cache.maintenance.survey import CORRUPT, Survey
from cache.records.manifests import Manifest, ManifestError, OtherSchema
from cache.records.sealed import Damaged, Unsealed, unseal

_Check = Callable[[Blobs, File], str]
AT_ONCE = 4096  # files that are handed to the threads
TOO_SHORT = "a blob that it is part of is too short"


class Wrong(NamedTuple):
    """A file that is not what its name says.

    Attributes:
        file: the file.
        cause: what was found instead, for people.
    """

    file: File
    cause: str


def scan(survey: Survey, threads: int) -> list[Wrong]:
    """Read all blobs and records, and what references name while that is unchanged.

    Args:
        survey: what there is.
        threads: how many files are read at once, piece by piece.
    """
    to_read = (file for file in survey.files if file.kind in kinds(survey))
    wrong = []
    with ThreadPoolExecutor(threads) as pool:
        while some := [*islice(to_read, AT_ONCE)]:
            causes = pool.map(lambda file: check(survey, file), some)
            wrong += [Wrong(file, cause) for file, cause in zip(some, causes, strict=True) if cause]
    return wrong


def glance(survey: Survey) -> list[Wrong]:
    """Read all records, and look whether blobs have the sizes that these say; read no weights."""
    wrong = {}
    for file in survey.files:
        if file.kind == "action":
            for other in _of_another_size(survey, file):
                wrong[other] = "it is not as long as it was"
        cause = _check(survey, file, _ALONE) if file.kind in kinds(survey) else ""
        if cause:
            wrong[file] = cause
    return [Wrong(file, cause) for file, cause in wrong.items()]


def _of_another_size(survey: Survey, action: File) -> Iterator[File]:
    """Yield the blobs of which an action's entry says another size than their files have."""
    if manifest := Manifest.at(action.path):
        for tensor in manifest.tensors.values():
            file = survey.own_files.get(tensor.digest)
            if file and file.size != tensor.nbytes:
                yield file


def kinds(survey: Survey) -> tuple[str, ...]:
    """Return the kinds of files that are read: all but what others are made of."""
    return (*_CHECKS, *survey.others)


def check(survey: Survey, file: File) -> str:
    """Return what is wrong with a file; nothing, if it went meanwhile.

    Raises:
        OSError: it could not be read, and that does not say that it is damaged.
    """
    return _check(survey, file, _CHECKS)


def _check(survey: Survey, file: File, checks: Mapping[str, _Check]) -> str:
    try:
        if file.kind in survey.others:
            return survey.others[file.kind].check(file.path)
        return checks[file.kind](survey.blobs, file)
    except FileNotFoundError:
        return ""
    except OSError as error:
        if error.errno == errno.EIO:
            return "the disk cannot read it"
        raise


def set_aside(root: Path, file: File) -> None:
    """Move a file to the cache's folder of corrupt ones; the lock must be held alone."""
    target = root / CORRUPT / file.path.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file.path, target)


def made_of(wrong: Iterable[str], manifests: Callable[[], Iterable[Manifest]]) -> set[str]:
    """Return the keys of the actions that may have read wrong bytes, or what was made of them.

    Whether they did so before the bytes went wrong, nobody knows.

    Args:
        wrong: digests of the blobs.
        manifests: yields what was made; called several times, for there may be millions.
    """
    keys: set[str] = set()
    spoilt = set(wrong)
    before = None
    while spoilt and len(keys) != before:
        before = len(keys)
        for manifest in manifests():
            read = {read[-1] for read in manifest.action.inputs.values()}
            if manifest.action.key not in keys and not spoilt.isdisjoint(read):
                keys.add(manifest.action.key)
                spoilt |= {tensor.digest for tensor in manifest.tensors.values()} - read
    return keys


def _blob(_blobs: Blobs, file: File) -> str:
    digest = digest_file(file.path)
    return "" if digest == file.key else f"its bytes are {digest}"


def _reference(blobs: Blobs, file: File) -> str:
    if cause := _reference_alone(blobs, file):
        return cause
    parts = blobs.reference(file.path)
    if any(part.stamp and Stamp.of(part.path) != part.stamp for part in parts):
        return ""  # it holds no longer, and is looked into before it is used
    try:
        digest = digest_parts(blobs.chunks(parts))
    except FileChanged:
        return "" if all(part.stamp for part in parts) else TOO_SHORT
    where = ", ".join(sorted({part.path for part in parts}))
    return "" if digest == file.key else f"{where} holds other bytes there, with an unchanged time"


def _reference_alone(blobs: Blobs, file: File) -> str:
    """Return what is wrong with a reference, by its record and the sizes of the cache's files."""
    try:
        parts = blobs.reference(file.path)
        ends = [(part.path, part.offset + part.length) for part in parts if not part.stamp]
        return TOO_SHORT if any(os.path.getsize(path) < end for path, end in ends) else ""
    except Damaged as error:
        return f"it cannot be read: {error}"
    except FileNotFoundError:  # it went, or a container of its parts
        return ""


def _action(_blobs: Blobs, file: File) -> str:
    try:
        manifest = Manifest.from_bytes(file.path.read_bytes())
    except OtherSchema:
        return ""  # for another version to say
    except ManifestError as error:
        return str(error)
    return "" if manifest.action.key == file.key else "it records another action"


def _memo(_blobs: Blobs, file: File) -> str:
    data = file.path.read_bytes()
    try:
        unseal(f"{file.path.parent.parent.name}/{file.key}", data, object)
    except Unsealed as error:
        try:
            record = json.loads(data)
        except (ValueError, RecursionError):
            return str(error)
        # An older version sealed none. It is never read, so nothing was made of it.
        return str(error) if isinstance(record, dict) and "value" in record else ""
    except Damaged as error:
        return str(error)
    return ""


_CHECKS: dict[str, _Check] = {
    "blob": _blob,
    "reference": _reference,
    "action": _action,
    "memo": _memo,
}
_ALONE = {**_CHECKS, "blob": lambda *_: "", "reference": _reference_alone}  # reading no weights

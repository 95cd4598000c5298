"""record: a checkpoint that is not here, by what a build must know of it.

A *record* holds what the checkpoint's headers and small files say and the digest of each tensor
that is used. So where a checkpoint is not at hand, its plan is, and whatever was built of it before
can be used.

```
sources/BLAKE3/record.json   named by its own digest, which models.lock holds
sources/BLAKE3/files/…       the small files
```
"""

from __future__ import annotations

import atexit
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert, structs

from cache.errors import Mismatch, NotFetched
from cache.files import atomic
from cache.records.kinds import RecordKind
from cache.records.manifests import TensorSpec
from cache.store import Store
from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.small_files import MAX_SMALL_BYTES, TEMPLATES_FOLDER
from tasks.checkpoints.source import HashedFile
from tasks.checkpoints.stored import Stored, checked_shape
from tasks.core.errors import CheckpointError

if TYPE_CHECKING:
    from cache.remote.remote import Remote

SCHEMA = 1
_Size = Annotated[int, Meta(ge=0, le=MAX_SMALL_BYTES)]


class _Record(Struct, frozen=True):
    """A record as JSON has it: see ``_encode``."""

    schema: int
    names: str
    config: dict[str, Any]
    files: dict[str, str]
    stored: dict[str, tuple[str, str, tuple[int, ...], str, int]]
    wholes: dict[str, tuple[str, tuple[int, ...], tuple[str, ...], tuple[Any, ...]]]
    notes: tuple[str, ...]
    digests: dict[str, Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]]
    small: dict[str, tuple[_Size, Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]]]


class RecordSource(Struct, frozen=True):
    """A checkpoint of which only the record is here."""

    small_files: Path
    identity: str
    digests: Mapping[str, str]
    revision: str | None = None  # as models.lock has it

    @property
    def location(self) -> str:
        """The folder of its small files."""
        return str(self.small_files)

    @property
    def available(self) -> bool:
        """False: there are no weights."""
        return False

    @property
    def unreachable(self) -> None:
        """None: it lies nowhere else."""

    @property
    def hashes(self) -> Mapping[str, HashedFile]:
        """None."""
        return {}

    def path(self, name: str) -> None:
        """Return None: no weight file is here."""

    def read(self, name: str, start: int, nbytes: int) -> Iterator[bytes]:
        """Refuse to read weights.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{name} of {self.location} is not here. Get the checkpoint.")


def keep(
    store: Store,
    checkpoint: Checkpoint,
    digests: Mapping[str, str],
    small: Mapping[str, bytes],
    *,
    mends: bool = False,
) -> tuple[str, int]:
    """Keep a checkpoint's record, and share it.

    Args:
        store: where.
        checkpoint: the checkpoint.
        digests: of its stored tensors, by key.
        small: the small files that any layout reads, by name.
        mends: see ``share``.

    Returns:
        The record's BLAKE3, and its size in bytes.
    """
    data = _encode(checkpoint, digests, small)
    name = _blake3(data)
    if _kept(store, name) is None:
        _keep(store, name, data, small)
    share(store, name, mends=mends)
    return name, len(data)


def share(store: Store, record: str, *, mends: bool = False) -> None:
    """Have a record that is kept, and its small files, uploaded by and by.

    Args:
        store: where it is kept.
        record: its BLAKE3.
        mends: whether what the remote has is read, and replaced where it is damaged.
    """
    if not store.sharing:
        return
    folder = _folder(store, record)
    data = (folder / "record.json").read_bytes()
    blobs = {record: data}
    for name, (_, blake3) in json.loads(data)["small"].items():
        blobs[blake3] = (folder / "files" / name).read_bytes()
    remote = store.sharing.remote
    for name, blob in blobs.items():
        remote.later(partial(_push, remote, name, blob, mends=mends))


def _push(remote: Remote, name: str, blob: bytes, *, mends: bool) -> None:
    if mends:
        try:
            for _ in remote.fetch(name, len(blob)):
                pass
        except NotFetched:
            pass
        except Mismatch as error:
            remote.report_damage(error)
        else:
            return
    remote.push(name, len(blob), [blob], replace=mends)


def recall(
    store: Store, record: str, nbytes: int, revision: str | None = None
) -> Checkpoint | None:
    """Return a checkpoint by its record, or None if the record is nowhere.

    Args:
        store: where it may be kept, or fetched to from a remote.
        record: its BLAKE3.
        nbytes: its size.
        revision: the commit that the checkpoint was downloaded at, if that is locked.
    """
    data = _kept(store, record)
    if data is None:
        if store.read_only:
            store = replace(store, root=_passing())
        data = _fetched(store, record, nbytes)
    if data is None:
        return None
    source = RecordSource(_folder(store, record) / "files", record, {}, revision)
    return _decode(data, source)


def tensor_digests(store: Store, record: str) -> dict[str, str]:
    """Return the digests of a record's tensors, by key, as far as the record is kept here."""
    data = _kept(store, record)
    return dict(json.loads(data)["digests"]) if data else {}


def _folder(store: Store, record: str) -> Path:
    return store.root / KIND.folder / record


def _encode(
    checkpoint: Checkpoint, digests: Mapping[str, str], small: Mapping[str, bytes]
) -> bytes:
    record = {
        "schema": SCHEMA,
        "names": checkpoint.names,
        "config": checkpoint.config,
        "files": checkpoint.files,
        "stored": checkpoint.stored,  # named tuples: lists in JSON
        "wholes": checkpoint.tensors,
        "notes": list(checkpoint.notes),
        "digests": dict(sorted(digests.items())),
        "small": {name: [len(data), _blake3(data)] for name, data in small.items()},
    }
    # Not sorted: the order of tensors is the checkpoint's own.
    return json.dumps(record, separators=(",", ":")).encode()


def _decode(data: bytes, source: RecordSource) -> Checkpoint:
    record = json.loads(data)
    stored = {
        key: Stored(n, dtype, tuple(shape), file, offset)
        for key, (n, dtype, shape, file, offset) in record["stored"].items()
    }
    tensors = {
        key: LogicalTensor(dtype, tuple(shape), tuple(inputs), tuple(steps))
        for key, (dtype, shape, inputs, steps) in record["wholes"].items()
    }
    return Checkpoint(
        structs.replace(source, digests=record["digests"]),
        record["names"],
        record["config"],
        record["files"],
        stored,
        tensors,
        {},
        tuple(record["notes"]),
    )


def _keep(store: Store, name: str, record: bytes, small: Mapping[str, bytes]) -> None:
    folder = _folder(store, name)
    for file, data in small.items():
        atomic.write(folder / "files" / file, data)
    atomic.write(folder / "record.json", record)  # last: where it is, all is


def _kept(store: Store, name: str) -> bytes | None:
    folder = _folder(store, name)
    try:
        store.touch(folder / "record.json")
        return None if _damage(folder) else (folder / "record.json").read_bytes()
    except FileNotFoundError:
        return None


def _damage(folder: Path) -> str:
    """Return what is wrong with a record that is kept in ``folder``; nothing, if it is whole.

    Raises:
        FileNotFoundError: it is not there.
    """
    record = (folder / "record.json").read_bytes()
    if (actual := _blake3(record)) != folder.name:
        return f"its bytes have BLAKE3 {actual}"
    for file, (_, blake3) in json.loads(record)["small"].items():
        path = folder / "files" / file
        if not path.is_file() or _blake3(path.read_bytes()) != blake3:
            return f"its file {file} is missing, or another"
    return ""


KIND = RecordKind("source", "sources", _damage)


def _fetched(store: Store, name: str, nbytes: int) -> bytes | None:
    if not store.sharing:
        return None
    remote = store.sharing.remote
    try:
        record = b"".join(remote.fetch(name, nbytes))
        small = {
            file: b"".join(remote.fetch(blake3, size))
            for file, (size, blake3) in _small(name, record).items()
        }
    except NotFetched:
        return None
    except Mismatch as error:
        remote.report_damage(error)
        return None
    _keep(store, name, record, small)
    return record


def _small(name: str, data: bytes) -> dict[str, tuple[int, str]]:
    """Return the size and BLAKE3 of each small file of a record, which may be anybody's.

    Raises:
        CheckpointError: it is none, or of another version.
    """
    try:
        content = json.loads(data)
        if (schema := content["schema"]) != SCHEMA:
            raise CheckpointError(
                f"the record {name} is of schema {schema}, this version reads {SCHEMA}: update "
                "mlx-make."
            )
        record = convert(content, _Record)
        if bad := [file for file in record.small if not _is_below(file)]:
            raise ValueError(f"it names {bad[0]!r}, which is no file of a checkpoint's folder")
        for dtype, shape in (
            *((dtype, shape) for _, dtype, shape, _, _ in record.stored.values()),
            *((dtype, shape) for dtype, shape, _, _ in record.wholes.values()),
        ):
            TensorSpec(dtype, checked_shape(shape)).nbytes  # noqa: B018 - for what it raises
    except (ValueError, LookupError, TypeError, RecursionError, ValidationError) as error:
        raise CheckpointError(
            f"the record {name} is no record of a checkpoint ({type(error).__name__}: {error}). "
            "Take models.lock from version control again, and ask who wrote it."
        ) from error
    return record.small


def _is_below(name: str) -> bool:
    """Tell whether a small file's name leads into its folder, or to one of the chat templates."""
    name = name.removeprefix(f"{TEMPLATES_FOLDER}/")
    return name not in ("", ".", "..") and Path(name).name == name


@cache
def _passing() -> Path:
    """Return a folder for what is needed while this process runs."""
    folder = tempfile.TemporaryDirectory(prefix="mlx-make-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _blake3(data: bytes) -> str:
    from blake3 import blake3  # not needed where there is nothing to do

    return str(blake3(data).hexdigest())

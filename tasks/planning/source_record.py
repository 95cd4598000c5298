"""sources: what a build must know of a checkpoint, kept apart from the checkpoint itself.

A *record* holds what its headers and small files say and the digest of each tensor that is used.
So where a checkpoint is not at hand, its plan is, and whatever was built of it before can be used.

```
sources/BLAKE3/record.json   named by its own digest, which models.lock holds
sources/BLAKE3/files/…       the small files
```
"""

from __future__ import annotations

import atexit
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.digest import digest, digest_file, digest_list
from cache.errors import Mismatch, NotFetched
from cache.files import atomic
from cache.store import Store
from tasks.checkpoints.checkpoint import Checkpoint, Stored, Whole, is_pointer
from tasks.checkpoints.loaders import WEIGHTS
from tasks.core.errors import CheckpointError
from tasks.layouts import LAYOUTS
from tasks.planning.plan import Node, Plan, extracting

if TYPE_CHECKING:
    from tasks.execution.builder import Builder

SCHEMA = 1


@dataclass(frozen=True)
class Source:
    """A checkpoint as models.lock has it.

    Attributes:
        files: size in bytes and digest of each file that is used. Of a weight file it is that of
            the table of its tensors, with their digests.
        record: BLAKE3 of the record.
        nbytes: of the record.
        revision: the commit on the hub that the folder was downloaded at, if it says so.
    """

    files: dict[str, list[Any]]
    record: str
    nbytes: int
    revision: str | None = None

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Source:
        """Return what an entry of models.lock says.

        Raises:
            TypeError, ValueError: it is no such entry.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", entry["record"]):
            raise ValueError(f"{entry['record']!r} is no BLAKE3")
        files = {str(name): [int(size), str(told)] for name, (size, told) in entry["files"].items()}
        return cls(**{**entry, "files": files})


def take(builder: Builder, plans: Iterable[Plan]) -> Source:
    """Return the source that ``plans`` have in common, and keep its record.

    Tensors that no action digested yet are digested.

    Raises:
        CheckpointError: a file cannot be read.
    """
    plans = list(plans)
    checkpoint = plans[0].checkpoint
    if checkpoint.record:
        raise ValueError("a recalled checkpoint is what its record says")
    digests = _all_digests(builder, plans)
    small = _small_files(checkpoint)
    record = _to_record(checkpoint, digests, small)
    record_name = _blake3(record)
    if _kept(builder.store, record_name) is None:
        _keep(builder.store, record_name, record, small)
    share(builder.store, record_name)
    found = _files(checkpoint, digests, small)
    return Source(
        dict(sorted(found.items())), record_name, len(record), _revision(checkpoint.folder)
    )


def known_files(checkpoint: Checkpoint, digests: Mapping[str, str]) -> dict[str, list[Any]]:
    """Return what ``Source.files`` says of those files whose tensors' digests are all known."""
    return _files(checkpoint, digests, _small_files(checkpoint))


def _files(
    checkpoint: Checkpoint, digests: Mapping[str, str], small: Mapping[str, bytes]
) -> dict[str, list[Any]]:
    found = {name: [len(data), digest(data)] for name, data in small.items()}
    tables: dict[str, list[tuple[str, Stored]]] = {name: [] for name in checkpoint.stamps}
    for key, stored in checkpoint.stored.items():
        tables[stored.file].append((key, stored))
    for name, table in tables.items():
        if all(key in digests for key, _ in table):
            rows = ([key, stored.dtype, stored.shape, digests[key]] for key, stored in table)
            found[name] = [checkpoint.stamps[name].size, digest_list(rows)]
    return found


def share(store: Store, record: str) -> None:
    """Have a record that is kept, and its small files, uploaded by and by."""
    if not store.sharing:
        return
    folder = _folder(store, record)
    told = (folder / "record.json").read_bytes()
    blobs = {record: told}
    for name, (_, blake3) in json.loads(told)["small"].items():
        blobs[blake3] = (folder / "files" / name).read_bytes()
    remote = store.sharing.remote
    for name, blob in blobs.items():
        remote.later(partial(remote.push, name, len(blob), [blob]))


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights, and is to be read itself."""
    return not all(map(is_pointer, weights(folder)))


def weights(folder: Path) -> Iterator[Path]:
    """Yield the weight files in a folder, Git LFS pointers as well."""
    return (path for pattern in WEIGHTS for path in folder.glob(pattern) if path.is_file())


def strangers(folder: Path, source: Source) -> list[str]:
    """Return the names of a source's small files that are others in a folder."""
    return [
        name
        for name, (size, told) in source.files.items()
        if not any(fnmatch(name, pattern) for pattern in WEIGHTS)
        and (folder / name).is_file()
        and ((folder / name).stat().st_size != size or digest_file(folder / name) != told)
    ]


def recall(store: Store, source: Source) -> Checkpoint | None:
    """Return a checkpoint by its record, or None if the record is nowhere."""
    found = _kept(store, source.record)
    if found is None:
        if store.read_only:
            store = replace(store, root=_passing())
        found = _fetched(store, source)
    if found is None:
        return None
    return _from_record(found, source.record, _folder(store, source.record) / "files")


def digests(store: Store, source: Source) -> dict[str, str]:
    """Return the digests of a source's tensors, by key, as far as its record is kept here."""
    found = _kept(store, source.record)
    return dict(json.loads(found)["digests"]) if found else {}


def _folder(store: Store, record: str) -> Path:
    return store.root / "sources" / record


def _all_digests(builder: Builder, plans: Iterable[Plan]) -> dict[str, str]:
    """Return the digest of each stored tensor, also of those that no target uses."""
    digests: dict[str, str] = {}
    seen = set()
    for plan in plans:
        nodes = plan.stages["extract"]
        for node in [node for node in nodes if node.order.digest not in seen]:
            seen.add(node.order.digest)
            digests |= {key: t.digest for key, t in builder.look(plan, node).tensors.items()}
    if rest := [key for key in plan.checkpoint.stored if key not in digests]:
        node = Node(extracting(plan.checkpoint, "rest", rest), plan.target.name)
        digests |= {key: t.digest for key, t in builder.look(plan, node).tensors.items()}
    return digests


def _small_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return all files that are read besides the weights, by name, whatever the layout."""
    names = {*checkpoint.files, "params.json" if checkpoint.names == "meta" else "config.json"}
    for layout in LAYOUTS.values():
        with suppress(CheckpointError):  # it cannot be built in that layout
            names |= {path.name for path in layout.sources(checkpoint)}
    return {name: (checkpoint.folder / name).read_bytes() for name in sorted(names)}


def _to_record(
    checkpoint: Checkpoint, digests: Mapping[str, str], small: Mapping[str, bytes]
) -> bytes:
    record = {
        "schema": SCHEMA,
        "names": checkpoint.names,
        "config": checkpoint.config,
        "files": checkpoint.files,
        "stored": checkpoint.stored,  # named tuples: lists in JSON
        "wholes": checkpoint.wholes,
        "notes": list(checkpoint.notes),
        "digests": dict(sorted(digests.items())),
        "small": {name: [len(data), _blake3(data)] for name, data in small.items()},
    }
    # Not sorted: the order of tensors is the checkpoint's own.
    return json.dumps(record, separators=(",", ":")).encode()


def _from_record(data: bytes, name: str, folder: Path) -> Checkpoint:
    record = json.loads(data)
    stored = {
        key: Stored(n, dtype, tuple(shape), file, offset)
        for key, (n, dtype, shape, file, offset) in record["stored"].items()
    }
    wholes = {
        key: Whole(dtype, tuple(shape), tuple(inputs), tuple(steps))
        for key, (dtype, shape, inputs, steps) in record["wholes"].items()
    }
    return Checkpoint(
        folder,
        record["names"],
        record["config"],
        record["files"],
        stored,
        wholes,
        {},
        tuple(record["notes"]),
        name,
        record["digests"],
    )


def _keep(store: Store, name: str, record: bytes, small: Mapping[str, bytes]) -> None:
    folder = _folder(store, name)
    for file, data in small.items():
        atomic.write(folder / "files" / file, data)
    atomic.write(folder / "record.json", record)  # last: where it is, all is


def _kept(store: Store, name: str) -> bytes | None:
    folder = _folder(store, name)
    try:
        record = (folder / "record.json").read_bytes()
        store.touch(folder / "record.json")
        if _blake3(record) != name:
            return None
        for file, (_, blake3) in json.loads(record)["small"].items():
            if _blake3((folder / "files" / file).read_bytes()) != blake3:
                return None
    except FileNotFoundError:
        return None
    return record


def _fetched(store: Store, source: Source) -> bytes | None:
    if not store.sharing:
        return None
    remote = store.sharing.remote
    try:
        record = b"".join(remote.fetch(source.record, source.nbytes))
        told = json.loads(record)
        if told["schema"] != SCHEMA:
            raise CheckpointError(
                f"the record {source.record} is of schema {told['schema']}, this version reads "
                f"{SCHEMA}: update mlx-make."
            )
        if odd := [name for name in told["small"] if name == ".." or Path(name).name != name]:
            raise CheckpointError(
                f"the record {source.record} names {odd[0]!r}, which is no file of a checkpoint's "
                "folder. Take models.lock from version control again, and ask who wrote it."
            )
        small = {
            name: b"".join(remote.fetch(blake3, nbytes))
            for name, (nbytes, blake3) in told["small"].items()
        }
    except (NotFetched, Mismatch):
        return None
    _keep(store, source.record, record, small)
    return record


@cache
def _passing() -> Path:
    """Return a folder for what is needed while this process runs."""
    folder = tempfile.TemporaryDirectory(prefix="mlx-make-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _blake3(data: bytes) -> str:
    from blake3 import blake3  # not needed where there is nothing to do

    return str(blake3(data).hexdigest())


def _revision(folder: Path) -> str | None:
    """Return the commit of a folder that huggingface_hub downloaded, by its own bookkeeping."""
    real = folder.resolve()
    if real.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", real.name):
        return real.name
    for path in sorted((folder / ".cache" / "huggingface" / "download").glob("*.metadata")):
        first = path.read_text(errors="replace").partition("\n")[0]
        if re.fullmatch(r"[0-9a-f]{40}", first):
            return first
    return None

"""fill: a built model's folder, filled from blobs: weight files, config.json, tokenizer.

A weight file that the cache has whole is linked. Another one is written where its draft lies in
the cache, and then linked; where it has no draft, in the folder itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cache.blobs import Blobs
from cache.digest import canonical, digest, digest_file
from cache.errors import BlobLost
from cache.files import link, space
from cache.records.manifests import Tensor
from tasks.execution.filling.draft import Drafts, WeightFileDraft
from tasks.execution.resources import cores
from tasks.layouts import weight_file
from tasks.layouts.registry import LAYOUTS
from tasks.layouts.weight_file import Find
from tasks.planning import bundle
from tasks.planning.bundle import Bundle
from tasks.planning.plan import Plan


class PackedFolder(NamedTuple):
    """A folder that was filled.

    Attributes:
        files: as tensors of bytes, by name.
        blake3: of the table of their names and BLAKE3s, if it was wanted.
        written: bytes, without those that were in their place.
    """

    files: dict[str, Tensor]
    blake3: str | None
    written: int


@dataclass(frozen=True)
class Filling:
    """What a folder is filled with.

    Attributes:
        plan: the target.
        bundle: the files.
        folder: the folder, empty.
        blobs: the cache's.
        drafts: weight files that are begun in the cache.
        with_blake3: whether BLAKE3s are wanted.
        known: weight files that an earlier build of the same made, by name.
    """

    plan: Plan
    bundle: Bundle
    folder: Path
    blobs: Blobs
    drafts: Drafts
    with_blake3: bool
    known: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def draft(self) -> WeightFileDraft | None:
        """The files that were begun in the cache, if they are those of the bundle."""
        draft = self.drafts.of(self.plan.target.name)
        return draft if draft and draft.specs_digest == self.bundle.specs_digest else None

    @property
    def need(self) -> int:
        """Bytes that filling will write."""
        draft = self.draft
        if self.is_whole:
            return 0
        return self.bundle.nbytes - (draft.nbytes(self.tensors) if draft else 0)

    @property
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all weight files, by name."""
        return (named for shard in self.bundle.weights.values() for named in shard)

    @property
    def is_whole(self) -> bool:
        """Whether the cache has the weight files whole."""
        return bool(bundle.whole_files(self.blobs, self.bundle, self.known))


def fill(filling: Filling, find: Find, small: Callable[[], Mapping[str, bytes]]) -> PackedFolder:
    """Write the files.

    Args:
        filling: what to write.
        find: waits for a tensor if it must, and returns its digest and where its bytes lie.
        small: returns the other files once the weights are written, whose digests one may tell.

    Raises:
        BlobLost: a tensor's bytes are not those of its digest.
        NoRoom: the disk is full.
    """
    weights, blobs = filling.bundle.weights, filling.blobs
    threads = max(1, cores() // len(weights))
    hashers = _hashers(weights, threads) if filling.with_blake3 else {}
    whole = _whole(filling)
    draft = None if whole else filling.draft
    weight_format = LAYOUTS[filling.plan.target.layout].weight_format
    find = draft.finding(find) if draft else find

    def write(file: str) -> Tensor:
        path = draft.paths[file] if draft else filling.folder / file
        return weight_file.write(
            path, weights[file], weight_format, blobs, find, threads, hashers.get(file)
        )

    with ThreadPoolExecutor(cores()) as pool:
        missing = [file for file in weights if file not in whole]
        new = dict(zip(missing, pool.map(write, missing), strict=True))
    written = sum(tensor.nbytes for tensor in new.values())
    linked = dict(whole)
    if draft:
        written -= draft.nbytes(filling.tensors)
        filling.drafts.end(filling.plan.target.name)  # before anybody may take them for whole
        draft.note_whole(new)
        linked |= draft.paths
    for file, path in linked.items():
        if link.link(path, filling.folder / file):
            written += path.stat().st_size
    files = {file: new[file] if file in new else filling.known[file] for file in weights}
    for name, data in small().items():
        path = filling.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)  # of a file laid over
        path.write_bytes(data)
        files[name] = Tensor("uint8", (len(data),), digest(data))
        written += len(data)
    known = {file: hashers[file].hexdigest() for file in new if file in hashers}
    table = blake3_of(filling.folder, files, known) if filling.with_blake3 else None
    return PackedFolder(files, table, written)


def _hashers(files: Iterable[str], threads: int) -> dict[str, Any]:
    from blake3 import blake3  # which takes as long as the copy

    return {file: blake3(max_threads=threads) for file in files}


def _whole(filling: Filling) -> dict[str, Path]:
    """Return the weight files that the cache has whole.

    Raises:
        BlobLost: one is not what it was.
    """
    paths = bundle.whole_files(filling.blobs, filling.bundle, filling.known)
    for file, path in paths.items():
        wanted = filling.known[file].digest
        if digest_file(path) != wanted:
            filling.blobs.drop_if_wrong(wanted)
            raise BlobLost(wanted, f"{path} has other bytes")
    return paths


def blake3_of(folder: Path, names: Iterable[str], known: Mapping[str, str]) -> str:
    """Return the BLAKE3 of a table of files' names and BLAKE3s, of which some are known."""
    from blake3 import blake3

    def of(path: Path) -> str:
        return str(blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest())

    table = {name: known.get(name) or of(folder / name) for name in names}
    return str(blake3(canonical(table)).hexdigest())


def make_empty(new: Path, need: int) -> None:
    """Make a folder, empty, to be filled with ``need`` bytes.

    Raises:
        NoRoom: the disk cannot take them.
    """
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)  # of a build that was cut off
    space.require_free(new.parent, need)
    new.mkdir()

"""adapter: what was trained on top of a model, as mlx-lm and PEFT save it.

Both have an adapter_config.json. mlx-lm's weights are in adapters.safetensors, by the model's own
names; PEFT's are in adapter_model.safetensors, by the checkpoint's, behind ``base_model.model.``.

All of an adapter is digested to plan with it. One that is on a hub is fetched once for that, held
against the hub's digest, and stays in the cache: a build reads it again and again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from msgspec import Struct

from cache.digest import digest, digest_record
from cache.errors import NoRoom, WrongLength
from cache.fetched import FetchedBlobs
from cache.files import own
from cache.files.stamp import changed_at
from cache.store import Store
from tasks.checkpoints import file_digests
from tasks.checkpoints.folder import FolderSource
from tasks.checkpoints.hub_name import hint
from tasks.checkpoints.small_files import read_json
from tasks.checkpoints.source import ReadableSource
from tasks.checkpoints.stored import Stored
from tasks.core.errors import CheckpointError

CONFIG = "adapter_config.json"
MLX_LM, PEFT = "adapters.safetensors", "adapter_model.safetensors"
DIGESTS = "adapter digests"


class _Weights:
    """The bytes of an adapter's weight file. Safe in threads.

    Args:
        source: where they come from.
        file: its name.
        nbytes: its size.
        store: where they are kept if they are in no file of this machine, also by a plan, which
            keeps little else: else a build would fetch them again. Where it cannot be written,
            they are fetched each time.
    """

    def __init__(self, source: ReadableSource, file: str, nbytes: int, store: Store) -> None:
        self.source, self.file, self.nbytes = source, file, nbytes
        self._store = store
        self._fetching = threading.Lock()
        self._here: Path | None = source.path(file)
        self._keeps = True

    def read(self, start: int, nbytes: int) -> Iterator[bytes]:
        """Yield bytes of the file.

        Raises:
            CheckpointError: they cannot be read.
            NoRoom: the disk is full.
        """
        path = self._fetched()
        if path is None:
            return self.source.read(self.file, start, nbytes)
        return FolderSource(path.parent).read(path.name, start, nbytes)

    def _fetched(self) -> Path | None:
        """Return a file of this machine that has the bytes, once it does; None, none can."""
        with self._fetching:
            if self._here is None and self._keeps:
                try:
                    self._blobs.fetch(self._key, self.nbytes, self._rest)
                except NoRoom:
                    if not self._store.read_only:
                        raise
                    self._keeps = False
                except (OSError, WrongLength) as error:
                    if not isinstance(error, OSError) or error.errno not in own.UNWRITABLE:
                        raise CheckpointError(
                            f"{self.file} of {self.source.location} cannot be fetched: {error}"
                        ) from error
                    self._keeps = False
                else:
                    self._here = Path(self._blobs.part(self._key, self.nbytes).path)
            return self._here

    def _rest(self, start: int) -> Iterator[bytes]:
        return self.source.read(self.file, start, self.nbytes - start)

    def drop(self) -> None:
        """Keep nothing of bytes that were fetched and are others than they should be."""
        if self.source.path(self.file) is None and self._keeps:
            self._blobs.drop(self._key, None)

    @property
    def _blobs(self) -> FetchedBlobs:
        return FetchedBlobs(self._store.blobs)

    @property
    def _key(self) -> str:
        source = self.source
        return digest_record(["adapter", source.location, source.identity, self.file, self.nbytes])

    def digests(self, tensors: Iterable[Stored]) -> dict[str, str]:
        """Return the digests of tensors, by name, of bytes that are those that the hub has.

        Raises:
            CheckpointError: they are others, or cannot be read.
        """
        known = self.source.hashes.get(self.file)
        kind, _, expected = (known.digest if known else "").partition(":")
        state = file_digests.state(kind, self.nbytes) if expected else None
        found = dict(_digests(self.read(0, self.nbytes), tensors, state))
        if state and state.hexdigest() != expected:
            self.drop()
            raise CheckpointError(
                f"{self.file} of adapter {self.source.location} is not the file that it has at "
                f"commit {self.source.revision}: {kind} is {state.hexdigest()}, and is said to be "
                f"{expected}. Run it again; if a mirror is between, try without it (HF_ENDPOINT)."
            )
        return found


class Adapter(Struct, frozen=True):
    """An adapter, of which the headers are read and all bytes digested.

    Attributes:
        source: where its bytes come from.
        file: its weight file's name, which tells whose it is.
        config: what adapter_config.json says.
        tensors: by name.
        digests: of the tensors' bytes, by name.
        weights: the bytes of the file.
        forget: has nothing be remembered of the digests, nor kept of the bytes.
    """

    source: ReadableSource
    file: str
    config: dict[str, Any]
    tensors: Mapping[str, Stored]
    digests: Mapping[str, str]
    weights: _Weights
    forget: Callable[[], None]

    def read(self, name: str) -> bytes:
        """Return a tensor's bytes.

        Raises:
            CheckpointError: they are others than when the build was planned.
            NoRoom: they are to be fetched, and the disk is full.
        """
        tensor = self.tensors[name]
        data = b"".join(map(bytes, self.weights.read(tensor.offset, tensor.nbytes)))
        if digest(data) != self.digests[name]:
            self.forget()
            raise CheckpointError(
                f"{self.source.location}: {name} is another than when the build was planned. Run "
                "it again."
            )
        return data


def read(source: ReadableSource, store: Store, named: str) -> Adapter:
    """Read an adapter.

    Args:
        source: where it is.
        named: what models.toml calls it.
        store: where what it holds is remembered, and kept if it is on a hub.

    Raises:
        CheckpointError: it is none, or damaged.
        NoRoom: it is to be fetched, and the disk is full.
    """
    folder = source.small_files
    if not folder.exists():
        raise CheckpointError(
            f"adapter {source.location} does not exist. Name the adapter's folder{hint(named)}."
        )
    if not source.has(CONFIG):
        raise CheckpointError(
            f"adapter {source.location} has no {CONFIG}. Name the folder that mlx_lm.lora or peft "
            "saved the adapter to."
        )
    file = next((name for name in (MLX_LM, PEFT) if source.has(name)), None)
    if file is None:
        raise CheckpointError(
            f"adapter {source.location} has neither {MLX_LM} (mlx-lm) nor {PEFT} (peft). If it has "
            "adapter_model.bin, save it anew as safetensors: "
            "PeftModel.save_pretrained(…, safe_serialization=True)."
        )
    config = read_json(folder / CONFIG, "it describes the adapter")
    ((stamp, stored),) = source.headers([file], store.memos).values()
    tensors = {tensor.name: tensor for tensor in stored}
    weights = _Weights(source, file, stamp.size, store)
    path = source.path(file)
    question = [source.location, source.identity, file, [*stamp], path and changed_at(path)]
    digests: dict[str, str] | None = store.memos.get(DIGESTS, question, dict[str, str])
    if digests is None or digests.keys() != tensors.keys():
        digests = weights.digests(stored)
        store.memos.put(DIGESTS, question, digests)

    def forget() -> None:
        store.memos.forget(DIGESTS, question)
        weights.drop()

    return Adapter(source, file, config, tensors, digests, weights, forget)


def _digests(
    pieces: Iterable[bytes], tensors: Iterable[Stored], whole: hashlib._Hash | None
) -> Iterator[tuple[str, str]]:
    """Yield the digest of each tensor of a file as its bytes pass; ``whole`` takes in them all."""
    order = sorted(tensors, key=lambda tensor: tensor.offset)
    states = [xxhash.xxh3_128() for _ in order]
    first, at = 0, 0
    for piece in pieces:
        if whole:
            whole.update(piece)
        end = at + len(piece)
        for number in range(first, len(order)):
            tensor = order[number]
            if tensor.offset >= end:
                break
            begin = max(tensor.offset, at)
            stop = min(tensor.offset + tensor.nbytes, end)
            states[number].update(memoryview(piece)[begin - at : stop - at])
            if stop < end:
                first = number + 1
        at = end
    for tensor, state in zip(order, states, strict=True):
        yield tensor.name, state.hexdigest()

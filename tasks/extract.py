"""extract: a layer's tensors, digested where they lie in the checkpoint.

Nothing is copied, but for tensors that only torch can read: those of files older than torch 1.6,
and views that are not row-major.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import files
from cache.blobs import Part
from cache.digest import digest_parts
from cache.errors import BlobLost
from cache.manifests import Tensor
from tasks.checkpoint import TORCH, load_with_torch
from tasks.errors import CheckpointError

if TYPE_CHECKING:
    from tasks.build import Builder
    from tasks.plan import Node, Plan

VERSION = 1
_TORCH = threading.Lock()
_torch_file: dict[
    tuple[Path, files.Stamp], dict[str, Any]
] = {}  # the last file that torch read, under the lock


def make(builder: Builder, plan: Plan, node: Node, *, look: bool = False) -> dict[str, Tensor]:
    """Digest a layer's stored tensors.

    Args:
        builder: gives the store.
        plan: the target.
        node: the layer.
        look: read them even if files of these stamps were digested before.

    Raises:
        CheckpointError: a file cannot be read, or changes meanwhile.
    """
    blobs = builder.store.blobs
    known = None if look else builder.store.memos.get("extracts", node.order.look)
    tensors: dict[str, Tensor] = {}
    for index, (key, (dtype, shape)) in enumerate(node.params["tensors"].items()):
        path, stored = plan.stored(key)
        if known and blobs.has(known[index], stored.nbytes):
            tensors[key] = Tensor(dtype, tuple(shape), known[index])
            continue
        try:
            stamp = plan.checkpoint.stamps[stored.file]
            if stored.offset == TORCH:
                with blobs.writing(stored.nbytes) as writer:
                    writer.write(_with_torch(path, stamp, stored.name))
                found = writer.digest
            else:
                part = Part(str(path), stored.offset, stored.nbytes, stamp)
                found = digest_parts(blobs.chunks([part]))
                blobs.refer(found, [part])
            if files.Stamp.of(path) != stamp:
                raise CheckpointError(
                    f"{path} changed while it was read. Run doit again when it is whole."
                )
        except (OSError, BlobLost) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        tensors[key] = Tensor(dtype, tuple(shape), found)
    digests = [tensor.digest for tensor in tensors.values()]
    if digests != known:
        builder.store.memos.put("extracts", node.order.look, digests)
    return tensors


def _with_torch(path: Path, stamp: files.Stamp, name: str) -> memoryview:
    import torch

    with _TORCH:
        if (path, stamp) not in _torch_file:
            _torch_file.clear()  # one file's tensors at a time fit in memory
            _torch_file[path, stamp] = load_with_torch(path)
        tensor = _torch_file[path, stamp][name]
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())

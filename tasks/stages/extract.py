"""extract: a layer's tensors, digested where they lie in the checkpoint.

Nothing is copied, but for tensors that only torch can read: those of files older than torch 1.6,
and views that are not row-major.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cache.digest import digest_parts
from cache.errors import FileChanged
from cache.files.stamp import Stamp
from cache.records.manifests import Tensor
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.stored import TORCH, Stored
from tasks.checkpoints.torch_file import load_with_torch
from tasks.core.errors import CheckpointError

if TYPE_CHECKING:
    from tasks.execution.builder import Builder
    from tasks.planning.plan import Node, Plan

VERSION = 1


def make(builder: Builder, plan: Plan, node: Node, *, look: bool = False) -> dict[str, Tensor]:
    """Digest a layer's stored tensors.

    Args:
        builder: gives the store.
        plan: the target.
        node: the layer.
        look: read them even if files of these stamps were digested before.

    Raises:
        CheckpointError: a file cannot be read.
        FileChanged: a file changes meanwhile.
    """
    checkpoint = plan.checkpoint
    if not checkpoint.source.available:
        return _recalled(plan, node, look=look)
    blobs = builder.store.blobs
    known = None if look else _remembered(builder, node)
    tensors: dict[str, Tensor] = {}
    for index, (key, (dtype, shape)) in enumerate(node.params["tensors"].items()):
        stored = checkpoint.stored[key]
        if known and blobs.has(known[index], stored.nbytes):
            tensors[key] = Tensor(dtype, tuple(shape), known[index])
            continue
        try:
            if stored.offset == TORCH:
                found = _with_torch(builder, plan, stored.file)[stored.name]
            elif part := checkpoint.part(key):
                found = digest_parts(blobs.chunks([part]))
                blobs.refer(found, [part])
            else:
                found = _copied(builder, checkpoint, stored)
        except OSError as error:
            path = checkpoint.source.path(stored.file) or stored.file
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        tensors[key] = Tensor(dtype, tuple(shape), found)
    digests = [tensor.digest for tensor in tensors.values()]
    if digests != known:
        builder.store.memos.put("extracts", [VERSION, node.order.look], digests)
    return tensors


def _recalled(plan: Plan, node: Node, *, look: bool) -> dict[str, Tensor]:
    """Return a layer's tensors of a checkpoint that is not here."""
    told = node.params["tensors"]
    digests = plan.checkpoint.source.digests
    if look or not told.keys() <= digests.keys():
        raise CheckpointError(
            f"{plan.target.source} is not here whole, and {node.order.layer} must be made of it: "
            f"what was made of {', '.join(list(told)[:3])}, … before is neither in the cache nor "
            "in a remote. Get the checkpoint."
        )
    return {key: Tensor(dtype, tuple(shape), digests[key]) for key, (dtype, shape) in told.items()}


def look(node: Node) -> Any:
    """Return what tells whether to look at the checkpoint again: folder, and stamps of files.

    Of a checkpoint that is not here, its record.
    """
    found = node.order.look
    return found if isinstance(found, str) else found[:2]


def known(builder: Builder, plan: Plan, node: Node) -> dict[str, Tensor] | None:
    """Return a layer's tensors without reading them, if such files were read before."""
    if not plan.checkpoint.source.available:
        return _recalled(plan, node, look=False)
    digests = _remembered(builder, node)
    if digests is None:
        return None
    told = node.params["tensors"].items()
    return {
        key: Tensor(dtype, tuple(shape), digest)
        for (key, (dtype, shape)), digest in zip(told, digests, strict=True)
    }


def _remembered(builder: Builder, node: Node) -> list[str] | None:
    """Return the digests of a layer's tensors, if files of these stamps were digested before."""
    return builder.store.memos.get("extracts", [VERSION, node.order.look], list[str])


def memory(checkpoint: Checkpoint, told: Iterable[str]) -> int:
    """Return how many bytes are held at once: a file that torch must read is read whole."""
    stored = [checkpoint.stored[key] for key in told]
    if not checkpoint.source.available:
        return 0
    return max((checkpoint.stamps[s.file].size for s in stored if s.offset == TORCH), default=0)


def _copied(builder: Builder, checkpoint: Checkpoint, stored: Stored) -> str:
    """Return the digest of a tensor that is in no file of this machine, kept as a blob."""
    with builder.store.blobs.writing(stored.nbytes) as writer:
        for data in checkpoint.source.read(stored.file, stored.offset, stored.nbytes):
            writer.write(memoryview(data))
    return writer.digest


def _with_torch(builder: Builder, plan: Plan, file: str) -> dict[str, str]:
    """Return the digests of a file's tensors that only torch can read, kept as blobs.

    All of them at once, since torch reads such a file as a whole.
    """
    import torch

    path, stamp = plan.checkpoint.source.path(file), plan.checkpoint.stamps[file]
    if path is None:
        raise CheckpointError(
            f"{file} of {plan.target.source} can only be read by torch, and that as a file of this "
            "machine. Get the checkpoint as safetensors, or into a folder."
        )
    with builder.torch_lock:
        if (path, stamp) not in builder.torch_digests:
            loaded = load_with_torch(path)
            if Stamp.of(path) != stamp:
                raise FileChanged(str(path))
            digests = {}
            for stored in plan.checkpoint.stored.values():
                if (stored.file, stored.offset) == (file, TORCH):
                    flat = loaded[stored.name].contiguous().reshape(-1)
                    with builder.store.blobs.writing(stored.nbytes) as writer:
                        writer.write(memoryview(flat.view(torch.uint8).numpy()))
                    digests[stored.name] = writer.digest
            builder.torch_digests[path, stamp] = digests
        return builder.torch_digests[path, stamp]

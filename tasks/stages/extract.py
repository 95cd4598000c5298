"""extract: a layer's tensors, digested where they lie in the checkpoint.

Nothing is copied, but for tensors that only torch can read: those of files older than torch 1.6,
and views that are not row-major. What lies in no file of this machine is fetched, once: where its
digest is remembered, only when somebody reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cache.blobs import Part
from cache.errors import FileChanged
from cache.files.stamp import Stamp
from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.stored import TORCH
from tasks.checkpoints.torch_file import load_with_torch
from tasks.core import pytorch
from tasks.core.errors import CheckpointError
from tasks.stages.reasons import Reason, changed_values, tensor_changes
from tasks.stages.stage import (
    ActionSpec,
    Context,
    Keep,
    Key,
    LeafStage,
    Origin,
    Output,
    Params,
    Planned,
    TargetModel,
)  # fmt: skip
from tasks.tensors.rows import IN_FLIGHT_BYTES

KIND = "extracts"  # of memos: digests, by the fingerprint of what was read


class StoredSpec(msgspec.Struct, frozen=True, array_like=True):
    """A stored tensor's dtype and shape."""

    dtype: str
    shape: tuple[int, ...]


class ExtractParams(Params, frozen=True):
    """What is extracted.

    Attributes:
        tensors: the stored tensors, by key.
    """

    tensors: dict[str, StoredSpec]


class Extract(LeafStage[ExtractParams]):
    """Find and digest each layer's tensors in the checkpoint."""

    name = "extract"
    version = 1
    keep = Keep.ALWAYS  # as references
    params = ExtractParams

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ExtractParams]]:
        """Plan the stored tensors that the model uses, by layer."""
        return {
            layer: self.planned(target.checkpoint, keys)
            for layer, keys in target.stored_layers.items()
        }

    def planned(self, checkpoint: Checkpoint, keys: Sequence[str]) -> Planned[ExtractParams]:
        """Plan to extract stored tensors."""
        stored = {key: checkpoint.stored[key] for key in keys}
        specs = {key: StoredSpec(s.dtype, s.shape) for key, s in stored.items()}
        return Planned(ExtractParams(specs), fingerprint=checkpoint.fingerprint(keys))

    def outputs(self, params: ExtractParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return the stored tensors, where they lie."""
        return {
            key: Output(TensorSpec(stored.dtype, stored.shape), Origin.REFERENCE)
            for key, stored in params.tensors.items()
        }

    def scan(
        self, spec: ActionSpec[ExtractParams], context: Context, *, reread: bool
    ) -> dict[str, Tensor]:
        """Digest a layer's stored tensors.

        Raises:
            CheckpointError: a file cannot be read.
            FileChanged: a file changes meanwhile.
        """
        checkpoint, blobs = context.checkpoint, context.blobs
        if not checkpoint.source.available:
            return _recalled(spec, context, reread=reread)
        remembered = self._remembered(spec, context)
        known = None if reread else remembered
        fetched = self._fetched(spec, context, remembered, reread=reread)
        found = dict(fetched)
        for index, key in enumerate(spec.params.tensors):
            if (
                known
                and key not in found
                and blobs.has(known[index], checkpoint.stored[key].nbytes)
            ):
                found[key] = known[index]
        found |= _digested(context, [key for key in spec.params.tensors if key not in found])
        tensors = {
            key: Tensor(wanted.dtype, wanted.shape, found[key])
            for key, wanted in spec.params.tensors.items()
        }
        digests = [tensor.digest for tensor in tensors.values()]
        if digests != remembered:
            context.memos.put(KIND, [self.version, spec.fingerprint], digests)
        return tensors

    def _fetched(
        self,
        spec: ActionSpec[ExtractParams],
        context: Context,
        remembered: list[str] | None,
        *,
        reread: bool,
    ) -> dict[str, str]:
        """Return the digests of the tensors whose bytes come from elsewhere, by key.

        Only those are fetched of which no digest is remembered, or, to ``reread``, no bytes are
        here: what has these stamps there is what it was.
        """
        stored = context.checkpoint.stored
        keys = [key for key in spec.params.tensors if key in context.checkpoint.fetched]
        known = dict(zip(spec.params.tensors, remembered or (), strict=bool(remembered)))
        wanted = {
            key: None
            for key in keys
            if key not in known
            or (reread and not context.blobs.has(known[key], stored[key].nbytes))
        }
        here = {key: known[key] for key in keys if key not in wanted}
        return here | context.fetch([*wanted], here, reread=reread)

    def recall(self, spec: ActionSpec[ExtractParams], context: Context) -> dict[str, Tensor] | None:
        """Return a layer's tensors without reading them, if such files were read before."""
        if not context.checkpoint.source.available:
            return _recalled(spec, context, reread=False)
        digests = self._remembered(spec, context)
        if digests is None:
            return None
        return {
            key: Tensor(stored.dtype, stored.shape, digest)
            for (key, stored), digest in zip(spec.params.tensors.items(), digests, strict=True)
        }

    def forget(self, spec: ActionSpec[ExtractParams], context: Context) -> None:
        """Forget the digests of a layer's tensors."""
        context.memos.forget(KIND, [self.version, spec.fingerprint])

    def note(
        self,
        spec: ActionSpec[ExtractParams],
        context: Context,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Remember the digests of a layer's tensors, and where they lie, if that is here."""
        checkpoint = context.checkpoint
        if not checkpoint.source.available:
            return
        for key, tensor in tensors.items():
            if checkpoint.stored[key].offset != TORCH and (part := checkpoint.part(key)):
                context.blobs.refer(tensor.digest, [part])
        digests = [tensors[key].digest for key in spec.params.tensors]
        context.memos.put(KIND, [self.version, spec.fingerprint], digests)

    def _remembered(self, spec: ActionSpec[ExtractParams], context: Context) -> list[str] | None:
        """Return the digests of a layer's tensors, if files of these stamps were digested."""
        wanted = spec.params.tensors
        digests = context.memos.get(KIND, [self.version, spec.fingerprint], list[str])
        if digests and len(digests) == len(wanted):
            return digests
        checkpoint = context.checkpoint
        if any(checkpoint.source.path(checkpoint.stored[key].file) for key in wanted):
            return None  # a file of this machine need not be what it is locked as
        known = checkpoint.source.digests  # of a commit that models.lock pins
        return [known[key] for key in wanted] if wanted.keys() <= known.keys() else None

    def watched(self, spec: ActionSpec[ExtractParams]) -> Any:
        """Return folder, and stamps of files; of a checkpoint that is not here, its record."""
        fingerprint = spec.fingerprint
        return fingerprint if isinstance(fingerprint, str) else fingerprint[:2]

    def explain_watched(self, old: Any, new: Any) -> list[Reason]:
        """Return which of the checkpoint's files changed."""
        if old is None:  # by another version
            return []
        if isinstance(new, str):
            return [Reason("the checkpoint is not here: its record is used")]
        if isinstance(old, str):
            return [Reason("the checkpoint is here again")]
        before, after = ({name: stamp for name, *stamp in each[1]} for each in (old, new))
        facts = [
            f"checkpoint file {name} {'changed' if name in before else 'is new'}"
            for name in after
            if before.get(name) != after[name]
        ]
        facts += [
            f"checkpoint file {name} is not used any more" for name in before if name not in after
        ]
        if old[0] != new[0]:
            facts = [f"the checkpoint lies in {new[0]}, not in {old[0]}"]
        return [Reason(fact) for fact in facts or ["its tensors are others, or lie elsewhere"]]

    def memory(self, params: ExtractParams, checkpoint: Checkpoint) -> int:
        """Return the size of the largest file that torch must read whole."""
        if not checkpoint.source.available:
            return IN_FLIGHT_BYTES
        stored = [checkpoint.stored[key] for key in params.tensors]
        files = {each.file for each in stored if each.offset == TORCH}
        return max((checkpoint.stamps[file].size for file in files), default=0) + IN_FLIGHT_BYTES

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare stored tensors by key."""
        changed = tensor_changes(old.get("tensors") or {}, new.get("tensors") or {})
        return changed + changed_values(old, new, but=("tensors",))


def _digested(context: Context, keys: Sequence[str]) -> dict[str, str]:
    """Return the digests of stored tensors of files of this machine, by key; the cache has them.

    Raises:
        CheckpointError: a file cannot be read.
        FileChanged: a file changes meanwhile.
    """
    checkpoint, blobs = context.checkpoint, context.blobs
    digests: dict[str, str] = {}
    parts: dict[str, Part] = {}
    key = ""
    try:
        for key in keys:
            stored = checkpoint.stored[key]
            if stored.offset == TORCH:
                digests[key] = _with_torch(context, stored.file)[stored.name]
            else:
                part = checkpoint.part(key)
                assert part is not None  # else it is fetched
                parts[key] = part
        each = blobs.digest_each(parts.values())
        for key, part in parts.items():
            digests[key] = next(each)
            blobs.refer(digests[key], [part])
    except OSError as error:
        file = checkpoint.stored[key].file
        raise CheckpointError(
            f"{checkpoint.source.path(file) or file} cannot be read: {error}"
        ) from error
    return digests


def _recalled(
    spec: ActionSpec[ExtractParams], context: Context, *, reread: bool
) -> dict[str, Tensor]:
    """Return a layer's tensors of a checkpoint that is not here."""
    wanted = spec.params.tensors
    digests = context.checkpoint.source.digests
    if reread or not wanted.keys() <= digests.keys():
        raise CheckpointError(
            f"{context.target.source} is not here whole, and {spec.layer} must be made of it: "
            f"what was made of {', '.join(list(wanted)[:3])}, … before is neither in the cache nor "
            "in a remote. Get the checkpoint."
        )
    return {key: Tensor(s.dtype, s.shape, digests[key]) for key, s in wanted.items()}


def _with_torch(context: Context, file: str) -> dict[str, str]:
    """Return the digests of a file's tensors that only torch can read, kept as blobs.

    All of them at once, since torch reads such a file as a whole.
    """
    path, stamp = context.checkpoint.source.path(file), context.checkpoint.stamps[file]
    if path is None:
        raise CheckpointError(
            f"{file} of {context.target.source} can only be read by torch, and that as a file of "
            "this machine. Get the checkpoint as safetensors, or into a folder."
        )

    def digests() -> dict[str, str]:
        loaded = load_with_torch(path)
        uint8 = pytorch.module().uint8
        if Stamp.of(path).is_changed(stamp):
            raise FileChanged(str(path))
        digest_of = {}
        for stored in context.checkpoint.stored.values():
            if (stored.file, stored.offset) == (file, TORCH):
                flat = loaded[stored.name].detach().contiguous().reshape(-1)
                with context.blobs.writing(stored.nbytes) as writer:
                    writer.write(memoryview(flat.view(uint8).numpy()))
                digest_of[stored.name] = writer.digest
        return digest_of

    return context.once((path, stamp), digests)

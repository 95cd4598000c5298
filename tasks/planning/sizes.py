"""sizes: the bytes that an action will read and write, known before it runs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tasks.checkpoints.checkpoint import Checkpoint
from tasks.planning.node import Known, Node, total
from tasks.planning.plan import Plan
from tasks.stages import registry
from tasks.stages.stage import Keep, Key, Origin, Stage

LEAVES = registry.leaves()


@dataclass(frozen=True)
class Traffic:
    """Bytes.

    Attributes:
        read: from the checkpoint and the cache.
        written: into the cache, or into build/.
        fetched: from the remote, or from where the checkpoint is, into the cache.
    """

    read: int = 0
    written: int = 0
    fetched: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.read + other.read, self.written + other.written, self.fetched + other.fetched
        )


def keeps(stage: Stage, keep: Collection[str]) -> bool:  # type: ignore[type-arg]
    """Tell whether the cache keeps what a stage makes, given models.toml's ``[cache] keep``."""
    return stage.keep is Keep.ALWAYS or stage.name in keep


def kept(plan: Plan, keep: Collection[str] | None) -> frozenset[str]:
    """Return the stages whose results are kept of a target, given models.toml's ``keep``.

    Where its bytes come from elsewhere and pass, as on a disk that is smaller than it, what is made
    of them on the way passes, too. By default, nothing is kept that is larger than the checkpoint's
    tensors that it is made of, and can be made again.

    Args:
        plan: the target.
        keep: what models.toml says; None, nothing.
    """
    if passes(plan.checkpoint, keep):
        return frozenset()
    return frozenset(keep) if keep is not None else registry.KEPT - plan.growth.keys()


def passes(checkpoint: Checkpoint, keep: Collection[str] | None) -> bool:
    """Tell whether a checkpoint's bytes come from elsewhere, and are dropped once they are used."""
    return bool(checkpoint.fetched) and LEAVES.isdisjoint(keep or ())


def reads(node: Node, keep: Collection[str], known: Known | None = None) -> set[Key]:
    """Return the inputs whose bytes a node's action asks for.

    A kept stage has what it passes on copied, where the stage before did not keep it.

    Args:
        node: the node.
        keep: the stages whose results are kept.
        known: what nodes make that were asked before.
    """
    kept = keeps(node.stage, keep)
    late = {need.stage.name for need in node.needs if need.stage.keep is not Keep.ALWAYS}
    return {
        key
        for output in node.outputs(known).values()
        for key in output.inputs
        if output.origin is not Origin.PASSED_ON or (kept and key.stage in late)
    }


def traffic(
    node: Node, keep: Collection[str], checkpoint: Checkpoint, known: Known | None = None
) -> Traffic:
    """Return the bytes that a node's action reads and writes, if nothing of it is there yet.

    ``known`` as of ``reads``.
    """
    known = {} if known is None else known
    outputs = node.outputs(known)
    if node.is_leaf:
        fetched = [name for name in outputs if name in checkpoint.fetched]
        here = [name for name in outputs if name not in checkpoint.fetched]
        copied = [name for name in here if checkpoint.must_copy(name)]
        return Traffic(
            *(total(outputs[n].spec for n in names) for names in (here, copied, fetched))
        )
    kept = keeps(node.stage, keep)
    written = {Origin.STORED, Origin.VIEW} if kept else {Origin.STORED}
    moves = passes(checkpoint, keep) and node.stage.name == registry.PIPELINE[-1].name
    new = [o for o in outputs.values() if moves or o.origin is not Origin.PASSED_ON]
    written |= {Origin.PASSED_ON}  # of these, what is moved to its place in a weight file
    work = {key for output in new for key in output.inputs}
    specs = node.input_specs(known)
    makers = {(need.stage.name, n): need for need in node.needs for n in need.outputs(known)}
    late = [
        key
        for key in reads(node, keep, known) - work
        if not _in_cache(makers[key], key.name, keep, known)
    ]
    copied_bytes = total(specs[key] for key in late)
    return Traffic(
        total(specs[key] for key in work) + copied_bytes,
        total(output.spec for output in new if output.origin in written) + copied_bytes,
    )


def total_traffic(plan: Plan, keep: Collection[str]) -> Traffic:
    """Return that of all nodes of a target."""
    nodes = [node for stage in plan.stages.values() for node in stage]
    return sum((traffic(node, keep, plan.checkpoint) for node in nodes), Traffic())


def _in_cache(node: Node, name: str, keep: Collection[str], known: Known) -> bool:
    """Tell whether a tensor's bytes are in the cache once the node's action ran."""
    if keeps(node.stage, keep):
        return True
    output = node.outputs(known)[name]
    if output.origin is not Origin.PASSED_ON:
        return output.origin is not Origin.VIEW
    (key,) = output.inputs
    makers = (
        need
        for need in node.needs
        if need.stage.name == key.stage and key.name in need.outputs(known)
    )
    return _in_cache(next(makers), key.name, keep, known)

"""exchange: all results of targets to a remote store, or from there, whatever runs or not.

The cache's lock is held for one result at a time, as by a task: a transfer may take hours, and who
collects garbage would wait for it, and builds for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cache.records.actions import Hit
from cache.records.manifests import Manifest
from cache.remote.sharing import Sharing
from tasks.checkpoints import record
from tasks.execution import accept
from tasks.execution.builder import Builder
from tasks.execution.resources import cores
from tasks.planning.node import Node
from tasks.planning.plan import Plan


@dataclass(frozen=True)
class Exchanged:
    """How many of the targets' results were exchanged.

    Attributes:
        results: manifests, with what they name.
        missing: those that were not there to be exchanged.
    """

    results: int
    missing: int


def push(builder: Builder, sharing: Sharing, plans: Iterable[Plan]) -> Exchanged:
    """Upload all that is built of ``plans`` and that the remote does not have.

    What is not there, or goes away meanwhile, is left out.
    """
    plans = list(plans)
    by_source: dict[str, list[Plan]] = {}
    for plan in plans:
        by_source.setdefault(plan.target.source_name, []).append(plan)
    for same in by_source.values():
        source = same[0].checkpoint.source
        if source.available or source.identity is None:
            accept.snapshot(builder, same)  # shares it
        else:
            record.share(builder.store, source.identity)

    def push_one(of: tuple[Node, Manifest]) -> bool:
        node, manifest = of
        with builder.store.lock.using():
            return sharing.push_now(manifest, builder.shared(node), ask_first=True)

    built = list(_built(builder, plans))
    pool = ThreadPoolExecutor(cores())
    try:
        done = list(pool.map(push_one, built))
    finally:  # who is interrupted does not wait
        pool.shutdown(wait=False, cancel_futures=True)
    packed = 0
    for plan in plans:
        manifest = Manifest.at(builder.packed_path(plan.target.name))
        packed += manifest is not None and sharing.push_now(manifest, None)
    there = [node for (node, _), pushed in zip(built, done, strict=True) if pushed]
    return Exchanged(len(there) + packed, _missing(plans, there) + len(plans) - packed)


def pull(builder: Builder, sharing: Sharing, plans: Iterable[Plan]) -> Exchanged:
    """Fetch all that the remote has of ``plans``, so that it can be built without it."""
    plans = list(plans)
    there = []
    for plan in plans:
        manifests: dict[Node, Manifest] = {}
        for node in (*plan.leaves, *_shared(plan)):
            with builder.store.lock.using():
                manifest = _pulled(builder, plan, node, manifests)
                if manifest is None:
                    continue
                manifests[node] = manifest
                if node.is_leaf:
                    continue
                there.append(node)
                if builder.shared(node):
                    sharing.fetch_all([(manifest.action.key, t) for t in manifest.tensors.values()])
    return Exchanged(len(there), _missing(plans, there))


def _shared(plan: Plan) -> list[Node]:
    """Return a target's nodes whose results are shared: those of leaves are not."""
    nodes = [node for stage in plan.stages.values() for node in stage if not node.is_leaf]
    return [*nodes, *plan.measuring]


def _missing(plans: Iterable[Plan], there: Iterable[Node]) -> int:
    """Return how many results that models are made of are not there; measures are for reports."""
    wanted = {node for plan in plans for node in _shared(plan) if node not in plan.measuring}
    return len(wanted.difference(there))


def _built(builder: Builder, plans: Iterable[Plan]) -> Iterator[tuple[Node, Manifest]]:
    for plan in plans:
        for node in _shared(plan):
            if manifest := Manifest.at(builder.manifest_path(node)):
                yield node, manifest


def _pulled(
    builder: Builder, plan: Plan, node: Node, manifests: dict[Node, Manifest]
) -> Manifest | None:
    """Return what a node made, here or elsewhere, without making anything but what leaves find."""
    if node.is_leaf:
        return builder.scan(plan, node)
    if not all(need in manifests for need in node.needs):
        return None
    inputs = node.inputs({need: manifests[need] for need in node.needs})
    hit, _ = builder.find(node.action(inputs), node.output_specs())
    return hit.manifest if isinstance(hit, Hit) else None

"""exchange: pushes all results of targets to a remote store, or pulls them, without a build.

The cache's lock is held for one result at a time, as by a task: a transfer may take hours, for
which garbage collection would wait, and builds for that.
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
        missing: how many were not there to be exchanged.
    """

    results: int
    missing: int


def push(builder: Builder, sharing: Sharing, plans: Iterable[Plan]) -> Exchanged:
    """Upload all that is built of ``plans`` and that the remote does not have.

    What is not there, or is removed meanwhile, is left out and counted as missing.
    """
    plans = list(plans)
    by_source: dict[str, list[Plan]] = {}
    for plan in plans:
        by_source.setdefault(plan.target.source_name, []).append(plan)
    for same in by_source.values():
        source = same[0].checkpoint.source
        if source.available or source.identity is None:
            accept.snapshot(builder, same, mends=True)
        else:
            record.share(builder.store, source.identity, mends=True)

    def push_one(of: tuple[Plan, Node, Manifest]) -> bool:
        plan, node, manifest = of
        with builder.store.lock.using():
            return sharing.push_now(manifest, builder.shared(plan, node), ask_first=True)

    built = list(_built(builder, plans))
    pool = ThreadPoolExecutor(cores())
    try:
        done = list(pool.map(push_one, built))
    finally:  # an interrupt does not wait
        pool.shutdown(wait=False, cancel_futures=True)
    packed = 0
    for plan in plans:
        manifest = Manifest.at(builder.workspace.packed(plan.target.name))
        if manifest is not None and sharing.push_now(manifest, None):
            packed += 1
            builder.push_list(plan, manifest)
    present = [node for (_, node, _), pushed in zip(built, done, strict=True) if pushed]
    return Exchanged(len(present) + packed, _missing(plans, present) + len(plans) - packed)


def pull(builder: Builder, sharing: Sharing, plans: Iterable[Plan]) -> Exchanged:
    """Fetch all that the remote has of ``plans``, so that it can be built without it."""
    plans = list(plans)
    present = []
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
                present.append(node)
                if builder.shared(plan, node):
                    sharing.fetch_all([(manifest.action.key, t) for t in manifest.tensors.values()])
    return Exchanged(len(present), _missing(plans, present))


def _shared(plan: Plan) -> list[Node]:
    """Return a target's nodes whose results are shared: those of leaves are not."""
    nodes = [node for stage in plan.stages.values() for node in stage if not node.is_leaf]
    return [*nodes, *plan.measuring]


def _missing(plans: Iterable[Plan], present: Iterable[Node]) -> int:
    """Return how many results that models are made of are not present; measures do not count."""
    wanted = {node for plan in plans for node in _shared(plan) if node not in plan.measuring}
    return len(wanted.difference(present))


def _built(builder: Builder, plans: Iterable[Plan]) -> Iterator[tuple[Plan, Node, Manifest]]:
    for plan in plans:
        for node in _shared(plan):
            if manifest := Manifest.at(node.manifest_path(builder.workspace)):
                yield plan, node, manifest


def _pulled(
    builder: Builder, plan: Plan, node: Node, manifests: dict[Node, Manifest]
) -> Manifest | None:
    """Return what a node made, on record here or in the remote. Only leaves are run."""
    if node.is_leaf:
        return builder.scan(plan, node)
    if not all(need in manifests for need in node.needs):
        return None
    inputs = node.inputs({need: manifests[need] for need in node.needs})
    hit, _ = builder.find(plan, node.action(inputs), node.output_specs())
    return hit.manifest if isinstance(hit, Hit) else None

"""disk: what a run may have on the disk at once, where what it reads comes from elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

from cache.files.space import existing
from cache.records.manifests import TensorSpec
from tasks.core.errors import ConfigError
from tasks.core.program import COMMAND
from tasks.core.text import size
from tasks.execution.builder import Builder
from tasks.planning.node import Node, total
from tasks.planning.plan import Plan
from tasks.stages.stage import Origin

MARGIN_BYTES = 256 << 20  # of a disk that is left free: records, and what others write meanwhile


class DiskNeed(Struct, frozen=True):
    """What a run may have on the disk, and what of it is for the layers that are fetched.

    Attributes:
        limit: what may lie there at once.
        is_set: whether models.toml says so; else it is what is free.
        there: what lies there already, and stays: nothing, of what is free.
        written: what the run adds, and stays.
        largest: what has to be here together of what is fetched, at most.
        keeps: whether what is fetched stays; it is a part of ``written`` then.
    """

    limit: int
    is_set: bool
    there: int
    written: int
    largest: int
    keeps: bool

    @property
    def room(self) -> int:
        """What is left for layers."""
        return self.limit - self.there - self.written

    def check(self) -> None:
        """Refuse to begin what cannot be finished.

        Raises:
            ConfigError: there is no room for the largest layer.
        """
        if self.room >= self.largest:
            return
        need = self.there + self.written + self.largest
        limit = f"[build] disk is {size(self.limit)}" if self.is_set else (
            f"{size(self.limit)} of the disk are free, but for a margin"
        )  # fmt: skip
        facts = [f"{size(self.there)} lie in the cache and in build/ already"] * bool(self.there)
        facts.append(f"{size(self.written)} will be added to them")
        facts.append(f"the largest layer takes {size(self.largest)}")
        mends = ["build fewer targets at a time"]
        if self.is_set:
            mends = [f'set disk = "{-(-need // 10**6)}MB"', *mends]
        if self.keeps:
            mends.append("take extract out of [cache] keep")
        raise ConfigError(
            f"{limit}, and {', '.join(facts)}: {size(need)}. Make room ({COMMAND} cache gc), "
            f"{' or '.join(mends)}."
        )


def need_of(
    builder: Builder,
    nodes: Iterable[tuple[Plan, Node]],
    limit: int | None,
    *,
    packs: Iterable[str],
    adopted: int,
) -> DiskNeed:
    """Return what a run needs of the disk.

    Args:
        builder: has the cache.
        nodes: those that the run looks into, of the targets that are fetched.
        limit: what models.toml says, if it does.
        packs: names of the targets that it packs.
        adopted: bytes that a build left that was killed, and that this one goes on with.
    """
    nodes, packs = list(nodes), set(packs)
    plans = {plan.target.name: plan for plan, _ in nodes}
    root, build = builder.store.root, builder.workspace.built("")
    written = sum(_written(builder, plan, packs=name in packs) for name, plan in plans.items())
    beside = ((p, node) for p, node in nodes if node.stage.name not in p.stages)
    written += sum(total(_stored(n)) for p, n in beside if not builder.is_on_record(p, n))
    keeps = not builder.streaming.drops
    if keeps:
        written += max(0, builder.streaming.nbytes - adopted)
    there = 0
    if limit is None:
        limit = max(0, shutil.disk_usage(existing(root)).free + adopted - MARGIN_BYTES)
        is_set = False
    else:
        is_set, there = True, max(0, _used(root, build) - adopted)
    largest = 0 if keeps else builder.streaming.largest
    return DiskNeed(limit, is_set, there, written, largest, keeps)


def _written(builder: Builder, plan: Plan, *, packs: bool) -> int:
    """Return the bytes of a target that are to be written, and stay."""
    nodes = [node for stage in plan.stages.values() for node in stage]
    new = [node for node in nodes if not builder.is_on_record(plan, node)]
    stored = sum(total(_stored(node)) for node in new if node not in plan.packed)
    last = [node for node in new if node in plan.packed]
    if not last:
        return stored
    if not packs:
        return stored + sum(total(node.new_specs().values()) for node in last)
    output = sum(total(node.output_specs().values()) for node in plan.last)
    return stored + max(0, output - builder.drafts.left_of(plan))


def _stored(node: Node) -> list[TensorSpec]:
    return [o.spec for o in node.outputs().values() if o.origin is Origin.STORED]


def _used(*folders: Path) -> int:
    """Return the bytes of the disk that folders take; a file with two names counts once."""
    files: dict[tuple[int, int], int] = {}
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                try:
                    info = os.lstat(os.path.join(root, name))
                except FileNotFoundError:
                    continue
                files[info.st_dev, info.st_ino] = info.st_blocks * 512
    return sum(files.values())

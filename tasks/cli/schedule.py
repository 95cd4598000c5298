"""schedule: the order of tasks whose checkpoint comes from elsewhere, layer by layer.

All targets of one checkpoint take a layer's bytes while they are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.cli.doit_adapter import with_needs
from tasks.cli.failures import as_invalid_dodo_file
from tasks.execution.builder import Builder
from tasks.execution.disk import DiskNeed, need_of
from tasks.planning.node import Node
from tasks.planning.plan import Plan


@dataclass(frozen=True)
class StreamingSchedule:
    """Arranges a run's tasks for what it fetches: see ``doit_adapter.Schedule``.

    Attributes:
        builder: runs the tasks.
        disk: what models.toml says that may lie on the disk at once, if it does.
        packs: tells whether a target is packed.
    """

    builder: Builder
    disk: int | None
    packs: Callable[[str], bool]
    _positions: dict[str, int] = field(default_factory=dict)

    def need(self, nodes: Sequence[tuple[Plan, Node]], *, adopted: int = 0) -> DiskNeed:
        """Return what tasks need of the disk, once the streaming has them arranged."""
        fetched = [(plan, node) for plan, node in nodes if plan.checkpoint.fetched]
        packs = {p.target.name for p, _ in fetched if self.packs(p.target.name)}
        return need_of(self.builder, fetched, self.disk, packs=packs, adopted=adopted)

    def arrange(self, tasks: Mapping[str, Any], selected: list[str]) -> list[str]:
        """Return the tasks of layers that are fetched, in their order, and then those selected.

        Of targets that read the same layer one fetches it: the others begin when it is there, lest
        threads wait for each other. What a crew fetches, it is asked for at once.

        Raises:
            InvalidDodoFile: the disk is too small.
        """
        streaming = self.builder.streaming
        metas = [tasks[name].meta or {} for name in with_needs(tasks, selected)]
        nodes = [(meta["plan"], meta["node"]) for meta in metas if "node" in meta]
        streaming.arrange(nodes)
        with as_invalid_dodo_file():
            for plan, node in nodes:
                if node.is_leaf and (known := self.builder.recall(plan, node)):
                    digests = {key: tensor.digest for key, tensor in known.tensors.items()}
                    streaming.note(plan.checkpoint, digests)
            recorded = {n.name for plan, n in nodes if self.builder.is_on_record(plan, n)}
            need = self.need(nodes, adopted=streaming.begin(recorded))
            need.check()
        streaming.set_limit(need.room)
        first: dict[str, str] = {}
        plans = {node: plan for plan, node in nodes}
        crew = self.builder.crew
        for node in streaming.order:
            if node.is_leaf and not (crew and crew.takes(plans[node], node)):
                fetches = first.setdefault(node.spec.digest, node.name)
                if fetches != node.name:
                    tasks[node.name].task_dep.append(fetches)
        order = [node.name for node in streaming.order]
        self._positions.update({name: position for position, name in enumerate(order)})
        return [*order, *selected]

    def choose(self, ready: Sequence[str]) -> int:
        """Return which one of tasks that are ready is run: of the first layer, else the last."""
        positions = self._positions
        return min(
            range(len(ready)), key=lambda at: (positions.get(ready[at], len(positions)), -at)
        )

    def finished(self, task: str) -> None:
        """Take note that a task ended, or needs not to begin."""
        self.builder.streaming.finished(task)

    def stop(self) -> None:
        """Take note that no more tasks begin."""
        self.builder.streaming.stop()

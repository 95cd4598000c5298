"""look: whether a target is up to date, by a look at each of its tasks, of which none is made.

doit would make them all, and then find by the same look at its database that there is nothing to
do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cache.digest import digest_record
from tasks.cli.doit_adapter import is_up_to_date
from tasks.cli.failures import MENDABLE
from tasks.cli.up_to_date import NOT_LEFT, UpToDateCheck, is_unchanged
from tasks.core.task_names import PACK, task_name
from tasks.core.workspace import Workspace
from tasks.execution.filling import place
from tasks.layouts.registry import LAYOUTS
from tasks.planning import bundle
from tasks.planning.lockfile import Lock
from tasks.planning.node import Node
from tasks.planning.plan import Plan
from tasks.stages import reasons
from tasks.stages.reasons import Reason
from tasks.stages.stage import LeafStage


@dataclass(frozen=True)
class Look:
    """What a task is held against, and doit's database, which has how it was left.

    Attributes:
        workspace: where things lie beside models.toml.
        lock: models.lock.
        database: doit's dependency manager.
    """

    workspace: Workspace
    lock: Lock
    database: Any

    def finds_nothing_to_do(self, plan: Plan) -> bool:
        """Tell whether all of a target is up to date; nothing that was looked at stays in memory.

        What cannot be looked at is not: who makes its tasks tells.
        """
        name = plan.target.name
        try:
            return (
                self.finds_layers_up_to_date(plan.stages)
                and self.workspace.packed(name).exists()
                and is_up_to_date(
                    self.database,
                    task_name(PACK, name),
                    {*self.packed_of(plan)},
                    self.pack_check(plan, bundle.params(plan)),
                )
            )
        except MENDABLE:
            return False
        finally:
            self.database.backend.let_go(name)

    def finds_layers_up_to_date(self, stages: dict[str, list[Node]]) -> bool:
        """Tell whether all nodes of a target's stages are; it may be to be packed."""
        return all(
            is_up_to_date(self.database, node.name, {*self.made_of(node)}, self.layer_check(node))
            for nodes in reversed(stages.values())  # most settings change the last
            for node in nodes
        )

    def made_of(self, node: Node) -> list[str]:
        """Return the paths of the files that a layer's task reads."""
        return [need.manifest_path(self.workspace) for need in node.needs]

    def packed_of(self, plan: Plan) -> list[str]:
        """Return the paths of the files that a target's packing reads."""
        return [
            *(node.manifest_path(self.workspace) for node in plan.last),
            *(str(path) for path in LAYOUTS[plan.target.layout].sources(plan.checkpoint)),
        ]

    def layer_check(self, node: Node) -> UpToDateCheck:
        """Return what tells whether a layer is up to date by more than the files it reads."""
        path = node.manifest_path(self.workspace)

        def changed_outputs(values: Mapping[str, Any]) -> list[Reason]:
            # A build that was cut off changes manifests before doit's database, which then speaks
            # of older ones.
            if is_unchanged(path, values.get("left")):
                return []
            return [Reason(f"its manifest {NOT_LEFT}", (path,))]  # a name: one fact for all layers

        def changed_params(values: Mapping[str, Any]) -> list[Reason]:
            if not isinstance(node.stage, LeafStage):
                return []  # the manifest that is there tells more
            return node.stage.explain_watched(values.get("look"), node.stage.watched(node.spec))

        return UpToDateCheck(node.spec.digest, path, changed_outputs, changed_params)

    def pack_check(self, plan: Plan, params: Mapping[str, Any]) -> UpToDateCheck:
        """Return what tells whether a target is packed by more than the files that it reads.

        Args:
            plan: the target.
            params: of its packing, see ``bundle.params``.
        """
        return UpToDateCheck(
            digest_record(params),
            str(self.workspace.built(plan.target.name)),
            lambda values: self._changed_folder(plan, values),
            lambda values: reasons.of_packing(values.get("parts"), params),
        )

    def _changed_folder(self, plan: Plan, values: Mapping[str, Any]) -> list[Reason]:
        """Say how a target's folder and its lines in models.lock are not as they were left."""
        folder = str(self.workspace.built(plan.target.name))
        if not place.intact(
            folder, values.get("outputs") or {}, LAYOUTS[plan.target.layout].loaded
        ):
            return [Reason(f"{folder} {NOT_LEFT}")]
        if self.lock.state(plan) != values.get("locked", ""):
            return [Reason(f"{self.lock.path.name} has another source or result than it built")]
        return []

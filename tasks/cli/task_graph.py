"""graph: doit's tasks from plans: one for each stage and layer, and one that packs a target."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from doit.globals import Globals

from cache.digest import digest_file, digest_record
from cache.files.stamp import Stamp
from cache.records.manifests import Action, Manifest
from tasks.cli import invocation
from tasks.cli.up_to_date import KNOWN, NOT_LEFT, Told, as_left, reported
from tasks.core.workspace import BUILD
from tasks.execution import pack
from tasks.execution.builder import Builder
from tasks.execution.early import Early
from tasks.layouts import LAYOUTS, weight_suffixes
from tasks.planning import bundle
from tasks.planning.lockfile import Built, Lock
from tasks.planning.plan import Node, Plan
from tasks.stages import extract, reasons
from tasks.stages.reasons import Reason


@dataclass(frozen=True)
class Graph:
    """All targets of one models.toml.

    Attributes:
        folder: where models.toml lies; all state and output lie beside it.
        builder: runs the tasks.
        plans: by target.
        lock: models.lock.
        early: packs behind the tasks.
    """

    folder: Path
    builder: Builder
    plans: dict[str, Plan]
    lock: Lock
    early: Early = field(default_factory=Early)

    @cached_property
    def up_to_date(self) -> frozenset[str]:
        """The targets of a lean run whose layers are all up to date.

        They are packed, or not even that. doit would make a task of each of their layers, and then
        find by the same look at its database that there is nothing to do.
        """
        if not invocation.lean:
            return frozenset()
        return frozenset(
            target
            for target, found in self.plans.items()
            if all(
                self._is_up_to_date(node)
                for nodes in reversed(found.stages.values())  # most settings change the last
                for node in nodes
            )
        )

    def stage(self, stage: str) -> Iterator[dict[str, Any]]:
        """Yield a stage's tasks: one a layer, and a group a target."""
        plans = [found for name, found in self.plans.items() if name not in self.up_to_date]
        for found in plans:
            for node in found.nodes(stage):
                yield self._layer_task(found, node)
        groups = [f"{stage}:{found.target.name}" for found in plans if found.nodes(stage)]
        yield {"basename": stage, "actions": None, "task_dep": groups, "meta": {"graph": self}}

    def pack(self) -> Iterator[dict[str, Any]]:
        """Yield the tasks that write the built models' folders."""
        for target, found in self.plans.items():
            yield self._pack_task(target, found)

    def accept(self) -> Iterator[dict[str, Any]]:
        """Yield the tasks that lock the sources as they are now."""
        for target, found in self.plans.items():

            def act(found: Plan = found) -> Any:
                plans = self.plans.values()
                return reported(lambda: self.lock.accept(self.builder, found, plans), {})

            yield {"basename": "lock", "name": target, "actions": [act], "io": {"capture": False}}

    def _is_up_to_date(self, node: Node) -> bool:
        """Ask doit's database whether a layer's task is up to date."""
        database = Globals.dep_manager
        needs = {self.builder.manifest_path(need) for need in node.needs}
        task = SimpleNamespace(name=node.name, file_dep=needs, targets=(), uptodate=KNOWN)
        told = self._layer_told(node)  # which looks for the target, too
        return (
            not database.status_is_ignore(task)
            and told(task, database.get_values(node.name))
            and database.get_status(task, {}).status == "up-to-date"
        )

    def _layer_told(self, node: Node) -> Told:
        path = self.builder.manifest_path(node)

        def odd(values: Mapping[str, Any]) -> list[Reason]:
            # A build that was cut off changes manifests before doit's database, which then speaks
            # of older ones.
            if as_left(path, values.get("left")):
                return []
            return [Reason(f"its manifest {NOT_LEFT}", (path,))]  # a name: one fact for all layers

        def differs(values: Mapping[str, Any]) -> list[Reason]:
            if node.stage != "extract":
                return []  # the manifest that is there tells more
            return reasons.of_files(values.get("look"), extract.look(node))

        return Told(node.order.digest, path, odd, differs)

    def _layer_task(self, found: Plan, node: Node) -> dict[str, Any]:
        told = self._layer_told(node)
        path = told.made

        def build(why: str) -> dict[str, Any]:
            made: dict[str, Any] = {}
            with self.builder.store.lock.using():
                manifest = self.builder.run(found, node, why)
            if node.stage == "extract":
                made["look"] = extract.look(node)
                self.lock.check_layer(self.builder.store, found, manifest.tensors)
            if node.stage == "quantize" and _packs(node.target):
                with_blake3 = self.lock.wants_blake3(self.builder, found)
                self.early.layer(
                    self.builder, found, self._folder(found), manifest, with_blake3=with_blake3
                )
            return {**made, "left": [*Stamp.of(path), digest_file(Path(path))]}

        return {
            "basename": f"{node.stage}:{node.target}",
            "name": node.order.layer,
            "actions": [told.action(build)],
            "file_dep": [self.builder.manifest_path(need) for need in node.needs],
            "targets": [path],
            "uptodate": [told],
            "clean": True,
            "io": {"capture": False},
            "meta": {"plan": found, "node": node, "told": told},
        }

    def _pack_task(self, target: str, found: Plan) -> dict[str, Any]:
        folder = self._folder(found)
        manifest_path = self.builder.packed_path(target)
        last = found.stages["quantize"]
        waits_for = [] if target in self.up_to_date else _large_first(found)
        layout = LAYOUTS[found.target.layout]
        parts = bundle.told(found)
        told = Told(
            digest_record(parts),
            str(folder),
            lambda values: self._not_packed(found, values),
            lambda values: reasons.of_parts(values.get("parts"), parts),
        )

        def build(why: str) -> dict[str, Any]:
            plans = self.plans.values()
            built: list[Built] = []
            notes: list[str] = []  # of this lock, not of the result, which others may share

            def check(action: Action) -> None:
                notes.extend(self.lock.check_target(self.builder, found, source, action))

            def accept(made: Manifest, blake3: str | None) -> None:
                now, more = self.lock.check_output(found, source, made, blake3)
                built.append(now)
                notes.extend(more)

            builder, drafts = self.builder, self.builder.drafts
            with (
                builder.store.lock.using(),
                drafts.ending(target),
                self.early.taken(target) as begun,
            ):
                source = self.lock.check_source(builder, found, plans)
                made = pack.run(
                    builder, found, folder, manifest_path, why, check, accept, begun,
                    with_blake3=self.lock.wants_blake3(builder, found),
                )  # fmt: skip
            self.lock.update(found, source, built[-1], plans)
            bits = sum(
                tensor.nbytes for name, tensor in made.tensors.items()
                if name.endswith(weight_suffixes())
            ) * 8 / found.weights  # fmt: skip
            return {
                "parts": parts,
                "outputs": pack.stamps(str(folder), list(made.tensors)),
                "size": sum(tensor.nbytes for tensor in made.tensors.values()),
                "bits_per_weight": bits,
                "notes": [*made.notes, *notes],
                "locked": self.lock.state(found),
            }

        return {
            "basename": "pack",
            "name": target,
            "actions": [told.action(build)],
            "file_dep": [
                *(self.builder.manifest_path(node) for node in last),
                *(str(path) for path in layout.sources(found.checkpoint)),
            ],
            # In reverse: doit is made to run the newest ready task first.
            "task_dep": [node.name for node in reversed(waits_for)],
            "targets": [str(manifest_path)],
            "uptodate": [told],
            "clean": [(_remove, [folder, manifest_path])],
            "io": {"capture": False},
            "meta": {"plan": found, "told": told},
        }

    def _folder(self, found: Plan) -> Path:
        return self.folder / BUILD / found.target.name

    def _not_packed(self, found: Plan, values: Mapping[str, Any]) -> list[Reason]:
        """Say how a target's folder and its lines in models.lock are not as they were left."""
        folder = str(self._folder(found))
        if not pack.intact(folder, values.get("outputs") or {}):
            return [Reason(f"{folder} {NOT_LEFT}")]
        if self.lock.state(found) != values.get("locked", ""):
            return [Reason(f"{self.lock.path.name} has another source or result than it built")]
        return []


def _large_first(found: Plan) -> list[Node]:
    """Return the last nodes of a target's layers in the order in which packing has them made.

    A head that is begun last ends last, while the other threads have nothing to do. The others
    keep their order, which is that of the weight files that are begun behind them.
    """
    return sorted(
        found.stages["quantize"], key=lambda node: node.order.layer not in found.outline.large
    )


def _packs(target: str) -> bool:
    """Tell whether a run means to pack a target."""
    told = (f"pack:{target}", f"report:{target}")  # which shows what is packed
    return not invocation.asked or any(map(invocation.names, told))


def _remove(folder: Path, manifest_path: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    manifest_path.unlink(missing_ok=True)

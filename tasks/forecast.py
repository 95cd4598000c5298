"""forecast: what a run would do, and why, worked out without doing it.

It goes through the layers in the order of the stages with the manifests that are there, as doit
does, and where a result is on record (in the action cache, in the remote) with that. What is
made of a result that nobody knows yet is not certain: it may come out as it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.actions import Hit
from cache.digest import digest_record
from cache.log import Entry
from cache.manifests import Action, Manifest, ManifestError, Tensor
from tasks import extract, pack, reasons
from tasks.build import Builder, Needed, threads
from tasks.plan import Node, Plan

UP_TO_DATE, RUN, REUSE, FETCH = "up to date", "run", "reuse", "fetch"
UNKNOWN = "what it reads is not known before it is made"


@dataclass(frozen=True)
class Saved:
    """What doit's database has of a task.

    Attributes:
        values: what the task returned.
        intact: whether what it made is as it left it.
        told: whether it is told what it was told then.
        inputs: digests of the manifests that it read, by path.
    """

    values: Mapping[str, Any]
    intact: bool
    told: bool
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Step:
    """One task of the run to come.

    Attributes:
        task: its name.
        target: its target.
        stage: its stage.
        layer: its layer; of pack, none.
        state: ``up to date``, ``run``, ``reuse`` (from the action cache), ``fetch``.
        why: reasons, none if it is up to date.
        certain: whether no result that is not known yet could change it.
        reads: bytes.
        writes: bytes.
    """

    task: str
    target: str
    stage: str
    layer: str
    state: str
    why: tuple[str, ...] = ()
    certain: bool = True
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True)
class _Result:
    """What a node is expected to have made.

    Attributes:
        symbol: the same for two nodes that will have made the same.
        manifest: if it is known.
    """

    symbol: str
    manifest: Manifest | None


class Forecast:
    """Works out a run's steps."""

    def __init__(self, builder: Builder, saved: Callable[[str], Saved]) -> None:
        """Begin with nothing looked at.

        Args:
            builder: gives the cache; nothing is written through it.
            saved: what doit's database has of a task.
        """
        self._builder = builder
        self._saved = saved
        self._results: dict[Node, _Result] = {}
        self._steps: dict[Node, Step] = {}
        self._running: dict[str, str] = {}  # the task that will make what others reuse, by symbol

    def step(self, plan: Plan, node: Node) -> Step:
        """Return what will become of a layer's task."""
        if node not in self._steps:
            for need in node.needs:
                self.step(plan, need)
            self._steps[node], self._results[node] = self._work_out(plan, node)
        return self._steps[node]

    def pack(self, plan: Plan, changed_files: Iterable[str]) -> Step:
        """Return what will become of a target's packing.

        Args:
            plan: the target.
            changed_files: the checkpoint's small files that are not as they were.
        """
        name = f"pack:{plan.target.name}"
        saved = self._saved(name)
        why, certain, size = [], True, 0
        for node in plan.stages["quantize"]:
            self.step(plan, node)
            result = self._results[node].manifest
            before = saved.inputs.get(self._builder.manifest_path(node))
            size += sum(_made_bytes(plan, node).values())
            if result is None:
                certain &= not (saved.told and saved.intact)
            if result is None or result.result != before:
                why.append(node.order.layer)
        reasons_found = []
        if not saved.values:
            reasons_found.append("never built here")
        elif not saved.told:
            reasons_found += reasons.of_parts(saved.values.get("parts"), pack.told(plan))
        elif not saved.intact:
            reasons_found.append(f"build/{plan.target.name} or models.lock is not as it was left")
        if saved.values:
            reasons_found += [f"{Path(path).name} changed" for path in changed_files]
        if why and saved.values:
            reasons_found.append(f"contents of {reasons.some(why)}")
        if not reasons_found:
            return Step(name, plan.target.name, "pack", "", UP_TO_DATE)
        certain |= bool(reasons_found[:-1]) or not why
        return Step(
            name, plan.target.name, "pack", "", RUN, tuple(reasons_found), certain, size, size
        )

    def _work_out(self, plan: Plan, node: Node) -> tuple[Step, _Result]:
        saved = self._saved(node.name)
        path = self._builder.manifest_path(node)
        old = _read(path)
        needs = [self._results[need] for need in node.needs]
        known = [need.manifest for need in needs]
        fresh = saved.told and saved.intact and old is not None
        if fresh and all(
            manifest is not None
            and manifest.result == saved.inputs.get(self._builder.manifest_path(need))
            for need, manifest in zip(node.needs, known, strict=True)
        ):
            assert old is not None
            return self._told(node, UP_TO_DATE), _Result(old.result, old)
        if node.stage == "extract":
            return self._extract(plan, node, saved, old)
        symbol = digest_record(
            [node.stage, node.order.version, node.params, [need.symbol for need in needs]]
        )
        why = self._why(saved, old, path)
        if None in known:
            if not why:
                why = [UNKNOWN]
            state = REUSE if symbol in self._running else RUN
            self._running.setdefault(symbol, node.name)
            step = self._told(node, state, why, certain=not fresh, plan=plan)
            return step, _Result(symbol, None)
        needed = _needed(node, dict(zip(node.needs, known, strict=True)))
        action = self._builder.action(node, needed)
        if old is not None:
            why = why or reasons.between(old.action, action)
        why = why or ["its record is gone"]
        found, how = self._recorded(action)
        if found:
            return self._told(node, how, why, plan=plan), _Result(found.result, found)
        if action.key in self._running:
            return self._told(node, REUSE, why, plan=plan), _Result(action.key, None)
        self._running[action.key] = node.name
        return self._told(node, RUN, why, plan=plan), _Result(action.key, None)

    def _extract(
        self, plan: Plan, node: Node, saved: Saved, old: Manifest | None
    ) -> tuple[Step, _Result]:
        why = self._why(saved, old, self._builder.manifest_path(node))
        if not why:
            why = reasons.of_files(saved.values.get("look"), extract.look(node))
        tensors = extract.known(self._builder, plan, node)
        if tensors is None:
            symbol = digest_record([node.order.digest])
            state = REUSE if symbol in self._running else RUN
            self._running.setdefault(symbol, node.name)
            return self._told(node, state, why, plan=plan), _Result(symbol, None)
        made = {name: (node, tensor) for name, tensor in tensors.items()}
        manifest = Manifest(self._builder.action(node, made), tensors)
        found = isinstance(self._builder.store.actions.get(manifest.action), Hit)
        symbol = manifest.action.key
        state = REUSE if found or plan.checkpoint.record or symbol in self._running else RUN
        self._running.setdefault(symbol, node.name)
        return self._told(node, state, why, plan=plan), _Result(manifest.result, manifest)

    def _why(self, saved: Saved, old: Manifest | None, path: str) -> list[str]:
        if not saved.values:
            return ["never built here"]
        if saved.told and not saved.intact:
            return [f"{path} is not as it was left"]
        if saved.told and old is None:
            return ["its manifest is missing"]
        return []

    def _recorded(self, action: Action) -> tuple[Manifest | None, str]:
        found = self._builder.store.actions.get(action)
        if isinstance(found, Hit):
            return found.manifest, REUSE
        sharing = self._builder.store.sharing
        manifest = sharing.read(action.key) if sharing else None
        if manifest is not None and manifest.action == action:
            return manifest, FETCH
        return None, RUN

    def _told(
        self,
        node: Node,
        state: str,
        why: Iterable[str] = (),
        *,
        certain: bool = True,
        plan: Plan | None = None,
    ) -> Step:
        reads = writes = 0
        if state == RUN and plan:
            reads, writes = _bytes(self._builder, plan, node)
        return Step(
            node.name, node.target, node.stage, node.order.layer, state, tuple(why), certain,
            reads, writes,
        )  # fmt: skip


def estimate(steps: Iterable[Step], log: Iterable[Entry]) -> float | None:
    """Return how many seconds steps will take, by earlier ones; None if too little is known.

    Layers run in threads at once, packing comes after.
    """
    rates: dict[str, list[float]] = {}
    for entry in log:
        moved = entry.bytes_read + entry.bytes_written
        if entry.outcome == "computed" and moved > 1 << 20:
            rates.setdefault(entry.task.partition(":")[0], []).append(entry.seconds / moved)
    layers = last = 0.0
    for step in steps:
        moved = step.reads + step.writes
        if step.state != RUN or moved <= 1 << 20:
            continue
        if step.stage not in rates:
            return None
        seconds = moved * statistics.median(rates[step.stage])
        if step.stage == "pack":
            last += seconds
        else:
            layers += seconds
    return layers / threads() + last


def _needed(node: Node, found: Mapping[Node, Manifest | None]) -> Needed:
    return {
        name: (need, tensor)
        for need, manifest in found.items()
        if manifest is not None
        for name, tensor in manifest.tensors.items()
        if node.order.reads is None or name in node.order.reads
    }


def _read(path: str) -> Manifest | None:
    try:
        return Manifest.from_bytes(Path(path).read_bytes())
    except (FileNotFoundError, ManifestError):
        return None


def _bytes(builder: Builder, plan: Plan, node: Node) -> tuple[int, int]:
    """Return how many bytes a node's action reads, and writes."""
    if node.stage == "extract":
        return sum(plan.stored(key)[1].nbytes for key in node.params["tensors"]), 0
    unsharded = _unsharded(node)
    whole = {name: Tensor(t[0], t[1], "").nbytes for name, t in unsharded.items()}
    if node.stage == "unshard":
        joined = sum(size for name, size in whole.items() if unsharded[name][3])
        return joined, joined if builder.keeps("unshard") else 0
    made = _made_bytes(plan, node)
    if node.stage == "cast":
        changed = sum(made[name] for name in node.params["dtypes"])
        return sum(whole[name] for name in node.params["dtypes"]), (
            changed if builder.keeps("cast") else 0
        )
    casted = _made_bytes(plan, node.needs[0])
    settings = node.params["settings"]
    return sum(casted[name] for name in settings), sum(made[name] for name in settings)


def _unsharded(node: Node) -> dict[str, Any]:
    while node.stage != "unshard":
        node = node.needs[0]
    return dict(node.params["tensors"])


def _made_bytes(plan: Plan, node: Node) -> dict[str, int]:
    """Return the size of what cast or quantize makes of each of a layer's tensors."""
    dtypes: Mapping[str, str] = {}
    settings: Mapping[str, Any] = {}
    at = node
    while at.stage != "unshard":
        dtypes = at.params.get("dtypes", dtypes)
        settings = at.params.get("settings", settings)
        at = at.needs[0]
    sizes = {}
    for name, (dtype, shape, _, _) in at.params["tensors"].items():
        dtype = dtypes.get(name, dtype)
        size = Tensor(dtype, shape, "").nbytes
        if name in settings:
            group_size, bits, mode = settings[name]
            count = Tensor("uint8", shape, "").nbytes
            scale = 2 * Tensor(dtype, (1,), "").nbytes if mode == "affine" else 1
            size = count * bits // 8 + count // group_size * scale
        sizes[name] = size
    return sizes

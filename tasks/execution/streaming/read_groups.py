"""read_groups: which copies must be here together, since the same tasks read them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.execution.streaming.copies import Copies, Copy
from tasks.planning.node import Node
from tasks.planning.plan import Plan
from tasks.stages.stage import Keep

Reads = Mapping[Node, dict[str, Copy]]  # the copies that each node may read, by their names


@dataclass(eq=False)
class Group:
    """Copies that are wanted together.

    Attributes:
        copies: by their names.
        tasks: names of those that may read them, and are not done.
        held: names of the copies that room is reserved for.
        left: names of the copies that this run is to drop.
        before: groups that are to have room first: their tasks make what these need.
        stays: whether some of its tasks need what later groups become.
        entering: held by the task that reserves it.
    """

    copies: dict[str, Copy] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    before: list[Group] = field(default_factory=list)
    stays: bool = False
    entering: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """The size of its copies."""
        return sum(copy.nbytes for copy in self.copies.values())

    @property
    def has_room(self) -> bool:
        """Whether room is reserved for it, or needs to be no more."""
        return not self.tasks or self.copies.keys() <= self.held


def reads(nodes: Iterable[tuple[Plan, Node]], copies: Copies) -> Reads:
    """Return what nodes may read, themselves or by what they need, of those that read anything.

    What a stage made that is always kept is read where that is.
    """
    known: dict[Node, dict[str, Copy]] = {}

    def of(plan: Plan, node: Node) -> dict[str, Copy]:
        if node not in known:
            if node.is_leaf:
                fetched = [key for key in node.outputs() if key in plan.checkpoint.fetched]
                read = [copies.of(plan.checkpoint, key) for key in fetched]
                known[node] = {copy.name: copy for copy in read}
            else:
                through = [n for n in node.needs if n.is_leaf or n.stage.keep is not Keep.ALWAYS]
                known[node] = {
                    name: copy for need in through for name, copy in of(plan, need).items()
                }
        return known[node]

    return {node: read for plan, node in nodes if (read := of(plan, node))}


def groups(reads: Reads) -> dict[Node, Group]:
    """Return the group of each node, in order: of nodes that read the same copy, it is one.

    Groups come in the order in which models run, where nodes run any; else in which their bytes lie
    in files.
    """
    group_of: dict[str, Group] = {}  # by the names of copies
    for copies in reads.values():
        overlapping = {id(group): group for name in copies if (group := group_of.get(name))}
        joined = max(overlapping.values(), key=lambda group: len(group.copies), default=Group())
        for group in overlapping.values():
            joined.copies |= group.copies
        joined.copies |= copies
        group_of |= dict.fromkeys(joined.copies, joined)
    by_node = {node: group_of[next(iter(copies))] for node, copies in reads.items()}
    order = _order(by_node)
    latest: dict[Node, int] = {}  # of the groups that a node and what it needs are of
    for node in needs_first(by_node):
        own = order[by_node[node]] if node in by_node else 0
        latest[node] = max(own, *(latest[need] for need in node.needs), 0)
    for node, group in by_node.items():
        group.stays |= latest[node] > order[group]
    return {node: by_node[node] for node in sorted(by_node, key=latest.__getitem__)}


def _order(by_node: Mapping[Node, Group]) -> dict[Group, int]:
    """Return groups with their numbers; each knows those that are to have room before it."""
    first: dict[Group, int] = {}
    for node, depth in _depths(by_node).items():
        if group := by_node.get(node):
            first[group] = min(first.get(group, depth), depth)

    def key(group: Group) -> tuple[Any, ...]:
        place = min(copy.place for copy in group.copies.values())
        return place[0], group not in first, first.get(group, 0), place

    ordered = sorted(dict.fromkeys(by_node.values()), key=key)
    chain = [group for group in ordered if group in first]
    for number, group in enumerate(chain):
        group.before = chain[:number]
    return {group: number for number, group in enumerate(ordered)}


def _depths(nodes: Iterable[Node]) -> dict[Node, int]:
    """Return of stages whose nodes wait for each other how many each waits for, one by one.

    So do those that run a model, segment by segment.
    """
    depths: dict[Node, int] = {}
    for node in needs_first(nodes):
        steps = (depths[need] + (need.stage is node.stage) for need in node.needs)
        depths[node] = max(steps, default=0)
    stages = {node.stage.name for node, depth in depths.items() if depth}
    return {node: depth for node, depth in depths.items() if node.stage.name in stages}


def needs_first(nodes: Iterable[Node]) -> list[Node]:
    """Return nodes and all that they need, each behind what it needs itself."""
    ordered: dict[Node, None] = {}
    pending = [*nodes]
    while pending:  # a chain of layers may be longer than Python's stack
        if missing := [need for need in pending[-1].needs if need not in ordered]:
            pending += missing
        else:
            ordered[pending.pop()] = None
    return [*ordered]

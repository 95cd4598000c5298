"""read_groups: which copies must be here together, since the same tasks read them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tasks.execution.copies import Copies, Copy
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
        users: names of later ones that read them again, and have begun.
        held: names of the copies that room is reserved for.
        left: names of the copies that this run is to drop.
        entering: held by the task that reserves it.
    """

    copies: dict[str, Copy] = field(default_factory=dict)
    tasks: set[str] = field(default_factory=set)
    users: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    entering: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """The size of its copies."""
        return sum(copy.nbytes for copy in self.copies.values())

    @property
    def is_used(self) -> bool:
        """Whether a task may still read them."""
        return bool(self.tasks or self.users)


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
    """Return the group of each node: of nodes that read the same copy, it is one.

    Nodes that wait for what another layer became are of none.
    """
    group_of: dict[str, Group] = {}  # by the names of copies
    joining = {node: copies for node, copies in reads.items() if not _follows_a_layer(node)}
    for copies in joining.values():
        overlapping = {id(group): group for name in copies if (group := group_of.get(name))}
        joined = max(overlapping.values(), key=lambda group: len(group.copies), default=Group())
        for group in overlapping.values():
            joined.copies |= group.copies
        joined.copies |= copies
        group_of |= dict.fromkeys(joined.copies, joined)
    return {node: group_of[next(iter(copies))] for node, copies in joining.items()}


def _follows_a_layer(node: Node) -> bool:
    """Tell whether a node needs what its own stage, or one that it reads, makes of another layer.

    So do those that run a model, segment by segment.
    """
    return any(need.stage is node.stage or _follows_a_layer(need) for need in node.needs)

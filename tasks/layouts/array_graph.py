"""array_graph: what lazy MLX arrays are made of, as ``mx.export_to_dot`` tells it."""

from __future__ import annotations

import functools
import io
from collections.abc import Container, Iterable, Sequence
from typing import Any

SAME_NUMBERS = (
    "AsType", "Broadcast", "Concatenate", "Contiguous", "Copy", "ExpandDims", "Flatten", "Pad",
    "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unflatten",
)  # fmt: skip  # operations of MLX by which an array is the same numbers, elsewhere


class ArrayGraph:
    """The graph that computes some arrays: nodes that are arrays, and operations between them.

    Attributes:
        nodes: of the arrays that it was made for, in their order. One array under two Python
            objects is one node.
        sources: the nodes that a node is made of; an array that is evaluated has none.
        operations: MLX's names of them, by node.
    """

    def __init__(self, mx: Any, arrays: Iterable[Any]) -> None:
        # MLX names nodes as it comes to them. So each array gets a view of its own at the graph's
        # end, and these ends are written in the order in which they are given.
        ends = [mx.expand_dims(array, 0) for array in arrays]
        dot = io.StringIO()
        mx.export_to_dot(dot, ends)
        self.sources: dict[str, list[str]] = {}
        self.operations: dict[str, str] = {}
        sinks = []
        for line in dot.getvalue().splitlines():
            if not line.startswith("{"):  # "A" -> 1, or 1 -> "A"
                source, _, target = line.partition(" -> ")
                self.sources.setdefault(target, []).append(source)
            elif line.startswith("{ rank=sink; "):  # { rank=sink; "A"; }
                sinks.append(line[13:-3])
            elif not line.startswith(('{ "', "{ rank")):  # { 1 [label ="Add", shape=rectangle]; }
                node, _, operation = line[2:].partition(' [label ="')
                self.operations[node] = operation.partition('"')[0]
        # Beside the ends, there is what a compiled function makes that nobody uses.
        sinks = [node for node in sinks if self.operation(node) == "ExpandDims"]
        self.nodes = [self.sources[self.sources[sink][0]][0] for sink in sinks]
        if len(self.nodes) != len(ends):
            raise AssertionError("MLX writes graphs in another way than expected")

    def operation(self, node: str) -> str | None:
        """Return what made an array; None if it is evaluated."""
        return self.operations[self.sources[node][0]] if node in self.sources else None

    def reach(self, node: str, inputs: Container[str]) -> tuple[set[str], bool]:
        """Return the inputs that an array is made of, and whether no other is hollow.

        Args:
            node: the array's.
            inputs: theirs.
        """
        stack, seen = [node], {node}
        reached, whole = set(), True
        while stack:
            node = stack.pop()
            if node in inputs:
                reached.add(node)
                continue
            whole = whole and self.operations.get(node) != "StopGradient"
            new = [source for source in self.sources.get(node, ()) if source not in seen]
            seen.update(new)
            stack += new
        return reached, whole

    def factors(self) -> set[str]:
        """Return the arrays that are multiplied, once they were cast and moved, at most."""
        stack = [node for node, operation in self.operations.items() if operation == "Multiply"]
        seen: set[str] = set()
        while stack:
            for node in self.sources.get(stack.pop(), ()):
                if node not in seen and self.operations.get(node, "Copy") in SAME_NUMBERS:
                    seen.add(node)
                    stack.append(node)
        return seen


def hollow(mx: Any, dtype: str, shape: Sequence[int]) -> Any:
    """Return an array of this shape that takes no memory, even if it is evaluated.

    What makes it is an operation that no model uses, by which a graph shows where its inputs are.
    """
    return mx.stop_gradient(zeros(getattr(mx, dtype), tuple(shape)))


@functools.cache
def zeros(dtype: Any, shape: tuple[int, ...]) -> Any:
    """Return zeros that take no memory: the same array for all who ask for them."""
    import mlx.core as mx

    return mx.broadcast_to(mx.array(0, dtype), shape)

"""read_ahead: what later stages make of a tensor while an earlier one reads it.

What is not kept is made again whenever it is read: FP8 would be decoded to tell what it is, once
more to tell what it is cast to, and to be quantized. Where a run is to do all of that, each block
goes all the way while it is in the processor's cache.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cache.blobs import Meter
from tasks.core.errors import BuildError
from tasks.core.workspace import Workspace
from tasks.planning.node import Known, Node
from tasks.planning.plan import Plan
from tasks.stages.stage import Context, Key, Origin, Result
from tasks.tensors import arrays, mx, rows
from tasks.tensors.rows import Rows


class Spent(NamedTuple):
    """What was done for a node: seconds, and bytes written through the store."""

    seconds: float = 0.0
    written: int = 0

    def plus(self, other: Spent) -> Spent:
        """Return both together."""
        return Spent(self.seconds + other.seconds, self.written + other.written)

    def less(self, other: Spent) -> Spent:
        """Return what is left without the other."""
        return Spent(self.seconds - other.seconds, self.written - other.written)


NOTHING = Spent()


class Reading:
    """A tensor that is read once, in order, by whoever makes something of it.

    Attributes:
        spent: on reading and writing it.
    """

    unit = 1

    def __init__(
        self,
        source: Rows,
        write: Callable[[memoryview], None],
        watch: Callable[[], Callable[[], Spent]],
    ) -> None:
        """Begin with nothing read.

        Args:
            source: the tensor.
            write: is given the bytes of each block.
            watch: see ``ReadAhead.watch``.
        """
        self.dtype, self.shape, self.unit = source.dtype, source.shape, source.unit
        self.spent = NOTHING
        self._source = source
        self._write = write
        self._watch = watch
        self._at = 0

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``, which are the next.

        Raises:
            ValueError: they are not.
        """
        if start != self._at:
            raise ValueError(f"rows {start} to {stop} are not the next: {self._at} were read")
        spent = self._watch()
        block = self._source.read(start, stop)
        self._write(arrays.view(block))
        self._at = stop
        self.spent = self.spent.plus(spent())
        return block

    def finish(self) -> None:
        """Read what nobody has."""
        for start, stop in rows.spans(self, rows.BLOCK_BYTES):
            if stop > self._at:
                self.read(max(start, self._at), stop)


@dataclass
class Made:
    """What was made for a node before it runs.

    Attributes:
        results: of each input, with the digest that it had.
        spent: on them.
    """

    results: dict[Key, tuple[str, Result]] = field(default_factory=dict)
    spent: Spent = NOTHING


class _OfThread(threading.local):
    spent = NOTHING  # by this thread, for nodes that it does not run


class ReadAhead:
    """What was made for nodes that have not run, in one invocation. Safe in threads."""

    def __init__(self, workspace: Workspace, packs: Callable[[str], bool], meter: Meter) -> None:
        """Begin with nothing.

        Args:
            workspace: where it is on record what nodes made before.
            packs: tells whether all of a target's nodes will run.
            meter: the store's.
        """
        self._workspace = workspace
        self._packs = packs
        self._meter = meter
        self._made: dict[Node, Made] = defaultdict(Made)
        self._readers: dict[str, dict[Node, Node]] = {}
        self._thread = _OfThread()

    def nodes(self, plan: Plan, node: Node) -> Iterator[Node]:
        """Yield the nodes that can make something of a node's tensors as these are read, in order.

        Those that never ran: what one made before may be what it is to make now.
        """
        if not self._packs(plan.target.name):
            return
        readers = self._readers.get(plan.target.name)
        if readers is None:
            nodes = [each for stage in plan.stages.values() for each in stage]
            one_by_one = [n for n in nodes if n.stage.one_by_one and len(n.needs) == 1]
            readers = self._readers[plan.target.name] = {n.needs[0]: n for n in one_by_one}
        reader = readers.get(node)
        while reader and not Path(reader.manifest_path(self._workspace)).exists():
            yield reader
            reader = readers.get(reader)

    def reader(self, plan: Plan, node: Node, name: str, known: Known) -> tuple[Node, Key] | None:
        """Return the node that makes something of an output, and as what it reads it."""
        for reader in self.nodes(plan, node):
            output = reader.outputs(known).get(name)
            if output is None or output.origin is not Origin.PASSED_ON:
                return reader, Key(node.stage.name, name)
            node = reader
        return None

    def make(
        self, reader: Node, key: Key, reading: Reading, context: Context
    ) -> Callable[[str], None] | None:
        """Have a node make what it makes of an input, which is read meanwhile.

        Returns:
            What takes note of it, called with the digest of what was read. None if it cannot be
            made, which the node will say of itself.
        """
        spent = self.watch()
        try:
            result = reader.stage.make(reader.params, key, reading, context)
        except BuildError:
            return None
        own = spent().less(reading.spent)
        self._thread.spent = self._thread.spent.plus(own)

        def note(digest: str) -> None:
            made = self._made[reader]
            made.results[key] = digest, result
            made.spent = made.spent.plus(own)

        return note

    def take(self, node: Node) -> Made:
        """Return what was made for a node, which runs now."""
        return self._made.pop(node, None) or Made()

    def watch(self) -> Callable[[], Spent]:
        """Return what tells what this thread has spent since, without what is of other nodes."""
        before, start = self._thread.spent, self._now()
        return lambda: self._now().less(start).less(self._thread.spent.less(before))

    def _now(self) -> Spent:
        return Spent(time.perf_counter(), self._meter.written)

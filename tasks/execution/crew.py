"""crew: who else makes what is not on record, in place of a thread of this process.

What needs each other's results is made together, so that its bytes stay where they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from cache.blobs import Part
from cache.records.manifests import Manifest, Tensor
from cache.store import Store
from tasks.execution.filling.draft import WeightFileDraft
from tasks.execution.log import Trace
from tasks.execution.node_context import NodeContext
from tasks.planning.node import Inputs, Node
from tasks.planning.plan import Plan

Locate = Callable[[str, Tensor], Sequence[Part]]  # by a tensor's name


class Delivered(NamedTuple):
    """A node's result that was made elsewhere.

    Attributes:
        manifest: on record here by now; what of its bytes is wanted here, is here.
        outcome: one of ``log.OUTCOMES``.
        trace: how it was made.
    """

    manifest: Manifest
    outcome: str
    trace: Trace


class Recorder(Protocol):
    """What has on record here what a crew made: see ``Builder``."""

    store: Store

    def context(self, plan: Plan, node: Node, inputs: Inputs) -> NodeContext:
        """Return what the node's stage may do; here, write its outputs."""

    def begin_draft(self, plan: Plan) -> WeightFileDraft | None:
        """Return the draft of a target's weight files, begun unless it is already."""

    def shared(self, plan: Plan, node: Node) -> Locate | None:
        """Return what locates a node's tensors, or None if their bytes are not shared."""

    def recall(self, plan: Plan, node: Node) -> Manifest | None:
        """Return what a leaf is known to read, without reading it."""

    def take(self, plan: Plan, node: Node, manifest: Manifest) -> None:
        """Put on record what another machine made; its bytes are here, as far as wanted."""


class Crew(Protocol):
    """Machines that make units of nodes: the chain of a layer, from the checkpoint to the end."""

    def takes(self, plan: Plan, node: Node) -> bool:
        """Tell whether a node would be handed over."""

    def make(self, recorder: Recorder, plan: Plan, node: Node) -> Delivered | None:
        """Have the unit of a node made, once, and put on record here; None: it is to be made here.

        Raises:
            BuildError: the crew is lost, and nothing is to be made without it.
        """

    def delivered(self, node: Node) -> Delivered | None:
        """Return a node's result, once, if the unit of another one brought it."""

    def close(self) -> None:
        """Let go of the machines."""

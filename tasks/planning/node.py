"""node: one stage of one layer of one target, and what it reads and will make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cache.records.manifests import Action, Manifest, Tensor, TensorSpec
from tasks.core.task_names import task_name
from tasks.core.workspace import Workspace
from tasks.stages.stage import ActionSpec, Key, LeafStage, Origin, Output, Stage


class Input(NamedTuple):
    """A tensor that a node reads, and the node that makes it."""

    maker: Node
    tensor: Tensor


Inputs = dict[Key, Input]
Known = dict["Node", dict[str, Output]]


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One stage of one layer of one target.

    Attributes:
        spec: what is asked for, which other targets may share.
        target: the target's name.
        needs: the nodes whose tensors it reads.
    """

    spec: ActionSpec[Any]
    target: str
    needs: tuple[Node, ...] = ()

    @property
    def stage(self) -> Stage[Any]:
        """The stage."""
        return self.spec.stage

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.spec.layer

    @property
    def params(self) -> Any:
        """What the stage is asked to do."""
        return self.spec.params

    @property
    def name(self) -> str:
        """The task's name."""
        return task_name(self.spec.stage.group, self.target, self.spec.layer)

    def manifest_path(self, workspace: Workspace) -> str:
        """Return where its manifest lies. A string: doit wants thousands of them."""
        return workspace.manifest(self.target, self.spec.stage.name, self.spec.layer)

    @property
    def is_leaf(self) -> bool:
        """Whether it reads the checkpoint, and no other node."""
        return isinstance(self.spec.stage, LeafStage)

    def inputs(self, manifests: Mapping[Node, Manifest]) -> Inputs:
        """Return the tensors that it reads, given the manifests of the nodes that it needs."""
        return self.inputs_of({need: manifest.tensors for need, manifest in manifests.items()})

    def inputs_of(self, outputs: Mapping[Node, Mapping[str, Tensor]]) -> Inputs:
        """Return the tensors that it reads, given what the nodes that it needs make."""
        reads = self.spec.planned.reads
        return {
            Key(need.spec.stage.name, name): Input(need, tensor)
            for need, tensors in outputs.items()
            for name, tensor in tensors.items()
            if reads is None or name in reads
        }

    def input_specs(self, known: Known | None = None) -> dict[Key, TensorSpec]:
        """Return the dtypes and shapes of the tensors that it reads; ``known`` as of outputs."""
        known = {} if known is None else known
        reads = self.spec.planned.reads
        return {
            Key(need.spec.stage.name, name): output.spec
            for need in self.needs
            for name, output in need.outputs(known).items()
            if reads is None or name in reads
        }

    def outputs(self, known: Known | None = None) -> dict[str, Output]:
        """Return what it will make.

        Args:
            known: what nodes make that were asked before; extended. A layer may have thousands of
                tensors, so whoever asks several times has one.
        """
        known = {} if known is None else known
        if self.is_leaf:
            return self.spec.outputs_of_leaf
        if self not in known:
            known[self] = self.spec.stage.outputs(self.spec.params, self.input_specs(known))
        return known[self]

    def output_specs(self, known: Known | None = None) -> dict[str, TensorSpec]:
        """Return the dtypes and shapes of what it will make; ``known`` as of outputs."""
        return {name: output.spec for name, output in self.outputs(known).items()}

    def new_specs(self, known: Known | None = None) -> dict[str, TensorSpec]:
        """Return the dtypes and shapes of what it makes, without what it only passes on.

        ``known`` as of outputs.
        """
        outputs = self.outputs(known).items()
        return {n: output.spec for n, output in outputs if output.origin is not Origin.PASSED_ON}

    def as_inputs(self, tensors: Mapping[str, Tensor]) -> Inputs:
        """Return tensors that it made, as inputs of another node."""
        stage = self.spec.stage.name
        return {Key(stage, name): Input(self, tensor) for name, tensor in tensors.items()}

    def action(self, inputs: Inputs) -> Action:
        """Return its action, given what it reads; of several stages, each name with its stage's."""
        several = self._reads_several
        return self._action(
            {
                f"{key.stage}:{key.name}" if several else key.name: tensor.record
                for key, (_, tensor) in inputs.items()
            }
        )

    def action_on(self, records: Mapping[Node, dict[str, list[Any]]]) -> Action:
        """Return its action, given the records of what the nodes that it needs make.

        Of a leaf, of what it makes. A layer may have thousands: they are not copied where all that
        one node makes is read.
        """
        needs, reads = self.needs or (self,), self.spec.planned.reads
        if len(needs) == 1 and (reads is None or reads >= records[needs[0]].keys()):
            return self._action(records[needs[0]])
        several = self._reads_several
        return self._action(
            {
                f"{need.spec.stage.name}:{name}" if several else name: record
                for need in needs
                for name, record in records[need].items()
                if reads is None or name in reads
            }
        )

    @property
    def _reads_several(self) -> bool:
        """Whether it reads several stages, of which two may make tensors of one name."""
        return len({need.spec.stage.name for need in self.needs}) > 1

    def _action(self, read: dict[str, list[Any]]) -> Action:
        stage = self.spec.stage
        return Action(stage.name, stage.version, self.spec.params.record, read)


def total(tensors: Iterable[Tensor | TensorSpec]) -> int:
    """Return the bytes of tensors together."""
    return sum(tensor.nbytes for tensor in tensors)

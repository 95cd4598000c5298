"""importances: llama.cpp's importance matrix, in place of what running the model would tell."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from cache.records.manifests import Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.text import listed, plural
from tasks.quality import imatrix
from tasks.quality.imatrix import Entry
from tasks.stages.activations import MEAN_SQUARE
from tasks.stages.quantize_scheme import weight_name
from tasks.stages.reasons import Reason, changed_values
from tasks.stages.stage import (
    Context,
    Inputs,
    Keep,
    Key,
    Origin,
    Output,
    Params,
    Planned,
    Result,
    Stage,
    TargetModel,
)  # fmt: skip

FILE = "file"  # the one node


class ImportancesParams(Params, frozen=True):
    """What is read.

    Attributes:
        content: digest of the file.
        names: what the file calls each module's weight, by path.
        shapes: of what is told of each: that of the weight without its rows.
        missing: paths of the modules of which it has none.
    """

    content: str
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    missing: tuple[str, ...] = ()


class Importances(Stage[ImportancesParams]):
    """Read what modules are given out of llama.cpp's importance matrix.

    ``mean_square``, as ``activations`` has it, of each module that the file has.
    """

    name = "importances"
    version = 1
    keep = Keep.ALWAYS
    params = ImportancesParams

    def plan(self, target: TargetModel) -> Mapping[str, Planned[ImportancesParams]]:
        """Plan to read the file, if [quality] names one.

        Raises:
            BuildError: it cannot be read, is no such file, or another model's.
        """
        if target.quality.imatrix is None:
            return {}
        path = Path(target.quality.imatrix)
        entries, called = imatrix.read(path), imatrix.names(target.memos, target.model)
        shapes = {
            module.path: target.model.parameters[weight_name(module.path)].shape
            for module in target.model.modules
            if module.quantized_names
        }
        there = {p: called[p] for p in shapes if p in called and called[p] in entries}
        if not there:
            raise BuildError(
                f"{path} has nothing of the model: it has {listed([*entries])}, and that of the "
                f"model would be {listed([*called.values()])}. Name that of the very model."
            )
        for at, name in there.items():
            self._check(path, at, shapes[at], entries[name])
        told = {p: (*shapes[p][:-2], shapes[p][-1]) for p in there}
        missing = tuple(p for p in shapes if p not in there)
        return {FILE: Planned(ImportancesParams(imatrix.content(path), there, told, missing))}

    @staticmethod
    def _check(path: Path, module: str, shape: tuple[int, ...], entry: Entry) -> None:
        wanted = (prod(shape[:-2]), shape[-1])
        if entry.sums.shape != wanted:
            raise BuildError(
                f"{path} has {entry.sums.shape[0]} × {entry.sums.shape[1]} channels of {module}, "
                f"which has {wanted[0]} × {wanted[1]}: it is another model's."
            )

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what [quality] says."""
        return target.quality

    def outputs(
        self, params: ImportancesParams, inputs: Mapping[Key, TensorSpec]
    ) -> dict[str, Output]:
        """Return the mean squares: (…, channels)."""
        return {
            f"{path}.{MEAN_SQUARE}": Output(TensorSpec("float32", shape), Origin.STORED)
            for path, shape in params.shapes.items()
        }

    def run(self, params: ImportancesParams, inputs: Inputs, context: Context) -> Result:
        """Read the file.

        Raises:
            BuildError: it is another one by now.
        """
        path = Path(context.planned.quality.imatrix or "")
        before, entries, after = imatrix.content(path), imatrix.read(path), imatrix.content(path)
        if not before == after == params.content:
            raise BuildError(f"{path} changed meanwhile. Run {COMMAND} again.")
        tensors = {}
        for module, name in params.names.items():
            means = imatrix.mean_squares(entries[name])
            with context.writer(f"{module}.{MEAN_SQUARE}", means.nbytes) as writer:
                writer.write(memoryview(means.tobytes()))
            tensors[f"{module}.{MEAN_SQUARE}"] = Tensor(
                "float32", params.shapes[module], writer.digest
            )
        notes: tuple[str, ...] = ()
        if params.missing:
            notes = (
                f"the importance matrix has nothing of {plural(len(params.missing), 'module')} "
                f"({listed(params.missing)}): all of their channels count the same",
            )
        return Result(tensors, notes)

    def memory(self, params: ImportancesParams, checkpoint: Checkpoint) -> int:
        """Return the size of the file's numbers, twice."""
        return 8 * sum(map(prod, params.shapes.values()))

    def summary(self, read: Mapping[str, bytes]) -> str:
        """Return of how many modules it tells; notes say of which it does not."""
        return f"importance matrix of {plural(len(read), 'module')}"

    def describe(self, params: ImportancesParams) -> str:
        """Return of how many modules it tells."""
        return plural(len(params.names), "module")

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Say that the file is another."""
        named = {"content": "the file"}
        return changed_values(
            {named.get(k, k): v for k, v in old.items()},
            {named.get(k, k): v for k, v in new.items()},
            but=("names", "shapes", "missing"),
        )

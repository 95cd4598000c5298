"""fuse: an adapter's weights, added to the model's that they were trained on.

The arithmetic is that of ``mlx_lm.fuse`` (``LoRALinear.fuse`` and the like) for what mlx-lm
trained, in its order and dtypes, a whole weight at once: so that bits agree. What PEFT trained is
added as its ``merge`` does on a CPU, in float32.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from math import prod
from typing import Any

import msgspec
from msgspec import Struct

from cache.digest import digest_record
from cache.records.manifests import DTYPE_BYTES, Tensor, TensorSpec
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.layouts import fusions
from tasks.layouts.fusions import Delta
from tasks.layouts.peft_experts import OF_STACKS, of_expert
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
from tasks.tensors import arrays, mx, rows
from tasks.tensors.device import device_of
from tasks.tensors.rows import IN_FLIGHT_BYTES, Rows

# MLX's CUDA backend returns wrong numbers where several threads multiply matrices.
_MULTIPLYING = threading.Lock()


class FuseParams(Params, frozen=True):
    """What is fused.

    Attributes:
        deltas: what the adapter does to each weight, by its name.
        shapes: of these weights.
        dtype: what they are cast to then, where something is to be made of them.
        dtypes: the same of those that a rule says another of, by name.
        mlx: MLX's version; this and the next two are empty if nothing is computed.
        device: what computes: ``cpu``, ``metal``, ``cuda``.
        machine: the processor.
    """

    deltas: dict[str, list[Delta]]
    shapes: dict[str, tuple[int, ...]]
    dtype: str | None = None
    mlx: str = ""
    device: str = ""
    machine: str = ""
    dtypes: dict[str, str] = {}  # noqa: RUF012 - msgspec makes a new one for each

    def dtype_of(self, name: str, spec: TensorSpec) -> str:
        """Return the dtype of a weight once it is fused."""
        return _dtype(spec.dtype, self.deltas[name], self.dtypes.get(name, self.dtype))


class Fuse(Stage[FuseParams]):
    """Add an adapter to each layer."""

    name = "fuse"
    version = 3
    keep = Keep.CONFIGURED
    params = FuseParams
    one_by_one = True

    def plan(self, target: TargetModel) -> Mapping[str, Planned[FuseParams]]:
        """Plan what the target's adapter does; nothing if it has none.

        Raises:
            CheckpointError: the adapter is not of this model.
        """
        if target.adapter is None:
            return {}
        deltas = fusions.deltas(target.adapter, target.model, target.checkpoint)
        planned = {}
        for layer, parameters in target.layers.items():
            own = {p.name: deltas[p.name] for p in parameters if p.name in deltas}
            shapes = {p.name: tuple(p.shape) for p in parameters if p.name in own}
            computer = target.computer._asdict() if own else {}
            dtype = target.dtype if own and target.settings else None
            dtypes = {name: target.dtypes[name] for name in own if name in target.dtypes}
            params = FuseParams(own, shapes, dtype, **computer, dtypes=dtypes)
            planned[layer] = Planned(params, target.same_layer(layer))
        return planned

    def plan_key(self, target: TargetModel) -> Hashable:
        """Return what tells adapters apart, and what is made of the weights then."""
        if target.adapter is None:
            return None
        adapter = target.adapter
        config = json.dumps(adapter.config)  # which may hold what JSON has not
        identity = digest_record([adapter.file, config, dict(adapter.digests)])
        return identity, target.dtype, bool(target.settings)

    def outputs(self, params: FuseParams, inputs: Mapping[Key, TensorSpec]) -> dict[str, Output]:
        """Return tensors of the same names and shapes."""
        outputs = {}
        for key, spec in inputs.items():
            deltas = params.deltas.get(key.name)
            made = TensorSpec(params.dtype_of(key.name, spec), spec.shape) if deltas else spec
            origin = Origin.VIEW if deltas else Origin.PASSED_ON
            outputs[key.name] = Output(made, origin, (key,))
        return outputs

    def run(self, params: FuseParams, inputs: Inputs, context: Context) -> Result:
        """Fuse a layer."""
        tensors: dict[str, Tensor] = {}
        for key, tensor in inputs.items():
            if key.name in params.deltas:
                made = context.made(key) or self.make(params, key, context.rows(key), context)
                tensors |= made.tensors
            else:
                tensors[key.name] = context.pass_on(key) if context.keeps else tensor
        return Result(tensors)

    def make(self, params: FuseParams, key: Key, source: Rows, context: Context) -> Result:
        """Fuse a weight."""
        fused = self._fused(params, key.name, source, context)
        return Result({key.name: context.read(key.name, fused)})

    def view(self, params: FuseParams, inputs: Inputs, context: Context, name: str) -> Rows:
        """Return a weight, fused as it is read."""
        source = context.rows(next(key for key in inputs if key.name == name))
        return self._fused(params, name, source, context) if name in params.deltas else source

    def _fused(self, params: FuseParams, name: str, source: Rows, context: Context) -> Rows:
        deltas = params.deltas[name]
        adapter = context.planned.adapter
        assert adapter is not None
        stream = context.streams.get(device_of(params.device))
        fused: dict[int | None, list[Callable[[mx.array], mx.array]]] = {}
        for delta in sorted(deltas, key=lambda delta: delta.kind != "replace"):
            tensors = {
                role: _array(adapter.read(part), dtype, shape)
                for role, (part, dtype, shape, _) in delta.tensors.items()
            }
            if delta.kind in OF_STACKS:
                count = source.shape[0]
                for number in range(count):
                    make = partial(_fuse_expert, delta, tensors, number, count)
                    fused.setdefault(number, []).append(make)
                continue
            fused.setdefault(delta.expert, []).append(partial(_fuse, delta, tensors, stream))
        dtype = params.dtype_of(name, TensorSpec(source.dtype, source.shape))
        return Fused(source, dtype, fused)

    def memory(self, params: FuseParams, checkpoint: Checkpoint) -> int:
        """Return the size of the largest weight, and of what is made of it, in float32."""
        return IN_FLIGHT_BYTES + self.view_memory(params, checkpoint)

    def view_memory(self, params: FuseParams, checkpoint: Checkpoint) -> int:
        """Return the size of the largest piece, four times in float32."""
        sizes = [
            prod(shape if _is_of_all(params.deltas[name][0]) else shape[1:])
            for name, shape in params.shapes.items()
        ]
        return 4 * DTYPE_BYTES["float32"] * max(sizes, default=0)

    def explain(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Reason]:
        """Compare what is done to each weight, and what computes."""
        was, now = old.get("deltas") or {}, new.get("deltas") or {}
        others = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        changed = [Reason("the adapter changed", tuple(others))] if others else []
        return changed + changed_values(
            old, new, but=("deltas", "shapes") if others else ("deltas",)
        )

    def describe(self, params: FuseParams) -> str:
        """Return how many weights are changed."""
        return f"{len(params.deltas)} changed" if params.deltas else "as it is"


def dtypes(target: TargetModel) -> dict[str, str]:
    """Return the dtypes of the weights that a target's adapter changes, once it is fused.

    Raises:
        CheckpointError: the adapter is not of this model.
    """
    if target.adapter is None:
        return {}
    wanted = target.dtype if target.settings else None
    parameters, deltas = target.model.parameters, fusions.deltas
    return {
        name: _dtype(
            target.dtype_after_cast(parameters[name]), each, target.dtypes.get(name, wanted)
        )
        for name, each in deltas(target.adapter, target.model, target.checkpoint).items()
    }


def _dtype(dtype: str, deltas: list[Delta], wanted: str | None) -> str:
    """Return the dtype of a weight that was fused: mlx-lm's DoRA multiplies by float32."""
    if wanted:
        return wanted
    for delta in deltas:
        if delta.kind == "replace":
            dtype = delta.tensors["weight"][1]
        elif delta.kind == "dora" and delta.tensors["m"][1] != dtype:
            dtype = "float32"
    return dtype


def _array(data: bytes, dtype: str, shape: tuple[int, ...]) -> mx.array:
    memory = arrays.blank(len(data))
    if data:
        memoryview(memory)[:] = data  # type: ignore[arg-type]
    return memory.view(getattr(mx, dtype)).reshape(shape)


def _fuse(
    delta: Delta, tensors: Mapping[str, mx.array], stream: mx.Stream, weight: mx.array
) -> mx.array:
    """Return a weight, (rows, columns) or of experts, with what an adapter does to it."""
    if delta.kind == "replace":
        return tensors["weight"]
    if delta.kind.startswith("peft_"):
        return _fuse_peft(delta, tensors, weight)
    left, right = tensors["a"], tensors["b"]
    if weight.ndim == 3:
        left, right = right, left.reshape(len(weight), -1, weight.shape[-1], stream=stream)
    elif delta.transposed:
        left, right = (mx.transpose(each, stream=stream) for each in (right, left))
    product = mx.matmul(mx.multiply(delta.scale, left, stream=stream), right, stream=stream)
    weight = mx.add(weight, product.astype(weight.dtype, stream=stream), stream=stream)
    if delta.kind == "dora":
        norms = mx.linalg.norm(weight, axis=1, keepdims=True, stream=stream)
        magnitudes = mx.expand_dims(tensors["m"], 1, stream=stream)
        factors = mx.divide(magnitudes, norms, stream=stream)
        weight = mx.multiply(factors, weight, stream=stream)
    with _MULTIPLYING if stream.device.type == mx.gpu else nullcontext():
        mx.eval(weight)
    return weight


def _is_of_all(delta: Delta) -> bool:
    """Tell whether a weight is changed as a whole, and not expert by expert."""
    return delta.expert is None and delta.kind not in OF_STACKS


def _fuse_expert(
    delta: Delta, tensors: Mapping[str, mx.array], number: int, count: int, weight: mx.array
) -> mx.array:
    """Return an expert's weight with what factors of all ``count`` do to it."""
    return _fuse_peft(delta, of_expert(delta.kind, tensors, number, count), weight)


def _fuse_peft(delta: Delta, tensors: Mapping[str, mx.array], weight: mx.array) -> mx.array:
    """Return the same on a CPU: a GPU may multiply float32 with less than its precision."""
    a, b = (tensors[role].astype(mx.float32) for role in ("a", "b"))
    product = b @ a
    product = (product.T if delta.transposed else product) * delta.scale
    product = product.astype(tensors["a"].dtype).astype(mx.float32)
    wide = weight.astype(mx.float32) + product
    if delta.kind == "peft_dora":
        magnitude = tensors["m"].astype(mx.float32).reshape(-1)
        axis = 0 if delta.transposed else 1
        factor = magnitude / mx.linalg.norm(wide, axis=axis)
        wide = (factor[None] if delta.transposed else factor[:, None]) * wide
    return wide.astype(weight.dtype)


class Fused(Struct, frozen=True):
    """A weight with what an adapter does to it: made as a whole, or an expert at a time.

    Attributes:
        source: the weight.
        dtype: of the result.
        deltas: what makes the result of a piece, in order, by the expert's number; None, of all.
    """

    source: Rows
    dtype: str
    deltas: Mapping[int | None, Sequence[Callable[[mx.array], mx.array]]]
    unit: int = 1
    _made: dict[int, mx.array] = msgspec.field(default_factory=dict)  # the piece that is read

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.source.shape

    def read(self, start: int, stop: int) -> mx.array:
        """Return rows ``start`` to ``stop``."""
        height = rows.count(self.source) if None in self.deltas else self.shape[-2]
        pieces = []
        for number in range(start // height, -(-stop // height)):
            first = number * height
            last = min(stop, first + height)
            if number in self.deltas or None in self.deltas:
                made = self._piece(number, height)
                pieces.append(made[max(start, first) - first : last - first])
            else:
                plain = self.source.read(max(start, first), last)
                pieces.append(plain.astype(getattr(mx, self.dtype)))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    def _piece(self, number: int, height: int) -> mx.array:
        if number not in self._made:
            self._made.clear()
            whole = None in self.deltas
            weight = self.source.read(number * height, (number + 1) * height)
            made = weight.reshape(self.shape) if whole else weight
            for fuse in self.deltas[None if whole else number]:
                made = fuse(made)
            made = made.astype(getattr(mx, self.dtype)).reshape(height, -1)
            mx.eval(made)
            self._made[number] = made
        return self._made[number]

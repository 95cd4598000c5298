"""peft_experts: what PEFT's ``target_parameters`` do to the experts of a layer.

transformers 5 has a layer's experts in a module of two parameters, ``gate_up_proj`` and
``down_proj``. PEFT adapts each with the factors of all experts together, ``lora_A`` (experts ·
rank, columns) and ``lora_B`` (rows, rank · experts); of two in a module one is behind
``base_layer``. The model here has ``gate_proj``, ``up_proj`` and ``down_proj``: shapes tell which
factors are for which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tasks.layouts.model import Model, Parameter

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
PART = re.compile(r".*\.(gate_proj|up_proj|down_proj)\.weight")
GATE, UP, STACK = "peft_gate", "peft_up", "peft_stack"
OF_STACKS = (GATE, UP, STACK)  # kinds of changes: by the first half of the rows, the second, all
AS_THEY_ARE = ("unpack", "stack", "half_split")  # steps that leave each expert's rows and columns


class Adapted(NamedTuple):
    """A parameter that factors of all experts are for.

    Attributes:
        parameter: it.
        kind: one of ``OF_STACKS``.
        name: of the module's parameter that PEFT adapted.
        rank: of each expert's factors.
    """

    parameter: Parameter
    kind: str
    name: str
    rank: int


class Experts:
    """The experts of a model, by layer."""

    def __init__(self, model: Model) -> None:
        self._layers: dict[str, dict[str, list[Parameter]]] = {}
        for parameter in model.parameters.values():
            part, layer = PART.fullmatch(parameter.name), LAYER.search(parameter.name)
            if part and layer and len(parameter.shape) == 3:
                parts = self._layers.setdefault(layer[1], {})
                parts.setdefault(part[1], []).append(parameter)

    def of(self, path: str, a: tuple[int, ...], b: tuple[int, ...]) -> Iterator[Adapted]:
        """Yield what factors of these shapes are for, if they are for experts.

        Args:
            path: of the module that has them.
            a: (experts · rank, columns).
            b: (rows, rank · experts).
        """
        layer = LAYER.search(path) if path.endswith(".experts") else None
        parts = self._layers.get(layer[1], {}) if layer else {}
        if len(parts) != 3 or not all(map(_is_one, parts.values())):
            return
        gate, up, down = (parts[part][0] for part in ("gate_proj", "up_proj", "down_proj"))
        experts, hidden, wide = gate.shape
        if up.shape != gate.shape or a[0] % experts:
            return
        rank = a[0] // experts
        if (b[0], a[1]) == (2 * hidden, wide):
            yield Adapted(gate, GATE, "gate_up_proj", rank)
            yield Adapted(up, UP, "gate_up_proj", rank)
        elif (b[0], a[1]) == down.shape[1:]:
            yield Adapted(down, STACK, "down_proj", rank)


def _is_one(parameters: list[Parameter]) -> bool:
    return len(parameters) == 1 and all(step[0] in AS_THEY_ARE for step in parameters[0].steps)


def of_expert(kind: str, tensors: Mapping[str, Any], number: int, experts: int) -> dict[str, Any]:
    """Return an expert's factors, of arrays of those of all.

    Args:
        kind: one of ``OF_STACKS``.
        tensors: ``a`` and ``b``.
        number: the expert's.
        experts: how many there are.

    Returns:
        ``a`` (rank, columns) and ``b`` (rows, rank).
    """
    a, b = tensors["a"], tensors["b"]
    a = a.reshape(experts, -1, a.shape[-1])[number]
    b = b.reshape(b.shape[0], -1, experts)[:, :, number]
    half = b.shape[0] // 2
    return {"a": a, "b": {GATE: b[:half], UP: b[half:]}.get(kind, b)}

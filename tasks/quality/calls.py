"""calls: what the modules of a model are given while it runs: seen, and left as it is.

Modules are those that can be quantized, of any class: linear layers, experts, embeddings. A *call*
is known by its number, of all calls while a segment runs: a model's code makes the same ones in
the same order for each sequence of a length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import msgspec

from tasks.quality.products import Products
from tasks.tensors import mx

_NONE: Products = {}


class Call(msgspec.Struct, frozen=True):
    """One call of a module, while a segment runs.

    Attributes:
        number: its place among all calls meanwhile, from 0.
        path: the module's.
        shape: the module's weight, (…, rows, channels), without its rows: (…, channels). Of an
            embedding that is looked up, which reads rows by their number: (rows,).
        is_lookup: whether it is that.
        same_as: the number of the first call that is given the very same, if it is not this one.
    """

    number: int
    path: str
    shape: tuple[int, ...]
    is_lookup: bool = False
    same_as: int | None = None

    @property
    def matrices(self) -> int:
        """Of how many matrices the weight is made up: experts, or heads."""
        return 1 if self.is_lookup else prod(self.shape[:-1])


class Seen(NamedTuple):
    """What a module is given in a call; nothing of it need be evaluated yet.

    Attributes:
        call: the call.
        inputs: (tokens, channels); where a weight is made up of matrices for one head each,
            (heads, tokens, channels); of a lookup, the numbers of rows, (tokens,).
        experts: of a weight that is made up of experts, the one that each input is for: (tokens,).
    """

    call: Call
    inputs: mx.array
    experts: mx.array | None = None

    def aligned(self, made: mx.array) -> mx.array:
        """Return what a module makes, or a gradient by it, as the inputs: (…, tokens, width)."""
        width = made.shape[-1]
        if self.inputs.ndim < 3:
            return made.reshape(-1, width)
        return mx.moveaxis(made, -3, 0).reshape(*self.inputs.shape[:-1], width)


See = Callable[[Seen], None]
Pass = Callable[[int, "mx.array"], "mx.array"]


class Watch:
    """Watches the modules of a model."""

    def __init__(self, model: Any, products: Products = _NONE) -> None:
        """Watch a model.

        Args:
            model: the library's.
            products: what computes some modules in place of their own methods.
        """
        self._products = products
        self._see: See | None = None
        self._pass: Pass | None = None
        self._number = 0
        self._first: dict[tuple[int, ...], tuple[int, tuple[Any, ...]]] = {}
        for path, module in model.named_modules():
            if hasattr(module, "to_quantized") and "weight" in module:
                self._watch(path, module)

    @contextmanager
    def seeing(self, see: See, through: Pass | None = None) -> Iterator[None]:
        """Have ``see`` called with what each module is given in the block.

        Args:
            see: called with that.
            through: what each module makes goes through it: called with the call's number.
        """
        self._see, self._pass, self._number = see, through, 0
        try:
            yield
        finally:
            self._see = self._pass = None
            self._first.clear()

    def _watch(self, path: str, module: Any) -> None:
        kind = type(module)
        of = (kind.__module__, kind.__name__)

        def watched(name: str) -> Callable[..., Any]:
            method = getattr(kind, name)
            product = self._products.get((of, name), method)

            def call(module: Any, x: mx.array, *args: Any, **named: Any) -> Any:
                number, self._number = self._number, self._number + 1
                if self._see:
                    self._note(number, path, module.weight, x, args, named)
                made = product(module, x, *args, **named)
                return self._pass(number, made) if self._pass else made

            return call

        names = (name for name in ("__call__", "as_linear") if hasattr(kind, name))
        methods = {name: watched(name) for name in names}
        object.__setattr__(module, "__class__", type(kind.__name__, (kind,), methods))

    def _note(
        self,
        number: int,
        path: str,
        weight: mx.array,
        x: mx.array,
        args: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> None:
        assert self._see
        *lead, rows, channels = weight.shape
        given = (x, *args, *named.values())  # held, so that no other has its number
        first, _ = self._first.setdefault(tuple(map(id, given)), (number, given))
        same_as = None if first == number else first
        call = Call(number, path, (*lead, channels), same_as=same_as)
        if mx.issubdtype(x.dtype, mx.integer):
            self._see(Seen(Call(number, path, (rows,), is_lookup=True), x.reshape(-1)))
        elif x.shape[-1] != channels:
            return  # by a weight that is transposed: its channels are not those of the inputs
        elif not lead:
            self._see(Seen(call, x.reshape(-1, channels)))
        elif _is_indices(indices := named.get("indices", next(iter(args), None))):
            self._see(Seen(call, *_of_experts(x, indices)))
        elif not args and not named and x.shape[-3:-2] == tuple(lead):
            self._see(Seen(call, mx.moveaxis(x, -3, 0).reshape(*lead, -1, channels)))


def _is_indices(value: Any) -> bool:
    return isinstance(value, mx.array) and bool(mx.issubdtype(value.dtype, mx.integer))


def _of_experts(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array]:
    """Return inputs, (tokens, channels), and the expert of each, as ``mx.gather_mm`` pairs them.

    Args:
        x: (…, rows, channels).
        indices: of experts, (…): both are broadcast.
    """
    lead = mx.broadcast_shapes(x.shape[:-2], indices.shape)
    rows, channels = x.shape[-2:]
    inputs = mx.broadcast_to(x, (*lead, rows, channels)).reshape(-1, channels)
    return inputs, mx.broadcast_to(indices[..., None], (*lead, rows)).reshape(-1)

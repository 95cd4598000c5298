"""products: what computes modules on a CPU, where MLX's kernels are slow, or there are none.

Each is given a module and what the module's own method is given, and returns what that would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from tasks.tensors import blas, mx

LINEAR = ("mlx.nn.layers.linear", "Linear")
EMBEDDING = ("mlx.nn.layers.embedding", "Embedding")
EXPERTS = ("mlx_lm.models.switch_layers", "SwitchLinear")

Method = tuple[tuple[str, str], str]  # a class's module and name, and the method's name
Products = Mapping[Method, Callable[..., "mx.array"]]  # a start does without MLX


def linear(module: Any, x: mx.array) -> mx.array:
    """Return what a linear layer makes, or an embedding that is used as one, by NumPy.

    So is the gradient by what it is given. By its parameters there is none.

    Args:
        module: with a weight, (rows, columns), and perhaps a bias, (rows,).
        x: (…, columns).
    """

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return blas.linear(module, x)

    @product.vjp
    def gradient(x: mx.array, by_made: mx.array, made: mx.array) -> mx.array:
        return blas.product(by_made, module.weight).astype(x.dtype)

    return cast("mx.array", product(x))


def experts(module: Any, x: mx.array, indices: mx.array, **named: Any) -> mx.array:
    """Return what experts make, in the type that MLX makes of both, by products of float32.

    MLX has none of another type on a CPU; of float32, this is what mlx-lm's own makes, to the bit.

    Args:
        module: with a weight, (experts, rows, columns), and perhaps a bias, (experts, rows).
        x: (…, 1, columns).
        indices: of experts, (…).
        named: what ``mx.gather_mm`` is told besides.
    """
    wide, weight = (each.astype(mx.float32) for each in (x, module.weight))
    made = mx.gather_mm(wide, weight.swapaxes(-1, -2), rhs_indices=indices, **named)
    made = made.astype(mx.result_type(x, module.weight))
    return made + mx.expand_dims(module.bias[indices], -2) if "bias" in module else made


ON_CPU: Products = {(EXPERTS, "__call__"): experts}
# What looks into a model may differ in the last bits from what MLX would make.
BY_NUMPY: Products = {
    **ON_CPU, (LINEAR, "__call__"): linear, (EMBEDDING, "as_linear"): linear
}  # fmt: skip

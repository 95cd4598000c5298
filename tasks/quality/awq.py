"""awq: scales and clips by which weights lose least when they are rounded.

AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978): columns that are given large inputs are
multiplied by more than others before they are rounded, what makes their inputs is divided by the
same, and large weights of a group are cut off where the others gain by it. The paper runs a block
for each candidate. Here, what a layer makes changes by ``tr(E H Eᵀ)``, where E is the error of its
weights and H the sum of the products of its inputs' channels: candidates cost no run.

Arrays are NumPy's, whose BLAS is the faster one on a CPU, or MLX's, of a GPU's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tasks.tensors import blas, mx
from tasks.tensors.device import BLOCK_BYTES

GRID = 20  # candidates for a scale: powers 0, 1/20, … of what channels are given
CLIPS = 10  # of a clip: all of a group, 19/20 of it, …
ROWS = 512  # of a weight, spread over it, by which scales are judged
LEAST = 1e-4  # of what is given, before it is raised to a power

Array = Any  # np.ndarray or mx.array: MLX is not to be imported for this


class Rounding(NamedTuple):
    """How a weight will be rounded: ``mx.quantize``'s arguments, and the weight's dtype."""

    group_size: int
    bits: int
    mode: str
    dtype: str

    def of(self, weight: Array) -> Array:
        """Return rows as they are once they are rounded: (rows, columns), float32."""
        if not isinstance(weight, np.ndarray):
            return self._of(weight)
        with mx.stream(mx.cpu):
            return np.array(self._of(mx.array(weight)))

    def _of(self, weight: mx.array) -> mx.array:
        size, bits, mode = self.group_size, self.bits, self.mode
        packed = mx.quantize(weight.astype(getattr(mx, self.dtype)), size, bits, mode)
        made = mx.dequantize(*packed, group_size=size, bits=bits, mode=mode)
        return made.astype(mx.float32)


class Columns(NamedTuple):
    """A weight whose columns are to be scaled, or one expert's.

    Attributes:
        weight: (rows, columns), float32.
        hessian: the sum of the products of what it is given: (columns, columns), float32.
        rounding: how it will be rounded.
        rows: which of the scales is for each column: (columns,).
    """

    weight: Array
    hessian: Array
    rounding: Rounding
    rows: np.ndarray


def best_scale(given: Sequence[Callable[[], Columns]], count: int) -> np.ndarray:
    """Return the scales by which weights lose least: (count,), float32; 1 where none gains.

    Args:
        given: what reads each of the weights, of which one is held at a time.
        count: of scales.
    """
    blas.one_thread()
    squares = np.zeros(count)
    for read in given:
        each = read()
        diagonal = np.array(_module(each.hessian).diag(each.hessian))
        np.add.at(squares, each.rows, diagonal.astype(np.float64))
    if not squares.any() or not np.isfinite(squares).all():
        return np.ones(count, np.float32)
    size = np.maximum(np.sqrt(squares / squares.mean()), LEAST)
    scales = [_centred(size ** (at / GRID)) for at in range(GRID)]
    losses = [0.0] * GRID
    for read in given:
        each = read()
        each = each._replace(weight=_spread(each.weight, len(given)))
        losses = [
            loss + _loss(each, scale[each.rows]) for loss, scale in zip(losses, scales, strict=True)
        ]
    best, least = np.ones(count, np.float32), np.inf
    for scale, loss in zip(scales, losses, strict=True):
        if loss < least:
            best, least = scale, loss
    return best


def _centred(scale: np.ndarray) -> np.ndarray:
    centred: np.ndarray = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
    return centred


def _module(array: Array) -> Any:
    return np if isinstance(array, np.ndarray) else mx


def _spread(weight: Array, share: int) -> Array:
    """Return a part of a weight's rows, spread over them."""
    step = -(-len(weight) // max(ROWS // max(1, share // 4), 32))
    return _whole(weight[::step]) if step > 1 else weight


def _whole(array: Array) -> Array:
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array


def _loss(given: Columns, scale: np.ndarray) -> float:
    factors = _module(given.weight).array(scale)
    error = given.rounding.of(given.weight * factors) / factors - given.weight
    return float(_module(error).inner((error @ given.hessian).reshape(-1), error.reshape(-1)))


def own_blocks(hessian: Array, size: int, scale: Array | None) -> Array:
    """Return what of a Hessian is of each group by itself: (groups, size, size).

    Args:
        hessian: (columns, columns).
        size: of a group.
        scale: by which columns are divided: (columns,); None if they are not.
    """
    groups = len(hessian) // size
    at = _module(hessian).arange(groups)
    blocks = hessian.reshape(groups, size, groups, size)[at, :, at]
    if scale is None:
        return blocks
    return blocks / scale.reshape(groups, 1, size) / scale.reshape(groups, size, 1)


def best_clips(weight: Array, blocks: Array, rounding: Rounding) -> np.ndarray:
    """Return how far each group is cut off, in steps of 1/20 of its largest: (rows, groups), uint8.

    Args:
        weight: (rows, columns), float32, scaled.
        blocks: what ``own_blocks`` returns of what it is given, scaled.
        rounding: how it will be rounded.
    """
    blas.one_thread()
    groups = len(blocks)
    at_once = BLOCK_BYTES["cpu" if isinstance(weight, np.ndarray) else "gpu"]
    step = max(1, at_once // max(1, weight[:1].nbytes))
    clips = np.zeros((len(weight), groups), np.uint8)
    for start in range(0, len(weight), step):
        best = _clips(weight[start : start + step], blocks, rounding)
        clips[start : start + step] = np.array(best).T
    return clips


def _clips(weight: Array, blocks: Array, rounding: Rounding) -> Array:
    """Return the same of a block of rows, transposed; ``blocks``: (groups, size, size)."""
    groups, size, _ = blocks.shape
    module = _module(weight)
    least = module.full((groups, len(weight)), np.inf, module.float32)
    best = module.zeros(least.shape, module.uint8)
    for step in range(CLIPS):
        steps = module.full((len(weight), groups), step, module.uint8)
        error = rounding.of(clip(weight, steps)) - weight
        by_group = _whole(error.reshape(-1, groups, size).transpose(1, 0, 2))
        loss = module.einsum("grc,grc->gr", by_group @ blocks, by_group)
        best = module.where(loss < least, module.array(step, module.uint8), best)
        least = module.minimum(loss, least)
    return best


def clip(weight: Array, steps: Array) -> Array:
    """Return rows whose groups are cut off.

    Args:
        weight: (rows, columns), float32.
        steps: (rows, groups): of 1/20 of the largest of a group.
    """
    module = _module(weight)
    by_group = weight.reshape(*steps.shape, -1)
    most = module.abs(by_group).max(axis=-1, keepdims=True)
    most = most * (1 - steps.astype(module.float32) / GRID)[..., None]
    return module.clip(by_group, -most, most).reshape(weight.shape)

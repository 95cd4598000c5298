"""error: what quantizing took from each weight, against the weight as it was cast."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING

from cache.records.manifests import Manifest, Tensor
from tasks.stages.quantize_scheme import Setting, parts
from tasks.tensors import arrays, mx, rows
from tasks.tensors.device import BLOCK_BYTES, device_of
from tasks.tensors.kernels import even_rows
from tasks.tensors.rows import Rows

if TYPE_CHECKING:
    from tasks.execution.builder import Builder, Made
    from tasks.planning.plan import Needed, Node, Plan

VERSION = 1
CAST, QUANTIZE = "cast:", "quantize:"  # what the inputs' names begin with
NORM, ERROR_NORM = "norm", "error_norm"


def make(builder: Builder, plan: Plan, node: Node, needed: Needed) -> Made:
    """Compare a layer's quantized weights with what they were made of.

    Makes two vectors of one number a weight, in the order of the sorted names: ``norm``, the
    Frobenius norm of the cast weight, and ``error_norm``, that of the difference.
    """
    before = _of_stage(needed, CAST)
    after = _of_stage(needed, QUANTIZE)
    builder.fetch(plan, after, after)
    for _, tensor in after.values():  # it may lie in a file of build/, to be altered by hand
        builder.store.blobs.drop_if_wrong(tensor.digest)
    norms, error_norms = [], []
    for name, told in sorted(node.params["compared"].items()):
        setting = Setting(*told)
        original = builder.rows(plan, before, name)
        packed = [builder.rows(plan, after, part) for part in parts(name, setting)]
        norm, error_norm = _compare(builder, original, packed, setting, node.params["device"])
        norms.append(norm)
        error_norms.append(error_norm)
    return {
        NORM: _vector(builder, norms),
        ERROR_NORM: _vector(builder, error_norms),
    }, []


def figures(manifest: Manifest, read: dict[str, bytes]) -> dict[str, tuple[float, float]]:
    """Return the two norms of each weight, by name.

    Args:
        manifest: what ``make`` made.
        read: the bytes of its tensors.
    """
    names = sorted(manifest.action.params["compared"])
    vectors = [struct.unpack(f"<{len(names)}f", read[part]) for part in (NORM, ERROR_NORM)]
    return dict(zip(names, zip(*vectors, strict=True), strict=True))


def dequantize(packed: Sequence[mx.array], setting: Setting) -> mx.array:
    """Return what rows of a quantized weight stand for, in the dtype that MLX gives it.

    Args:
        packed: as ``tasks.tensors.kernels.quantize`` returns it: (rows, …) each.
        setting: how it was quantized.
    """
    weight, scales, *rest = map(even_rows, packed)
    biases = rest[0] if rest else None
    return mx.dequantize(weight, scales, biases, **setting._asdict())[: len(packed[0])]


def _of_stage(needed: Needed, prefix: str) -> Needed:
    return {
        name.removeprefix(prefix): found
        for name, found in needed.items()
        if name.startswith(prefix)
    }  # fmt: skip


def _compare(
    builder: Builder, original: Rows, packed: Sequence[Rows], setting: Setting, backend: str
) -> tuple[float, float]:
    """Return the Frobenius norms of a weight, and of what quantizing changed in it."""
    device = device_of(backend)
    squares = error_squares = 0.0
    for start, stop in rows.spans(original, BLOCK_BYTES[device]):
        block = original.read(start, stop)
        quantized = [part.read(start, stop) for part in packed]
        if device == "gpu":
            for array in (block, *quantized):
                arrays.share(array)
        with mx.stream(builder.streams.get(device)):
            wide = block.astype(mx.float32)
            restored = dequantize(quantized, setting).astype(mx.float32)
            sums = [_group_sums(array, setting) for array in (wide, wide - restored)]
            mx.eval(sums)
        with mx.stream(builder.streams.get("cpu")):  # the only device that has float64
            here, error_here = (mx.sum(some.astype(mx.float64)) for some in sums)
            mx.eval(here, error_here)
        squares += float(here)
        error_squares += float(error_here)
    return sqrt(squares), sqrt(error_squares)


def _group_sums(array: mx.array, setting: Setting) -> mx.array:
    """Return the sum of squares of each group: so few that float32 holds it well."""
    return mx.sum(mx.square(array.reshape(-1, setting.group_size)), axis=-1)


def _vector(builder: Builder, numbers: Sequence[float]) -> Tensor:
    data = memoryview(struct.pack(f"<{len(numbers)}f", *numbers))
    with builder.store.blobs.writing(data.nbytes) as writer:
        writer.write(data)
    return Tensor("float32", (len(numbers),), writer.digest)

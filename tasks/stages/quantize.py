"""quantize: the modules that the target says, and mlx-lm would, as ``mx.quantize`` packs them."""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from typing import TYPE_CHECKING

from cache.records.manifests import Tensor
from tasks.stages.quantize_scheme import Setting, parts
from tasks.tensors import arrays, kernels, mx, rows
from tasks.tensors.device import BLOCK_BYTES, device_of
from tasks.tensors.rows import Rows

if TYPE_CHECKING:
    from tasks.execution.builder import Builder, Made
    from tasks.execution.draft import Draft
    from tasks.planning.plan import Needed, Node, Plan

VERSION = 1
# A block, and what is made of it: on a CPU on the way to fp4, which takes the most.
IN_FLIGHT_BLOCKS = {"cpu": 10, "gpu": 8}
SLICES = 16  # MLX's own takes 40 times what it is given, for fp4 on a CPU: so 40/16 of a block


def memory(backend: str) -> int:
    """Return the bytes that work on one weight takes: a few blocks, however large it is."""
    device = device_of(backend)
    return IN_FLIGHT_BLOCKS[device] * BLOCK_BYTES[device]


def make(builder: Builder, plan: Plan, node: Node, needed: Needed) -> Made:
    """Quantize a layer."""
    made: dict[str, Tensor] = {}
    notes = []
    draft = builder.drafts.begin(builder, plan) if node.params["settings"] else None
    for name in needed:
        if name not in node.params["settings"]:
            made[name] = builder.kept(plan, needed, name)
            continue
        setting = Setting(*node.params["settings"][name])
        whole = builder.rows(plan, needed, name)
        packed, finite = _quantize_rows(builder, draft, name, whole, setting, node.params["device"])
        if not finite:
            notes.append(f"{name} holds NaN or infinity, which no quantized weight can show")
        made |= packed
    return made, notes


def _quantize_rows(
    builder: Builder, draft: Draft | None, name: str, whole: Rows, setting: Setting, backend: str
) -> tuple[dict[str, Tensor], bool]:
    """Quantize the weight ``name``; return its parts, and whether all of it was finite."""
    blobs = builder.store.blobs
    device = device_of(backend)
    stream = builder.streams.get(device)
    names = parts(name, setting)
    finite = True
    packed: tuple[mx.array, ...] = ()
    with ExitStack() as stack:
        packed_bytes = prod(whole.shape) * setting.bits // 8
        writers = [
            stack.enter_context(draft.writing(part) if draft else blobs.writing(packed_bytes))
            for part in names
        ]
        for start, stop in rows.spans(whole, BLOCK_BYTES[device]):
            block = _read(builder, whole, start, stop, device)
            with mx.stream(stream):
                packed, made, all_finite = _quantize_block(block, setting, device)
            for writer, data in zip(writers, made, strict=True):
                writer.write(data)
            finite = finite and all_finite
    return {
        name: Tensor(arrays.dtype_name(part), (*whole.shape[:-1], part.shape[-1]), writer.digest)
        for name, part, writer in zip(names, packed, writers, strict=True)
    }, finite


def _quantize_block(
    block: mx.array, setting: Setting, device: str
) -> tuple[tuple[mx.array, ...], list[memoryview], bool]:
    """Quantize rows; return their parts, the bytes of these, and whether all rows were finite."""
    told = setting._asdict()
    if device == "cpu" and kernels.agrees(block.dtype, **told):
        packed, large = kernels.quantize_fast(block, **told)
        made = arrays.views(packed, large, together=False)
        if not large.item():
            return packed, made, True
    if device == "cpu":
        packed = _quantize_slices(block, setting)
    else:
        packed = kernels.quantize(block, **told)
    odd = kernels.not_finite(block)
    made = arrays.views(packed, odd, together=device == "gpu")
    return packed, made, not odd.item()


def _quantize_slices(block: mx.array, setting: Setting) -> tuple[mx.array, ...]:
    """Quantize rows as MLX's own does, so few at a time that it takes no more memory."""
    step = 2 * max(1, len(block) // (2 * SLICES))
    slices = []
    for start in range(0, len(block), step):
        some = block[start : start + step]
        parts = kernels.quantize(kernels.even_rows(some), **setting._asdict())
        slices.append([part[: len(some)] for part in parts])
        mx.eval(slices[-1])
    return tuple(mx.concatenate(list(parts)) for parts in zip(*slices, strict=True))


def _read(builder: Builder, whole: Rows, start: int, stop: int, device: str) -> mx.array:
    """Return rows of a weight, where ``device`` can read them, until the next are asked for."""
    if isinstance(whole, rows.Stored):
        with mx.stream(builder.streams.get(device)):
            return whole.read(start, stop, builder.streams.memory(BLOCK_BYTES[device]))
    block = whole.read(start, stop)  # joined or cast: the CPU's
    if device == "gpu":
        arrays.share(block)
    return block

"""sizes: what an action will make, read and write, known before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cache.records.manifests import Tensor
from tasks.stages import measure, unshard

if TYPE_CHECKING:
    from tasks.execution.builder import Builder
    from tasks.planning.plan import Node, Plan


@dataclass(frozen=True)
class Moved:
    """Bytes.

    Attributes:
        read: from the checkpoint and the cache.
        written: into the cache, or into build/.
        fetched: from the remote into the cache.
    """

    read: int = 0
    written: int = 0
    fetched: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.read + other.read, self.written + other.written, self.fetched + other.fetched
        )


def total(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def made(node: Node) -> dict[str, Tensor]:
    """Return what a node makes, without the digests."""
    told = node.params
    if node.stage in ("extract", "unshard"):
        return {name: Tensor(t[0], tuple(t[1]), "") for name, t in told["tensors"].items()}
    if node.stage == "error":
        vector = Tensor("float32", (len(told["compared"]),), "")
        return {measure.NORM: vector, measure.ERROR_NORM: vector}
    (need,) = node.needs
    tensors = made(need)
    if node.stage == "cast":
        return {n: Tensor(told["dtypes"].get(n, t.dtype), t.shape, "") for n, t in tensors.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in told["settings"]:
            found |= _quantized(name, tensor, *told["settings"][name])
        else:
            found[name] = tensor
    return found


def outline(plan: Plan) -> dict[str, tuple[Node, Tensor]]:
    """Return the tensors of a built model: who makes each, and what it is, without the digest."""
    return {
        name: (node, tensor)
        for node in plan.stages["quantize"]
        for name, tensor in made(node).items()
    }


def _quantized(
    name: str, tensor: Tensor, group_size: int, bits: int, mode: str
) -> dict[str, Tensor]:
    *rows, columns = tensor.shape
    prefix = name.removesuffix("weight")
    scales = (*rows, columns // group_size)
    parts = {name: Tensor("uint32", (*rows, columns * bits // 32), "")}
    if mode != "affine":
        return parts | {f"{prefix}scales": Tensor("uint8", scales, "")}
    return parts | {
        prefix + part: Tensor(tensor.dtype, scales, "") for part in ("scales", "biases")
    }


def changed(node: Node) -> set[str]:
    """Return the names of those tensors of a layer that are not just passed on."""
    told = node.params
    if node.stage == "extract":
        return set()
    if node.stage == "error":
        return {measure.NORM, measure.ERROR_NORM}
    if node.stage == "unshard":
        return {name for name, (*_, steps) in told["tensors"].items() if _joined(steps)}
    return set(told["dtypes"] if node.stage == "cast" else told["settings"])


def new(node: Node) -> dict[str, Tensor]:
    """Return of what cast or quantize makes that which it does not pass on, without the digests."""
    passed = made(node.needs[0]).keys() - changed(node)
    return {name: tensor for name, tensor in made(node).items() if name not in passed}


def reads(builder: Builder, node: Node) -> set[str]:
    """Return the names of the tensors whose bytes a node's action asks for."""
    if node.stage == "unshard":
        return {key for name in changed(node) for key in node.params["tensors"][name][2]}
    if node.stage == "cast" and not builder.keeps("cast"):
        return changed(node)
    return set(_read(node))


def moved(builder: Builder, plan: Plan, node: Node) -> Moved:
    """Return how many bytes a node's action reads and writes, if nothing of it is there yet."""
    if node.stage == "extract":
        stored = {key: plan.checkpoint.stored[key].nbytes for key in node.params["tensors"]}
        copied = sum(n for key, n in stored.items() if plan.checkpoint.must_copy(key))
        return Moved(sum(stored.values()), copied)
    if node.stage == "error":
        return Moved(total(_read(node).values()), total(made(node).values()))
    after, before = made(node), made(node.needs[0])
    work = changed(node)
    if node.stage == "unshard":
        size = total(after[name] for name in work)
        kept = {n for n in work if _by_mlx_lm(node, n) or builder.keeps("unshard")}
        kept = {n for n in kept if not _in_place(node, n)}
        return Moved(size, total(after[name] for name in kept))
    # What is passed on is copied where the stages before did not keep it.
    late = {n for n in reads(builder, node) - work if not _kept(builder, node.needs[0], n)}
    copied = total(before[name] for name in late)
    kept_new = total(new(node).values()) if builder.keeps(node.stage) else 0
    return Moved(total(before[name] for name in work) + copied, kept_new + copied)


def _read(node: Node) -> dict[str, Tensor]:
    """Return the tensors that a node is given, without the digests."""
    given = node.given({need: made(need) for need in node.needs})
    return {name: tensor for name, (_, tensor) in given.items()}


def _kept(builder: Builder, node: Node, name: str) -> bool:
    """Tell whether a tensor's bytes are in the cache once the node's action ran."""
    if builder.keeps(node.stage):
        return True
    if name in changed(node):
        return node.stage == "unshard" and (_by_mlx_lm(node, name) or _in_place(node, name))
    return node.stage == "unshard" or _kept(builder, node.needs[0], name)


def _by_mlx_lm(node: Node, name: str) -> bool:
    told: Mapping[str, Any] = node.params["tensors"]
    return unshard.sanitized(told[name][3])


def _in_place(node: Node, name: str) -> bool:
    """Tell whether a tensor lies in the checkpoint, piece after piece: it is not copied."""
    steps = node.params["tensors"][name][3]
    return all(step in (["same"], ["concatenate", 0], ["stack", 0]) for step in steps)


def _joined(steps: list[Any]) -> bool:
    """Tell whether steps make anything, beside comparing copies."""
    return bool(steps[1:] if steps and steps[0][0] == "same" else steps)

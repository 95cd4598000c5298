"""bundle: ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.digest import digest, digest_list, digest_record
from cache.records.manifests import Action, Tensor
from tasks.core.errors import BuildError
from tasks.execution.builder import Builder
from tasks.layouts import LAYOUTS
from tasks.planning import sizes
from tasks.planning.plan import Needed, Plan

if TYPE_CHECKING:
    from tasks.execution.builder import Builder
    from tasks.planning.plan import Node, Plan
if TYPE_CHECKING:
    from cache.blobs import Blobs

VERSION = 1


Weights = dict[str, list[tuple[str, Tensor]]]  # weight files' tensors, in order


def shards(
    tensors: Sequence[tuple[str, Tensor]], max_shard_bytes: int
) -> list[list[tuple[str, Tensor]]]:
    """Split tensors into weight files, greedily and in order, as the peers do.

    A tensor over the limit gets a file of its own; no file is empty.

    Args:
        tensors: all of the model's, by name, in order.
        max_shard_bytes: most that a file's tensors have together.
    """
    found: list[list[tuple[str, Tensor]]] = []
    size = 0
    for name, tensor in tensors:
        if not found or size + tensor.nbytes > max_shard_bytes:
            found.append([])
            size = 0
        found[-1].append((name, tensor))
        size += tensor.nbytes
    return found


def split(plan: Plan, tensors: Mapping[str, Tensor]) -> Weights:
    """Return a target's weight files by name, each with its tensors in order."""
    found = shards([(name, tensors[name]) for name in plan.names], plan.target.max_shard_bytes)
    return dict(zip(LAYOUTS[plan.target.layout].shard_names(len(found)), found, strict=True))


@dataclass(frozen=True)
class Content:
    """What a target's folder will hold.

    Attributes:
        action: the action of packing it.
        weights: the tensors of each weight file.
        small: the other files.
    """

    action: Action
    weights: Weights
    small: dict[str, bytes]

    @classmethod
    def of(cls, builder: Builder, plan: Plan, needed: Needed) -> Content:
        """Work it out.

        Raises:
            BuildError: the layers are not those of the plan.
        """
        if missing := set(plan.names) ^ needed.keys():
            raise BuildError(
                f"{plan.target.name}: the plan and the built layers disagree on "
                f"{', '.join(sorted(missing)[:3])}. Run doit forget -a, then doit."
            )
        layout = LAYOUTS[plan.target.layout]
        tensors = {name: needed[name][1] for name in plan.names}
        weights = split(plan, tensors)
        sizes = [[(name, tensor.nbytes) for name, tensor in shard] for shard in weights.values()]
        small = layout.files(plan.checkpoint, builder.store.memos, sizes, plan.weights)
        small["config.json"] = json.dumps(plan.config, indent=4).encode()
        params = {
            "format": layout.weight_format.name,
            "weights": {file: [name for name, _ in shard] for file, shard in weights.items()},
            "files": {name: digest(data) for name, data in small.items()},
        }
        inputs = {name: tensor.record for name, tensor in tensors.items()}
        return cls(Action("pack", VERSION, params, inputs), weights, small)

    @property
    def weights_nbytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for shard in self.weights.values() for _, tensor in shard)

    @property
    def nbytes(self) -> int:
        """Size, but for the weight files' headers."""
        return self.weights_nbytes + sum(map(len, self.small.values()))


def told(plan: Plan) -> dict[str, Any]:
    """Return what a target's packing is told, short enough to be kept and shown."""
    return {
        "mlx-make's pack": VERSION,
        "layout": plan.target.layout,
        "max_shard_size": plan.target.max_shard_bytes,
        "config.json": digest(json.dumps(plan.config).encode()),
        "names of tensors": digest_record(plan.names),
        "notes": digest_record(plan.notes),
    }


def whole_files(
    blobs: Blobs, content: Content, known: Mapping[str, Tensor]
) -> dict[str, Path] | None:
    """Return the weight files that ``known`` tells of, or None if the cache has not all of them."""
    found = {
        file: path
        for file in content.weights
        if (tensor := known.get(file))
        and (path := blobs.whole_container(tensor.digest, tensor.nbytes))
    }
    return found if len(found) == len(content.weights) else None


def shapes(weights: Weights) -> str:
    """Return the digest of names, dtypes and shapes of weight files' tensors, in order."""
    return digest_list(
        [file, name, tensor.dtype, tensor.shape]
        for file, shard in weights.items()
        for name, tensor in shard
    )


def is_new(plan: Plan, is_made: Callable[[Node], bool]) -> bool:
    """Tell whether a target gets a draft: most bytes of it are of layers that a run quantizes.

    Not by CUDA: its threads write as fast as memory takes it, and in one file wait for each other.
    """
    last = plan.stages["quantize"]
    if any(node.params.get("device") == "cuda" for node in last):
        return False
    written = sum(sizes.total(sizes.new(node).values()) for node in last if is_made(node))
    return 2 * written > sum(sizes.total(sizes.made(node).values()) for node in last)

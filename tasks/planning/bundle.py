"""bundle: what build/TARGET will hold: weight files by name, and all other files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct

from cache.blobs import Blobs
from cache.digest import digest, digest_list, digest_record
from cache.records.manifests import Action, Manifest, Tensor, TensorSpec
from cache.records.memos import Memos
from cache.store import Store
from tasks.checkpoints.small_files import check_own
from tasks.core.errors import BuildError
from tasks.core.program import COMMAND
from tasks.core.task_names import PACK
from tasks.layouts.registry import LAYOUTS
from tasks.planning import model_card
from tasks.planning.node import Inputs, Known, Node, total
from tasks.planning.plan import Plan

VERSION = 1
MAX_OVERLAY_BYTES = 256 << 20


T = TypeVar("T", Tensor, TensorSpec)
Weights = dict[str, list[tuple[str, T]]]  # weight files' tensors, in order


def split_into_shards(
    tensors: Sequence[tuple[str, T]], max_shard_bytes: int
) -> list[list[tuple[str, T]]]:
    """Split tensors into weight files, greedily and in order, as the peers do.

    A tensor over the limit gets a file of its own; no file is empty.

    Args:
        tensors: all of the model's, by name, in order.
        max_shard_bytes: the largest size of a file's tensors together.
    """
    shards: list[list[tuple[str, T]]] = []
    size = 0
    for name, tensor in tensors:
        if not shards or size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
    return shards


def split(plan: Plan, tensors: Mapping[str, T]) -> Weights[T]:
    """Return a target's weight files by name, each with its tensors in order."""
    ordered = [(name, tensors[name]) for name in plan.names]
    shards = split_into_shards(ordered, plan.target.max_shard_bytes)
    return dict(zip(LAYOUTS[plan.target.layout].shard_names(len(shards)), shards, strict=True))


def specs(plan: Plan) -> dict[str, TensorSpec]:
    """Return the dtypes and shapes of a built model's tensors, by name."""
    return {n: spec for node in plan.last for n, spec in node.output_specs().items()}


class Bundle(Struct, frozen=True, dict=True):
    """What a target's folder will hold.

    Attributes:
        action: the action of packing it.
        weights: the tensors of each weight file.
        small: the other files.
    """

    action: Action
    weights: Weights[Tensor]
    small: dict[str, bytes]

    @classmethod
    def of(cls, plan: Plan, tensors: Mapping[str, Tensor], memos: Memos) -> Bundle:
        """Work out what a target's folder will hold.

        Args:
            plan: the target.
            tensors: what its layers made, by name.
            memos: remembers a tokenizer that had to be made.

        Raises:
            BuildError: the layers are not those of the plan.
        """
        if missing := set(plan.names) ^ tensors.keys():
            raise BuildError(
                f"{plan.target.name}: the plan and the built layers disagree on "
                f"{', '.join(sorted(missing)[:3])}. Run {COMMAND} forget -a, then {COMMAND}."
            )
        weights = split(plan, tensors)
        small = _small_files(plan, tensors, weights, memos)
        params = {
            "format": LAYOUTS[plan.target.layout].weight_format.name,
            "weights": {file: [name for name, _ in shard] for file, shard in weights.items()},
            "files": {name: digest(data) for name, data in small.items()},
        }
        inputs = {name: tensors[name].record for name in plan.names}
        return cls(Action(PACK, VERSION, params, inputs), weights, small)

    @property
    def weights_nbytes(self) -> int:
        """Size of the tensors."""
        return total(tensor for shard in self.weights.values() for _, tensor in shard)

    @cached_property
    def specs_digest(self) -> str:
        """Digest of names, dtypes and shapes of the tensors: worked out once, of thousands."""
        return specs_digest(self.weights)

    @property
    def nbytes(self) -> int:
        """Size, but for the weight files' headers."""
        return self.weights_nbytes + sum(map(len, self.small.values()))


def _small_files(
    plan: Plan, tensors: Mapping[str, Tensor], weights: Weights[Tensor], memos: Memos
) -> dict[str, bytes]:
    sizes = [[(name, tensor.nbytes) for name, tensor in shard] for shard in weights.values()]
    small = LAYOUTS[plan.target.layout].files(plan.checkpoint, memos, sizes, plan.weights)
    small |= model_card.render(plan, tensors, memos)
    small["config.json"] = json.dumps(plan.config, indent=4).encode()
    return small | overlay(plan)


def small_names(plan: Plan, memos: Memos) -> list[str]:
    """Return the names of a target's files besides the weights, in order, before it is built.

    Args:
        plan: the target.
        memos: remembers a tokenizer that had to be made.
    """
    tensors = {name: Tensor(*spec, digest="") for name, spec in specs(plan).items()}
    return [*_small_files(plan, tensors, split(plan, tensors), memos)]


def overlay(plan: Plan) -> dict[str, bytes]:
    """Return the files that ``files`` in models.toml lays over a built model, by their paths.

    Raises:
        BuildError: one would be a weight file, or is too large to be one of the small files.
    """
    folder, loaded = plan.target.files, LAYOUTS[plan.target.layout].loaded
    contents: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")) if folder else ():
        if not folder or not path.is_file() or path.name == ".DS_Store":
            continue
        name = str(path.relative_to(folder))
        if fnmatchcase(name, loaded):
            raise BuildError(
                f"{plan.target.name}: {path} would be loaded as weights, which files = … cannot "
                "bring. Take it away, or rename it."
            )
        if (size := path.stat().st_size) > MAX_OVERLAY_BYTES:
            raise BuildError(
                f"{plan.target.name}: {path} has {size:,} bytes, more than {MAX_OVERLAY_BYTES:,}: "
                "files = … is for small files. Put it into the built folder yourself: it stays."
            )
        check_own(path, folder)
        contents[name] = path.read_bytes()
    return contents


def params(plan: Plan) -> dict[str, Any]:
    """Return what a target's packing depends on, short enough to be kept and shown."""
    programs = LAYOUTS[plan.target.layout].programs(plan.checkpoint)
    return {
        "mlx-make's pack": VERSION,
        "layout": plan.target.layout,
        "max_shard_size": plan.target.max_shard_bytes,
        "config.json": digest(json.dumps(plan.config).encode()),
        "names of tensors": digest_record(plan.names),
        "notes": digest_record(plan.notes),
        "card": model_card.params(plan),
        **({"what makes its tokenizer": programs} if programs else {}),
        **({"files": _digests(overlay(plan))} if plan.target.files else {}),
    }


def _digests(files: Mapping[str, bytes]) -> str:
    return digest_record({name: digest(data) for name, data in files.items()})


def whole_files(blobs: Blobs, bundle: Bundle, known: Mapping[str, Tensor]) -> dict[str, Path]:
    """Return the paths of a target's weight files in the cache, if it has all of them whole.

    A part of them would save little, since its layers are read for the rest.

    Args:
        blobs: the cache's.
        bundle: what the target's folder will hold.
        known: weight files of an earlier build, by name.
    """
    paths = {
        file: path
        for file in bundle.weights
        if (tensor := known.get(file))
        and (path := blobs.whole_container(tensor.digest, tensor.nbytes))
    }
    return paths if len(paths) == len(bundle.weights) else {}


def recorded(store: Store, last: Path, key: str) -> Manifest | None:
    """Return what the action of ``key`` packed, if that is on record.

    Args:
        store: the cache.
        last: the manifest of what the target was last packed to: it outlasts the cache's record.
        key: of the action.
    """
    manifest = Manifest.at(last)
    if manifest and manifest.action.key == key:
        return manifest
    manifest = store.actions.read(key)
    if manifest is None and store.sharing:
        manifest = store.sharing.read(key)
    return manifest


def list_key(plan: Plan, leaves: Mapping[Node, Manifest]) -> str:
    """Return the key of the list of what a target's nodes made, known before anything is made.

    Args:
        plan: the target.
        leaves: what its leaves found.
    """
    nodes = [node for stage in plan.stages.values() for node in stage if not node.is_leaf]
    actions = [[n.stage.name, n.stage.version, n.layer, n.params.record] for n in nodes]
    return digest_record([actions, [leaves[leaf].result for leaf in plan.leaves]])


def same_weights(packed: Manifest | None, action: Action) -> dict[str, Tensor]:
    """Return an earlier packing's files if its weight files are those of ``action``, else none.

    Of another card, or another tokenizer, only the small files are others.
    """
    if packed is None or packed.action.inputs != action.inputs:
        return {}
    same = all(packed.action.params[key] == action.params[key] for key in ("format", "weights"))
    return packed.tensors if same else {}


def specs_digest(weights: Weights[T]) -> str:
    """Return the digest of names, dtypes and shapes of weight files' tensors, in order."""
    return digest_list(
        [file, name, tensor.dtype, tensor.shape]
        for file, shard in weights.items()
        for name, tensor in shard
    )


def writes_in_place(
    plan: Plan,
    is_made: Callable[[Node], bool],
    *,
    passes: bool = False,
    known: Known | None = None,
) -> bool:
    """Tell whether a target's layers write their tensors straight into its weight files.

    They do where most bytes are of layers that the run makes; but not with CUDA, whose threads
    write as fast as memory takes it, and would wait for each other in one file.

    Args:
        plan: the target.
        is_made: tells whether a node is made in this run.
        passes: whether its checkpoint does: then they do in any case, lest the disk have them
            twice.
        known: what nodes make that were asked before.
    """
    if passes:
        return True
    if plan.shared.computer.device == "cuda":
        return False
    known = {} if known is None else known
    written = sum(total(node.new_specs(known).values()) for node in plan.last if is_made(node))
    return 2 * written > sum(total(node.output_specs(known).values()) for node in plan.last)


def in_place(node: Node, *, passes: bool, known: Known | None = None) -> dict[str, TensorSpec]:
    """Return what a last node writes in its place in a weight file, where layers do.

    Args:
        node: the node.
        passes: whether its checkpoint does: then what the node only passes on is written, too.
        known: what nodes make that were asked before.
    """
    return node.output_specs(known) if passes else node.new_specs(known)


def inputs(plan: Plan, outputs: Mapping[Node, Mapping[str, Tensor]]) -> Inputs:
    """Return what packing reads, given what the target's last nodes made."""
    inputs: Inputs = {}
    for node in plan.last:
        inputs |= node.as_inputs(outputs[node])
    return inputs

"""llama: Meta's checkpoints: consolidated.NN.pth, one a model-parallel rank, and params.json.

Llama 1, 2, 3 and Code Llama. Ranks hold slices of most tensors and copies of the rest
(https://github.com/meta-llama/llama). Which axis was sliced follows from the shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache.memos import Memos
from tasks.checkpoint import Checkpoint, Stored, Whole, headers
from tasks.errors import CheckpointError
from tasks.loaders.files import numbered, read_json

PATTERN = r"consolidated\.(\d+)\.pth"
BUFFERS = ("rope.freqs",)  # worked out again by every implementation; no part of the model


def fits(folder: Path) -> bool:
    """Tell whether ``folder`` looks like one of these."""
    return any(folder.glob("consolidated.*.pth")) or (folder / "params.json").exists()


def read(folder: Path, memos: Memos) -> Checkpoint:
    """Read the checkpoint's headers.

    Raises:
        CheckpointError: a file is missing or damaged, or shards do not fit together.
    """
    paths = numbered(folder.glob("consolidated.*.pth"), PATTERN)
    if not paths:
        raise CheckpointError(
            f"source {folder} has no consolidated.NN.pth. Name the folder that has them."
        )
    params = read_json(folder / "params.json", "it gives the model's dimensions")
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if not isinstance(params.get(key), (int, float)) or params[key] <= 0:
            raise CheckpointError(
                f"{folder / 'params.json'}: {key} is {params.get(key)!r}, must be a number over 0."
            )
    tables = headers(paths, memos)
    shards = [{s.name: s for s in stored if s.name not in BUFFERS} for _, stored in tables.values()]
    expected = _shapes(folder, params, shards)
    for path, shard in zip(paths, shards, strict=True):
        if odd := shard.keys() ^ expected.keys():
            name = min(odd)
            raise CheckpointError(
                f"{path}: {name} is {'no tensor of a Llama' if name in shard else 'missing'} "
                f"({len(odd)} such). The file is of another model, or incomplete."
            )
    wholes: dict[str, Whole] = {}
    stored: dict[str, Stored] = {}
    for name, shape in expected.items():
        parts = [shard[name] for shard in shards]
        keys = tuple(f"{name}#{number}" for number in range(len(parts)))
        stored.update(zip(keys, parts, strict=True))
        wholes[name] = _join(folder, name, shape, parts, keys)
    stamps = {name: stamp for name, (stamp, _) in tables.items()}
    return Checkpoint(folder, "meta", _real(params, expected), {}, stored, wholes, stamps)


def _shapes(
    folder: Path, params: dict[str, Any], shards: list[dict[str, Stored]]
) -> dict[str, tuple[int, ...]]:
    """Return each tensor's whole shape, from params.json and, for what it leaves open, the files.

    In the order that a module of mlx-examples' llama.py lists its parameters.
    """
    dim, heads = params["dim"], params["n_heads"]
    head_dim = params.get("head_dim") or dim // heads
    kv_heads = params.get("n_kv_heads") or heads
    if params.get("moe") or any(".feed_forward.experts" in name for name in shards[0]):
        raise CheckpointError(
            f"{folder}: a mixture of experts in Meta's format is not supported. "
            "Use the model's Hugging Face checkpoint."
        )
    widths = [shard.get("layers.0.feed_forward.w1.weight") for shard in shards]
    hidden = sum(width.shape[0] for width in widths if width)
    vocab = params.get("vocab_size", -1)
    if vocab < 0:  # Llama 1 and 2 leave it open: it is the rows of the head, which are sliced
        vocab = _vocabulary(dim, shards)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim)}
    for layer in range(params["n_layers"]):
        block = {
            "attention.wq": (heads * head_dim, dim),
            "attention.wk": (kv_heads * head_dim, dim),
            "attention.wv": (kv_heads * head_dim, dim),
            "attention.wo": (dim, heads * head_dim),
            "feed_forward.w1": (hidden, dim),
            "feed_forward.w2": (dim, hidden),
            "feed_forward.w3": (hidden, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["norm.weight"] = (dim,)
    if any("output.weight" in shard for shard in shards):
        shapes["output.weight"] = (vocab, dim)
    if not hidden:
        raise CheckpointError(f"{folder}: no layers.0.feed_forward.w1.weight in its files.")
    return shapes


def _vocabulary(dim: int, shards: list[dict[str, Stored]]) -> int:
    outputs = [shard["output.weight"] for shard in shards if "output.weight" in shard]
    if outputs:
        return sum(output.shape[0] for output in outputs)
    embeddings = [shard["tok_embeddings.weight"] for shard in shards]
    if all(e.shape[1] == dim for e in embeddings):  # sliced by rows, as Llama 3 does, or whole
        return sum(e.shape[0] for e in embeddings)
    return embeddings[0].shape[0]


def _join(
    folder: Path, name: str, shape: tuple[int, ...], parts: list[Stored], keys: tuple[str, ...]
) -> Whole:
    kinds = {(part.dtype, part.shape) for part in parts}
    if len(kinds) > 1:
        told = ", ".join(f"{part.file} {part.dtype} {part.shape}" for part in parts)
        raise CheckpointError(
            f"{folder}: shards disagree on {name}: {told}. They are not of one checkpoint."
        )
    dtype, have = parts[0].dtype, parts[0].shape
    count = len(parts)
    if have == shape:  # whole in every rank
        return Whole(dtype, shape, keys, (["same"],) if count > 1 else ())
    for axis in range(len(shape)):
        sliced = list(shape)
        sliced[axis] //= count
        if have == tuple(sliced) and shape[axis] % count == 0:
            return Whole(dtype, shape, keys, (["concatenate", axis],))
    raise CheckpointError(
        f"{folder}: {name} is {have} in each of {count} shards, which make no {shape}, the shape "
        "that params.json calls for. A shard is missing, or params.json is of another model."
    )


def _real(params: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return params with what the files settle: the vocabulary's real size."""
    return {**params, "vocab_size": shapes["tok_embeddings.weight"][0]}

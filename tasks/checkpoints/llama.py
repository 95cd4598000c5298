"""llama: Meta's checkpoints: consolidated.NN.pth, one a model-parallel rank, and params.json.

Llama 1, 2, 3 and Code Llama. Ranks hold slices of most tensors and copies of the rest
(https://github.com/meta-llama/llama). Which axis was sliced follows from the shapes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.small_files import numbered, read_json
from tasks.checkpoints.source import ReadableSource
from tasks.checkpoints.stored import TORCH, Stored
from tasks.core.errors import CheckpointError

WEIGHTS: tuple[str, ...] = ("consolidated.*.pth", "consolidated.pth")  # the second alone
SMALL_FILES: tuple[str, ...] = ("params.json",)
HOLDS = "consolidated.NN.pth with params.json (Meta)"
PATTERN = r"consolidated\.(\d+)\.pth"
# Worked out again by every implementation; no part of the model. Llama 1 7B has one a layer.
BUFFER = re.compile(r"(.*\.)?rope\.freqs")
LAYERS = r"\blayers\.(\d+)\."
HEAD, EMBEDDING = "output.weight", "tok_embeddings.weight"
# What params.json must or may say, of a kind; its other keys are of no concern to a build.
REQUIRED = {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}
OPTIONAL = {"n_kv_heads": int, "head_dim": int, "rope_theta": float, "rope_scaling_factor": float}


def fits(source: ReadableSource) -> bool:
    """Tell whether a source looks like one of these."""
    if source.has("config.json"):  # beside Hugging Face's files, Meta's may lack their dimensions
        return source.has("params.json") and any(map(source.names, WEIGHTS))
    return source.has("params.json") or any(map(source.names, WEIGHTS))


def read(source: ReadableSource, memos: Memos) -> Checkpoint:
    """Read the checkpoint's headers.

    Raises:
        CheckpointError: a file is missing or damaged, or shards do not fit together.
    """
    folder = source.small_files
    names = numbered(source.location, source.names(WEIGHTS[0]), PATTERN) or source.names(WEIGHTS[1])
    if not names and (others := source.names("consolidated*.safetensors")):
        raise CheckpointError(
            f"source {folder} has Mistral's own format (params.json, {others[0]}), "
            "which is not read. Use the model's config.json and model*.safetensors."
        )
    if not names:
        raise CheckpointError(
            f"source {folder} has no consolidated.NN.pth. Name the folder that has them."
        )
    params = _params(folder / "params.json")
    tables = source.headers(names, memos)
    shards = [
        {s.name: s for s in stored if not BUFFER.fullmatch(s.name)} for _, stored in tables.values()
    ]
    _drop_tied_head(shards)
    expected = _shapes(folder, params, shards)
    for file, shard in zip(names, shards, strict=True):
        if mismatches := shard.keys() ^ expected.keys():
            name = min(mismatches)
            what = "no tensor of such a Llama" if name in shard else "missing"
            raise CheckpointError(
                f"{folder / file}: {name} is {what} ({len(mismatches)} such). The file or "
                "params.json is of another model, or the file is incomplete."
            )
    tensors: dict[str, LogicalTensor] = {}
    stored: dict[str, Stored] = {}
    for name, shape in expected.items():
        parts = [shard[name] for shard in shards]
        keys = tuple(f"{name}#{number}" for number in range(len(parts)))
        stored.update(zip(keys, parts, strict=True))
        tensors[name] = _join(folder, name, shape, parts, keys)
    stamps = {name: stamp for name, (stamp, _) in tables.items()}
    config = _real(params, expected)
    return Checkpoint(
        source, "meta", config, {}, stored, tensors, stamps, config_file="params.json"
    )


def _params(path: Path) -> dict[str, Any]:
    params = read_json(path, "it gives the model's dimensions")
    for key, kind in (REQUIRED | OPTIONAL).items():
        value = params.get(key)
        if value is None and key in OPTIONAL:
            continue
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if value is None or not number or not 0 < value < math.inf:
            what = "whole number" if kind is int else "number"
            raise CheckpointError(f"{path}: {key} is {value!r}, must be a {what} over 0.")
    vocab = params.get("vocab_size")
    if vocab is not None and type(vocab) is not int:
        raise CheckpointError(f"{path}: vocab_size is {vocab!r}, must be a whole number.")
    return params


def _drop_tied_head(shards: list[dict[str, Stored]]) -> None:
    """Drop a head that is the embedding by another name, as Meta saved Llama 3.2's."""
    pairs = [(shard.get(HEAD), shard.get(EMBEDDING)) for shard in shards]
    if all(h and e and h[1:] == e[1:] and h.offset != TORCH for h, e in pairs):
        for shard in shards:
            del shard[HEAD]


def _shapes(
    folder: Path, params: dict[str, Any], shards: list[dict[str, Stored]]
) -> dict[str, tuple[int, ...]]:
    """Return each tensor's whole shape, by params.json and, where it is silent, by the files."""
    if params.get("moe") or any(".feed_forward.experts" in name for name in shards[0]):
        raise CheckpointError(
            f"{folder}: a mixture of experts in Meta's format is not supported. "
            "Use the model's Hugging Face checkpoint."
        )
    layers = 1 + max((int(n) for s in shards for n in re.findall(LAYERS, " ".join(s))), default=-1)
    if layers != params["n_layers"]:
        raise CheckpointError(
            f"{folder}: params.json says n_layers = {params['n_layers']}, the weight files have "
            f"{layers} layers. One of them is of another model."
        )
    hidden = _rows("layers.0.feed_forward.w1.weight", shards)
    vocab = params.get("vocab_size") or -1
    if vocab < 0:  # Llama 1 and 2 leave it open: it is the rows of the head, which are sliced
        vocab = _vocabulary(params["dim"], shards)
    expected = shapes(params, hidden=hidden, vocab=vocab)
    if not any(HEAD in shard for shard in shards):
        del expected[HEAD]
    return expected


def shapes(params: dict[str, Any], *, hidden: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a Llama with a head of its own, by Meta's names.

    In the order that a module of mlx-examples' llama.py lists its parameters.

    Args:
        params: what params.json says.
        hidden: width of the feed-forward layers.
        vocab: number of tokens.
    """
    dim, heads = params["dim"], params["n_heads"]
    head_dim = params.get("head_dim") or dim // heads
    kv_heads = params.get("n_kv_heads") or heads
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, dim)}
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
    return {**shapes, "norm.weight": (dim,), HEAD: (vocab, dim)}


def _rows(name: str, shards: list[dict[str, Stored]]) -> int:
    """Return the rows of a tensor that is sliced by rows, as far as it is there."""
    return sum(shard[name].shape[0] for shard in shards if name in shard and shard[name].shape)


def _vocabulary(dim: int, shards: list[dict[str, Stored]]) -> int:
    if any(HEAD in shard for shard in shards):
        return _rows(HEAD, shards)
    shapes = [shard[EMBEDDING].shape for shard in shards if EMBEDDING in shard]
    if all(shape[1:] == (dim,) for shape in shapes):  # sliced by rows, as Llama 3 does, or whole
        return _rows(EMBEDDING, shards)
    return shapes[0][0] if shapes[0] else 0


def _join(
    folder: Path, name: str, shape: tuple[int, ...], parts: list[Stored], keys: tuple[str, ...]
) -> LogicalTensor:
    kinds = {(part.dtype, part.shape) for part in parts}
    if len(kinds) > 1:
        parts_read = ", ".join(f"{part.file} {part.dtype} {part.shape}" for part in parts)
        raise CheckpointError(
            f"{folder}: shards disagree on {name}: {parts_read}. They are not of one checkpoint."
        )
    dtype, have = parts[0].dtype, parts[0].shape
    count = len(parts)
    if have == shape:  # whole in every rank
        return LogicalTensor(dtype, shape, keys, (["same"],) if count > 1 else ())
    for axis in range(len(shape)):
        sliced = list(shape)
        sliced[axis] //= count
        if have == tuple(sliced) and shape[axis] % count == 0:
            return LogicalTensor(dtype, shape, keys, (["concatenate", axis],))
    raise CheckpointError(
        f"{folder}: {name} is {have} in each of {count} shards, which make no {shape}, the shape "
        "that params.json calls for. A shard is missing, or params.json is of another model."
    )


def _real(params: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return params with what the files settle: the vocabulary's real size."""
    return {**params, "vocab_size": shapes[EMBEDDING][0]}

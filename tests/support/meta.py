"""meta: small random checkpoints in Meta's format, one per release of Llama, in any row of shards.

A folder holds what Meta ships: `consolidated.NN.pth`, `params.json`, `tokenizer.model`. `wholes`
gives the very tensors before they are split, so that a test knows what a build must come to. What
differs from one release to the next differs here too: the axis that the embedding is split along,
grouped heads, the dtype, rotary buffers among the weights, a tied head, what `params.json` says.
"""

import base64
import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
import torch

from support.checkpoints import random_array
from tasks.checkpoints import example

VOCABULARY = 528  # a multiple of 8 and of 3; like Code Llama's, more than its tokenizer has
SPECIAL_TOKENS = 256  # that follow the ranks of Llama 3's tokenizer.model


@dataclass(frozen=True)
class Release:
    """How the checkpoint of one release of Llama is made.

    Attributes:
        params: What `params.json` says.
        embedding_axis: The axis along which `tok_embeddings` is split.
        dtype: Of all tensors.
        buffers: Rotary buffers among the weights: none, one, or one a layer.
        head: "own"; "none": no `output.weight` in the file; "alias": it is the embedding itself.
        tokenizer: The format of `tokenizer.model`.
    """

    params: Mapping
    embedding_axis: Literal[0, 1] = 1
    dtype: str = "bfloat16"
    buffers: Literal["none", "one", "each layer"] = "one"
    head: Literal["own", "none", "alias"] = "own"
    tokenizer: Literal["sentencepiece", "tiktoken"] = "sentencepiece"

    def but(self, *, params: Mapping | None = None, **changes: object) -> "Release":
        """The same with some things otherwise; `params` are laid over those there are."""
        return replace(self, params={**self.params, **(params or {})}, **changes)

    @property
    def heads(self) -> int:
        return self.params["n_heads"]

    @property
    def kv_heads(self) -> int:
        return self.params.get("n_kv_heads") or self.heads

    @property
    def layers(self) -> int:
        return self.params["n_layers"]

    @property
    def hidden(self) -> int:
        """The feed-forward width, as Meta's model code works it out."""
        hidden = int(2 * 4 * self.params["dim"] / 3)
        hidden = int(self.params.get("ffn_dim_multiplier", 1) * hidden)
        multiple = self.params["multiple_of"]
        return multiple * -(-hidden // multiple)

    @property
    def axes(self) -> dict[str, int | None]:
        """By a module's own name, the axis it is split along; None: each shard has all of it."""
        rows = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
        columns = dict.fromkeys(("wo", "w2"), 1)
        whole = dict.fromkeys(("attention_norm", "ffn_norm", "norm"))
        return {**rows, **columns, **whole, "tok_embeddings": self.embedding_axis}


# 16 heads in 8 groups, so that 8 shards are possible.
_LLAMA_2 = Release(
    {
        "dim": 128,
        "multiple_of": 64,
        "n_heads": 16,
        "n_kv_heads": 8,
        "n_layers": 2,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    }
)
_LLAMA_3 = Release(
    {
        "dim": 128,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 64,
        "n_heads": 16,
        "n_kv_heads": 8,
        "n_layers": 2,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "vocab_size": VOCABULARY,
    },
    embedding_axis=0,
    buffers="none",
    tokenizer="tiktoken",
)
# For three shards.
_THREEFOLD = {"dim": 192, "multiple_of": 192, "n_heads": 12, "n_kv_heads": 6}
# With few heads, so that there are many rotary frequencies, from fast to slow.
_WIDE_HEADS = {"n_heads": 4, "n_kv_heads": 2, "use_scaled_rope": True}

RELEASES = {
    "llama-1": Release(
        {
            "dim": 128,
            "multiple_of": 64,
            "n_heads": 8,
            "n_layers": 2,
            "norm_eps": 1e-06,
            "vocab_size": -1,
        },
        dtype="float16",
    ),
    "llama-2": _LLAMA_2,
    "llama-2-threefold": _LLAMA_2.but(params=_THREEFOLD),
    "llama-2-float32": _LLAMA_2.but(params={"n_kv_heads": None}, dtype="float32"),
    # Matrices of 4.7 and 12.6 MB, which a build works through in several blocks of rows.
    "llama-2-large": _LLAMA_2.but(
        params={"dim": 1536, "multiple_of": 192, "n_heads": 12, "n_kv_heads": 6, "n_layers": 1}
    ),
    # No vocab_size at all.
    "code-llama": Release(
        {
            "dim": 128,
            "ffn_dim_multiplier": 1.0,
            "multiple_of": 64,
            "n_heads": 8,
            "n_layers": 2,
            "norm_eps": 1e-05,
            "rope_theta": 1000000,
        }
    ),
    "llama-3": _LLAMA_3,
    "llama-3-threefold": _LLAMA_3.but(params={**_THREEFOLD, "ffn_dim_multiplier": 1.0}),
    # 3.1 scales by 8. It is told from 3.2 by its width; a width that a test can afford must say it.
    "llama-3.1": _LLAMA_3.but(params={**_WIDE_HEADS, "rope_scaling_factor": 8}),
    "llama-3.2": _LLAMA_3.but(params=_WIDE_HEADS, head="none"),
}
# The 7B of Llama 1 alone has a buffer in each layer.
RELEASES["llama-1-7b"] = RELEASES["llama-1"].but(buffers="each layer")
RELEASES["llama-3-tied"] = RELEASES["llama-3"].but(head="none")
# 3.2 as Meta saved it: two names for one tensor, which the file holds once.
RELEASES["llama-3.2-alias"] = RELEASES["llama-3.2"].but(head="alias")


def wholes(name: str) -> dict[str, mx.array]:
    """A release's tensors before they are split, in Meta's order; the same ones each time."""
    return dict(_wholes(name))


@functools.cache
def _wholes(name: str) -> dict[str, mx.array]:
    release = RELEASES[name]
    dim = release.params["dim"]
    head_dim = dim // release.heads
    shapes = {
        "tok_embeddings.weight": (VOCABULARY, dim),
        "norm.weight": (dim,),
        "output.weight": (VOCABULARY, dim),
    }
    if release.head != "own":
        del shapes["output.weight"]
    for layer in range(release.layers):
        block = {
            "attention.wq": (release.heads * head_dim, dim),
            "attention.wk": (release.kv_heads * head_dim, dim),
            "attention.wv": (release.kv_heads * head_dim, dim),
            "attention.wo": (dim, release.heads * head_dim),
            "feed_forward.w1": (release.hidden, dim),
            "feed_forward.w2": (dim, release.hidden),
            "feed_forward.w3": (release.hidden, dim),
            "attention_norm": (dim,),
            "ffn_norm": (dim,),
        }
        shapes |= {f"layers.{layer}.{module}.weight": shape for module, shape in block.items()}
    tensors = {}
    for tensor, shape in shapes.items():
        array = random_array(tensor, shape, dtype="float32")
        if tensor.endswith(("wq.weight", "wk.weight")):
            array = array * 2  # attention that looks somewhere: positions must matter
        tensors[tensor] = array.astype(getattr(mx, release.dtype))
    mx.eval(tensors)
    return tensors


def make(
    name: str,
    folder: Path,
    *,
    shards: int = 1,
    saved: Literal["plain", "views", "legacy"] = "plain",
) -> Path:
    """Write the checkpoint of a release into a folder, and return the folder.

    Args:
        name: One of `RELEASES`.
        folder: Made, with its parents.
        shards: How many `consolidated.NN.pth`.
        saved: "plain": each tensor has its own memory; "views": each is a view of the whole tensor,
            so that the file holds all of it and the slices of columns are not contiguous; "legacy":
            the format of torch before 1.6, which is no zip archive.
    """
    release = RELEASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {tensor: to_torch(array) for tensor, array in wholes(name).items()}
    for rank in range(shards):
        shard = {}
        for tensor, whole in tensors.items():
            axis = release.axes[tensor.split(".")[-2]]
            part = whole if axis is None else whole.chunk(shards, dim=axis)[rank]
            assert axis is None or part.shape[axis] * shards == whole.shape[axis]
            if saved != "views":
                part = part.clone(memory_format=torch.contiguous_format)
            shard[tensor] = part
        if release.head == "alias":
            shard["output.weight"] = shard["tok_embeddings.weight"]
        shard |= dict.fromkeys(_buffers(release), _frequencies(release))
        torch.save(
            shard,
            folder / f"consolidated.{rank:02}.pth",
            _use_new_zipfile_serialization=saved != "legacy",
        )
    (folder / "params.json").write_text(json.dumps(release.params), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(tokenizer_model(release.tokenizer))
    return folder


def to_torch(array: mx.array) -> torch.Tensor:
    """The same tensor in torch, in memory of its own."""
    dtype = getattr(torch, str(array.dtype).removeprefix("mlx.core."))
    return torch.from_numpy(np.array(array.view(mx.uint8))).view(dtype)


def _buffers(release: Release) -> list[str]:
    return {
        "none": [],
        "one": ["rope.freqs"],
        "each layer": [
            f"layers.{layer}.attention.inner_attention.rope.freqs"
            for layer in range(release.layers)
        ],
    }[release.buffers]


def _frequencies(release: Release) -> torch.Tensor:
    head_dim = release.params["dim"] // release.heads
    theta = release.params.get("rope_theta", 10000.0)
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    return (1 / theta**exponents).to(getattr(torch, release.dtype))


@functools.cache
def tokenizer_model(kind: str) -> bytes:
    """A `tokenizer.model` of a format: "sentencepiece" or "tiktoken"."""
    if kind == "sentencepiece":
        with tempfile.TemporaryDirectory() as folder:
            example.make(Path(folder, "llama"))
            return Path(folder, "llama", "tokenizer.model").read_bytes()
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b" " * n for n in range(2, 2 + VOCABULARY - SPECIAL_TOKENS - len(tokens))]
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    return b"".join(lines)

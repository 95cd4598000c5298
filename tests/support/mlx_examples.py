"""mlx_examples: a stand-in for mlx-examples' llama, to read a folder as its llama.py does.

Written anew from what that file expects: the names of the modules, the keys of `config.json` and
what stands in for those that are left out, weights in one file or in several. As there, a key that
the model has no use for is an error, and so is a weight that has no place; here one that is missing
or of another shape is an error as well.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from sentencepiece import SentencePieceProcessor


@dataclass
class Arguments:
    """What the model must be told. Anything else is a TypeError."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    rope_theta: float
    rope_traditional: bool = True


class Attention(nn.Module):
    def __init__(self, config: Arguments):
        super().__init__()
        self.head_dim = config.head_dim
        rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, rows, bias=False)
        self.wk = nn.Linear(config.dim, kv_rows, bias=False)
        self.wv = nn.Linear(config.dim, kv_rows, bias=False)
        self.wo = nn.Linear(rows, config.dim, bias=False)
        self.rope = nn.RoPE(
            config.head_dim, traditional=config.rope_traditional, base=config.rope_theta
        )

    def __call__(self, x: mx.array) -> mx.array:
        q, k, v = (self._heads(project(x)) for project in (self.wq, self.wk, self.wv))
        seen = mx.fast.scaled_dot_product_attention(
            self.rope(q), self.rope(k), v, scale=self.head_dim**-0.5, mask="causal"
        )
        return self.wo(seen.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        """(batch, length, heads · head_dim) to (batch, heads, length, head_dim)."""
        return mx.unflatten(x, -1, (-1, self.head_dim)).swapaxes(1, 2)


class FeedForward(nn.Module):
    def __init__(self, config: Arguments):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(nn.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: Arguments):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    def __init__(self, config: Arguments):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = [Block(config) for _ in range(config.n_layers)]
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def load_weights(folder: Path) -> dict[str, mx.array]:
    """All weights of a folder. One file hides the several."""
    whole = folder / "weights.npz"
    files = [whole] if whole.exists() else [*folder.glob("weights.*.npz")]
    assert files, f"no weights in {folder}"
    weights = {name: array for file in files for name, array in mx.load(str(file)).items()}
    # MLX reads an .npz through Python's zipfile, in a thread of its own, once an array is needed.
    # Where bytes(array) needs it, which holds the interpreter's lock, both wait for ever.
    mx.eval(weights)
    return weights


def load_tokenizer(folder: Path) -> SentencePieceProcessor:
    """The tokenizer, which llama.py loads together with the model.

    Raises:
        RuntimeError: it is not sentencepiece's.
    """
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def load(folder: Path) -> Llama:
    """The model in a folder.

    Raises:
        TypeError, ValueError: `config.json` or the weights are not what the model expects.
    """
    weights = load_weights(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.pop("quantization", None)
    for unused in "model_type", "multiple_of", "ffn_dim_multiplier":
        config.pop(unused, None)
    # What llama.py puts in where config.json is silent: the vocabulary from the wrong axis.
    if config.get("vocab_size", -1) < 0:
        config["vocab_size"] = weights["output.weight"].shape[-1]
    hidden = weights["layers.0.feed_forward.w1.weight"].shape[0]
    defaults = {
        "n_kv_heads": config["n_heads"],
        "head_dim": config["dim"] // config["n_heads"],
        "hidden_dim": hidden,
        "rope_theta": 10000,
    }
    model = Llama(Arguments(**{**defaults, **config}))
    if quantization is not None:
        nn.quantize(model, **quantization)
    expected = {name: array.shape for name, array in tree_flatten(model.parameters())}
    if expected != {name: array.shape for name, array in weights.items()}:
        mismatches = sorted(expected.items() ^ {n: a.shape for n, a in weights.items()}.items())
        raise ValueError(f"{folder}: names or shapes are not the model's: {mismatches[:3]}")
    model.update(tree_unflatten(list(weights.items())))
    return model

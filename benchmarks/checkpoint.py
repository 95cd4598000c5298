"""checkpoint: write a Llama of any size with random weights, for benchmarks and tests.

The default shape is TinyLlama's: 1.1 B parameters, 2.2 GB in bfloat16. One call writes a Hugging
Face folder and, with --meta, its twin in Meta's format: the same weights under Meta's names, the
rows of wq and wk in interleaved rotary order, split over shards as Meta splits them. Both are
written tensor by tensor, so that a checkpoint larger than memory can be made.

    python benchmarks/checkpoint.py /tmp/tiny-llama --meta /tmp/tiny-llama-meta

Weights are normal with standard deviation 0.02 (norms: around 1), each drawn with a seed of its
name, so that one layer is the same whatever else is written.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # as safetensors spells them
NORM_EPS = 1e-5
ROPE_THETA = 10000.0
TOKENS = 512  # of the tokenizer; the model's vocabulary may be larger, as with padded ones
DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """The size of a Llama, in the words of Hugging Face's config.json."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    def check(self, *, shards: int) -> None:
        """Refuses a size that no Llama has, or that does not split into that many shards.

        Raises:
            ValueError: naming the sizes and the rule that they break.
        """
        for name, whole, part in [
            ("hidden", self.hidden, 2 * self.heads),
            ("heads", self.heads, self.kv_heads),
            ("kv-heads", self.kv_heads, shards),
            ("hidden", self.hidden, shards),
            ("intermediate", self.intermediate, shards),
            ("vocab", self.vocab, shards),
        ]:
            if whole % part:
                raise ValueError(f"--{name} {whole} is not a multiple of {part}")
        if self.vocab < TOKENS:
            raise ValueError(f"--vocab {self.vocab} is less than the tokenizer's {TOKENS} tokens")


@dataclass(frozen=True)
class Tensor:
    """One tensor under both of its names, and how Meta lays it out."""

    name: str  # Hugging Face's
    meta_name: str
    shape: tuple[int, ...]
    split: int | None  # the axis that Meta splits over shards; None: each shard has it whole
    rotary_heads: int = 0  # of wq and wk, whose rows the two formats order differently

    def nbytes(self, dtype: str) -> int:
        """Its size in bytes."""
        torch_dtype: torch.dtype = getattr(torch, dtype)
        return math.prod(self.shape) * torch_dtype.itemsize


def tensors(shape: Shape) -> Iterator[Tensor]:
    """The tensors of a Llama in the order of its forward pass."""
    hidden, kv_width = shape.hidden, shape.kv_heads * shape.head_dim
    embedding = (shape.vocab, hidden)
    yield Tensor("model.embed_tokens.weight", "tok_embeddings.weight", embedding, 1)
    for i in range(shape.layers):
        for name, meta_name, size, split, rotary_heads in [
            ("input_layernorm", "attention_norm", (hidden,), None, 0),
            ("self_attn.q_proj", "attention.wq", (hidden, hidden), 0, shape.heads),
            ("self_attn.k_proj", "attention.wk", (kv_width, hidden), 0, shape.kv_heads),
            ("self_attn.v_proj", "attention.wv", (kv_width, hidden), 0, 0),
            ("self_attn.o_proj", "attention.wo", (hidden, hidden), 1, 0),
            ("post_attention_layernorm", "ffn_norm", (hidden,), None, 0),
            ("mlp.gate_proj", "feed_forward.w1", (shape.intermediate, hidden), 0, 0),
            ("mlp.down_proj", "feed_forward.w2", (hidden, shape.intermediate), 1, 0),
            ("mlp.up_proj", "feed_forward.w3", (shape.intermediate, hidden), 0, 0),
        ]:
            yield Tensor(
                f"model.layers.{i}.{name}.weight",
                f"layers.{i}.{meta_name}.weight",
                size,
                split,
                rotary_heads,
            )
    yield Tensor("model.norm.weight", "norm.weight", (hidden,), None)
    yield Tensor("lm_head.weight", "output.weight", embedding, 0)


def draw(tensor: Tensor, *, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The tensor's random values, the same for the same name, shape, seed and dtype."""
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(tensor.name.encode()))
    values = torch.randn(tensor.shape, generator=generator).mul_(DEVIATION)
    if len(tensor.shape) == 1:
        values.add_(1)
    return values.to(dtype)


def interleave(rows: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Rows of wq or wk from Hugging Face's rotary order to Meta's.

    Hugging Face has each head's rows as two halves, Meta as pairs of one row of either half.

    Args:
        rows: (heads * head_dim, hidden), half-split.
        heads: how many heads they are.

    Returns:
        (heads * head_dim, hidden), interleaved.
    """
    halves = rows.view(heads, 2, -1, rows.shape[1])  # (heads, 2, head_dim / 2, hidden)
    return halves.transpose(1, 2).reshape(rows.shape)


def raw(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy; numpy has no bfloat16, hence the view."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def write_tokenizer(folder: Path) -> None:
    """Trains a sentencepiece tokenizer on the license's text, as Llama's was; writes its files.

    tokenizer.model is Meta's file, tokenizer.json and tokenizer_config.json are Hugging Face's.
    """
    import sentencepiece
    import transformers

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((ROOT / "LICENSE").read_text().splitlines()),
            model_writer=file,
            model_type="bpe",
            vocab_size=TOKENS,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def write_config(folder: Path, shape: Shape, *, dtype: str) -> None:
    """Writes all of the Hugging Face folder but the weights: config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": DEVIATION,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": NORM_EPS,
        "rope_scaling": None,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": shape.vocab,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 2048}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(folder)


def header(held: Iterable[Tensor], *, dtype: str) -> bytes:
    """What a safetensors file begins with that holds these tensors one after another."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in held:
        begin = end
        end += tensor.nbytes(dtype)
        table[tensor.name] = {
            "dtype": DTYPES[dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text


def write_transformers(folder: Path, shape: Shape, *, dtype: str, seed: int) -> None:
    """Writes the Hugging Face folder: config, tokenizer, one model.safetensors."""
    write_config(folder, shape, dtype=dtype)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header(tensors(shape), dtype=dtype))
        for tensor in tensors(shape):
            file.write(raw(draw(tensor, seed=seed, dtype=torch_dtype)))


def write_meta(folder: Path, shape: Shape, *, dtype: str, seed: int, shards: int) -> None:
    """Writes Meta's folder: params.json, tokenizer.model, consolidated.NN.pth.

    torch.save wants all tensors of a file at once. Each is therefore kept in a scratch file mapped
    into memory, which the system can write out and drop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("consolidated.*.pth"):  # there may be more of them than of the new
        old.unlink()
    torch_dtype: torch.dtype = getattr(torch, dtype)
    params = {
        "dim": shape.hidden,
        **feed_forward_params(shape),
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "n_layers": shape.layers,
        "norm_eps": NORM_EPS,
        "vocab_size": -1,  # as in Llama 1 and 2, whose code asks the tokenizer
    }
    (folder / "params.json").write_text(json.dumps(params) + "\n")
    with tempfile.TemporaryDirectory() as tokenizer:
        write_tokenizer(Path(tokenizer))
        (folder / "tokenizer.model").write_bytes(Path(tokenizer, "tokenizer.model").read_bytes())

    with tempfile.TemporaryDirectory(dir=folder, prefix=".shards-") as scratch:
        files: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
        for tensor in tensors(shape):
            whole = draw(tensor, seed=seed, dtype=torch_dtype)
            if tensor.rotary_heads:
                whole = interleave(whole, heads=tensor.rotary_heads)
            parts = [whole] * shards if tensor.split is None else whole.chunk(shards, tensor.split)
            for number, part in enumerate(parts):
                path = Path(scratch, f"{number:02}-{tensor.meta_name}")
                path.write_bytes(raw(part))
                files[number][tensor.meta_name] = torch.from_file(
                    str(path), shared=True, size=part.numel(), dtype=torch_dtype
                ).view(part.shape)
        for number, contents in enumerate(files):
            torch.save(contents, folder / f"consolidated.{number:02}.pth")
            contents.clear()


def feed_forward_params(shape: Shape) -> dict[str, int | float]:
    """How params.json says intermediate: Meta's code computes it from dim by a formula.

    8/3 dim, times ffn_dim_multiplier if there is one, rounded up to a multiple of multiple_of.
    """
    wanted, plain = shape.intermediate, int(2 * 4 * shape.hidden / 3)
    if -(-plain // 256) * 256 == wanted:
        return {"multiple_of": 256}
    if 0 < plain <= wanted:
        return {"multiple_of": wanted}
    return {"multiple_of": wanted, "ffn_dim_multiplier": wanted / plain}


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --layers, --hidden and so on, with TinyLlama's as default."""
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The shape that the parsed arguments ask for."""
    return Shape(**{name: getattr(arguments, name) for name in vars(Shape())})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the Hugging Face folder to write")
    parser.add_argument("--meta", type=Path, metavar="FOLDER", help="write Meta's twin as well")
    parser.add_argument("--shards", type=int, default=2, help="of Meta's twin (default: 2)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    add_shape_arguments(parser)
    arguments = parser.parse_args()
    shape = shape_of(arguments)
    try:
        shape.check(shards=arguments.shards if arguments.meta else 1)
    except ValueError as error:
        sys.exit(f"checkpoint.py: {error}")
    options = {"dtype": arguments.dtype, "seed": arguments.seed}
    write_transformers(arguments.folder, shape, **options)
    if arguments.meta:
        write_meta(arguments.meta, shape, shards=arguments.shards, **options)


if __name__ == "__main__":
    main()

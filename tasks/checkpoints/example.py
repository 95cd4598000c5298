"""example: the checkout's own tiny Llama checkpoint, as Meta ships them.

Two model-parallel shards, `params.json` and a real sentencepiece `tokenizer.model`: in 7 MB what
Llama 2 70B has in 138 GB. The weights are noise, so a model built from it speaks nonsense;
everything about it that a build looks at is as in the real one: names and their order, bfloat16,
grouped heads, the axes it is split along, `rope.freqs`, `vocab_size: -1`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import pickletools
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    BFloat16 = npt.NDArray[np.uint16]  # NumPy has no bfloat16: the bits

FILES = ("consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model")

SHARDS = 2
VOCABULARY = 512
PARAMS = {
    "dim": 256,
    "multiple_of": 256,
    "n_heads": 8,
    "n_kv_heads": 2,
    "n_layers": 4,
    "norm_eps": 1e-05,
    # As Llama 2 has it: the real number is the rows of output.weight.
    "vocab_size": -1,
}

# Bytes summed to one weight: four make it bell-shaped enough, and the sum small enough to be exact.
_BYTES_PER_WEIGHT = 4


def make(folder: Path) -> None:
    """Write the checkpoint into a folder, unless it is there already.

    The same version of sentencepiece writes the same bytes each time; the weights are the same
    everywhere.

    Args:
        folder: Made, with its parents. Other files in it are left alone.
    """
    if all((folder / name).is_file() for name in FILES):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it and renamed when whole, so that an interrupted run leaves no folder that looks
    # finished.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        fresh = Path(scratch, folder.name)
        fresh.mkdir()
        _write(fresh)
        if folder.exists():  # but some of its files are missing
            for name in FILES:
                os.replace(fresh / name, folder / name)
        else:
            fresh.rename(folder)


def _write(folder: Path) -> None:
    import numpy as np

    shards: list[dict[str, BFloat16]] = [{} for _ in range(SHARDS)]
    for name, whole, axis in _tensors():
        parts = [whole] * SHARDS if axis is None else np.split(whole, SHARDS, axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part
    for rank, shard in enumerate(shards):
        _save(shard, folder / f"consolidated.{rank:02}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    (folder / "tokenizer.model").write_bytes(_tokenizer_model())


def _save(tensors: dict[str, BFloat16], path: Path) -> None:
    """Write a state dict as ``torch.save`` does, without torch."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (
            ("data.pkl", _state_dict(tensors)),
            ("byteorder", b"little"),
            *((f"data/{i}", tensor.tobytes()) for i, tensor in enumerate(tensors.values())),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), data)


def _state_dict(tensors: dict[str, BFloat16]) -> bytes:
    """Return the pickle of a state dict, whose storages are numbered.

    Made of opcodes, since a pickler imports what it names.
    """
    opcodes = [b"\x80\x02}("]  # protocol 2, a dict, and a mark before its items
    for i, (name, tensor) in enumerate(tensors.items()):
        strides = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim))
        opcodes += [
            _plain(name), b"ctorch._utils\n_rebuild_tensor_v2\n(",
            b"(", _plain("storage"), b"ctorch\nBFloat16Storage\n",
            _plain(str(i)), _plain("cpu"), _plain(tensor.size), b"tQ",
            _plain(0), _plain(tensor.shape), _plain(strides), _plain(False),
            b"ccollections\nOrderedDict\n)R", b"tR",
        ]  # fmt: skip
    return b"".join([*opcodes, b"u."])


def _plain(value: object) -> bytes:
    """Return the opcodes of a value that names nothing."""
    return pickletools.optimize(pickle.dumps(value, protocol=2))[2:-1]


def _tensors() -> Iterator[tuple[str, BFloat16, int | None]]:
    """Each tensor of the model in Meta's order: name, whole tensor, the axis it is split along.

    None for an axis: each shard has all of it.
    """
    import numpy as np

    dim, heads = int(PARAMS["dim"]), int(PARAMS["n_heads"])
    head_dim = dim // heads
    kv_dim = int(PARAMS["n_kv_heads"]) * head_dim
    hidden = _hidden(dim, int(PARAMS["multiple_of"]))

    yield "tok_embeddings.weight", _noise("tok_embeddings", VOCABULARY, dim, scale=1.0), 1
    yield "norm.weight", _norm("norm", dim), None
    yield "output.weight", _noise("output", VOCABULARY, dim), 0
    for layer in range(int(PARAMS["n_layers"])):
        for name, rows, columns, axis in (
            ("attention.wq", dim, dim, 0),
            ("attention.wk", kv_dim, dim, 0),
            ("attention.wv", kv_dim, dim, 0),
            ("attention.wo", dim, dim, 1),
            ("feed_forward.w1", hidden, dim, 0),
            ("feed_forward.w2", dim, hidden, 1),
            ("feed_forward.w3", hidden, dim, 0),
        ):
            full = f"layers.{layer}.{name}"
            yield f"{full}.weight", _noise(full, rows, columns), axis
        for name in ("attention_norm", "ffn_norm"):
            full = f"layers.{layer}.{name}"
            yield f"{full}.weight", _norm(full, dim), None
    freqs = [10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    yield "rope.freqs", _bfloat16(np.array(freqs)), None


def _hidden(dim: int, multiple_of: int) -> int:
    """The feed-forward width, as Meta's model code works it out: 2/3 of 4 dim, rounded up."""
    return -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of


def _noise(name: str, rows: int, columns: int, scale: float | None = None) -> BFloat16:
    """Noise (rows, columns), much like a normal distribution's, its deviation scale.

    Where that is None it is 1 / √columns. Made from a hash of the tensor's name, which no version
    of a random generator changes, by sums of integers, which no processor rounds.
    """
    import numpy as np

    stream = hashlib.shake_128(name.encode()).digest(rows * columns * _BYTES_PER_WEIGHT)
    bytes_ = np.frombuffer(stream, np.uint8).reshape(rows, columns, _BYTES_PER_WEIGHT)
    centred = bytes_.sum(axis=-1, dtype=np.int32) - _BYTES_PER_WEIGHT * 255 // 2
    # A byte's variance is (256² - 1) / 12.
    deviation = math.sqrt(_BYTES_PER_WEIGHT * (256**2 - 1) / 12)
    scale = 1 / math.sqrt(columns) if scale is None else scale
    return _bfloat16(centred * (scale / deviation))


def _norm(name: str, dim: int) -> BFloat16:
    """A norm's weights (dim,): near 1, each another, so that one in the wrong place is seen."""
    noise = _noise(name, 1, dim, scale=0.1)[0].astype("uint32") << 16
    return _bfloat16(1 + noise.view("float32").astype("float64"))


def _bfloat16(numbers: npt.NDArray[np.float64]) -> BFloat16:
    """Round to the nearest, ties to even, by way of float32 as torch does."""
    bits = numbers.astype("float32").view("uint32")
    rounded: BFloat16 = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("uint16")
    return rounded


def _tokenizer_model() -> bytes:
    """A sentencepiece model with the settings of Llama's, trained on the text below."""
    import io

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_surface=" ⁇ ",
        num_threads=1,
        minloglevel=2,
    )
    # Llama's runs of spaces have this score, by which they are merged after everything else
    # although they come first. A converter that goes by their ids tokenizes indented text wrong.
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(written.getvalue())
    for piece in model.pieces:
        if piece.type == piece.NORMAL and not piece.piece.strip("▁"):
            piece.score = -1e9
    data: bytes = model.SerializeToString(deterministic=True)
    return data


_TEXT = """\
A model is published as one checkpoint and used in many shapes: in half precision on a large
machine, in four bits on a laptop, in eight where four would cost too much. Each of them is made
from the same weights by a few plain steps, and each step reads what the step before it wrote.
Extract the tensors. Join the parts that were split for training. Cast them to another type.
Quantize what is large, and leave the rest alone. Pack the result into files that a program can
load. Most days only one of these changes. Someone asks for a group size of thirty-two instead
of sixty-four, and all the tensors are read, joined and cast again, though not a single one of
them is different. Make has known since 1976 how to do better: write down what depends on what,
and redo only that which is older than the things it was made from. It compares times. We
compare content, since a file that is written again with the same bytes has not changed, and
nothing that was made from it needs to be. So every tensor is kept under the hash of its bytes,
and every step under the hash of what went in. When the two of them are known, the answer is
known too, and there is no work left to do. The first build takes as long as it must. The second
build should take no time at all.
def build(target, sources, recipe):
    for source in sources:
        build(source)
    if target.exists() and all(source.age() > target.age() for source in sources):
        return "nothing to be done for " + target.name
    with open(target.path, "wb") as file:
        for layer in range(32):
            if layer % 8 == 0:
                print("layer", layer, "of", 32)
            file.write(recipe(layer))
    return target
What is a layer? What is a shard? Who wrote this file, and when, and from what? Ask the manifest.
If one is lost it can be made again; if one is wrong it will not match its name, and that is seen.
Über allen Gipfeln ist Ruh. Ça va très bien, merci! ¿Qué tal? Привет, мир. 你好世界。
1, 2, 4, 8, 16, 32, 64, 128, 256: 0.5 is 50%, and 3.14159 is not quite pi.
"""

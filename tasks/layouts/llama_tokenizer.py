"""llama_tokenizer: Hugging Face tokenizer files from Meta's tokenizer.model.

A Meta checkpoint holds one file, `tokenizer.model`, in one of two formats: a sentencepiece BPE
model (Llama 1, Llama 2, Code Llama) or tiktoken's text of base64 tokens and ranks (Llama 3 to 3.3).
`mlx_lm.load` goes through transformers' `AutoTokenizer`, which wants `tokenizer.json` and
`tokenizer_config.json`. `files` makes both so that a text gets the ids that Meta's own code gives
it, with the beginning-of-text token in front. As everywhere in transformers, a special token that
is spelled out in a text (`<s>`, `<|eot_id|>`) is read as that token.

There is no chat template: a base model and its instruct model ship equal `tokenizer.model` and
`params.json`, so nothing in a checkpoint tells which of the two it is.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cache.errors import printable
from tasks.checkpoints.small_files import check_regular, read_bytes
from tasks.core.errors import CheckpointError
from tasks.layouts import limited
from tasks.layouts.limited import Limits, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["sentencepiece", "tiktoken"]
Release = Literal["3", "3.1"]

LIMITS = Limits(seconds=120, nbytes=8 << 30)
VERSION = 1  # raised when what is made of a tokenizer.model changes
_SPECIAL_COUNT = 256
# How the special tokens that follow the ranks begin, by release, as in transformers'
# convert_llama_weights_to_hf.py (not part of its wheel); the rest is reserved. 3.1 stands for 3.2
# and 3.3 as well.
_SPECIAL_HEAD: Mapping[Release, tuple[str, ...]] = {
    "3": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
    ),
    "3.1": (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ),
}
# Where Meta's own generation stops, base model or not (`stop_tokens` in its tokenizer.py).
_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

_LLAMA_3_RANKS = 128_000

_REPLACE = "replace it by the tokenizer.model that came with the checkpoint"

# The first line of a tiktoken file: base64 of a token, a space, its rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+(\r?\n|\Z)")


class TokenizerError(CheckpointError):
    """A tokenizer.model that cannot be turned into Hugging Face files that tokenize alike."""


def kind(model_file: Path) -> Kind:
    """Tell the format of a tokenizer.model from its first bytes.

    Raises:
        TokenizerError: it is neither a sentencepiece model nor tiktoken's ranks.
    """
    head = _head(model_file)
    if _TIKTOKEN_LINE.match(head):
        return "tiktoken"
    if _begins_as_sentencepiece(head):
        return "sentencepiece"
    raise TokenizerError(
        f"{model_file}: {model_file.stat().st_size} bytes that begin {head[:24]!r} are neither a "
        f"sentencepiece model nor tiktoken's lines of base64 and rank; {_likely_cause(head)}; "
        f"{_REPLACE}"
    )


def is_tiktoken(model_file: Path) -> bool:
    """Tell whether a tokenizer.model holds tiktoken's ranks, as Llama 3's do."""
    return _TIKTOKEN_LINE.match(_head(model_file)) is not None


def release_of(params: Mapping[str, object]) -> Release:
    """Which release's special tokens go with a checkpoint, from its params.json.

    Llama 3 and 3.1 ship the same tokenizer.model and give the ids behind its ranks different
    names; what tells them apart is `use_scaled_rope`, which every release from 3.1 on sets.
    """
    return "3.1" if params.get("use_scaled_rope") else "3"


def token_ids(model_file: Path, *, release: Release = "3.1") -> dict[str, int | list[int]]:
    """`bos_token_id` and `eos_token_id` for config.json, without importing anything.

    For tiktoken `eos_token_id` is a list, Meta's own stop tokens: an instruct model ends its turn
    with `<|eot_id|>`, which is not the tokenizer's `eos_token`.

    Raises:
        TokenizerError: as `files`.
    """
    if kind(model_file) == "sentencepiece":
        return {"bos_token_id": 1, "eos_token_id": 2}
    first = len(_read_ranks(model_file))
    specials = special_tokens(release)
    return {
        "bos_token_id": first + specials.index("<|begin_of_text|>"),
        "eos_token_id": [first + specials.index(token) for token in _STOPS if token in specials],
    }


def special_tokens(release: Release) -> tuple[str, ...]:
    """The 256 special tokens of a Llama 3 release, in the order of their ids."""
    head = _SPECIAL_HEAD[release]
    taken = sum(token.startswith("<|reserved_special_token_") for token in head)
    rest = (f"<|reserved_special_token_{taken + i}|>" for i in range(_SPECIAL_COUNT - len(head)))
    return (*head, *rest)


def make(model_file: Path, *, release: Release) -> dict[str, bytes]:
    """As `files`, in a process of bounded time and room: pieces may be of a kind that takes both.

    Raises:
        TokenizerError: as `files`; or it takes more.
    """
    asked = [str(model_file.absolute()), release]
    made = limited.call("tasks.layouts.llama_tokenizer", {}, LIMITS, asked)
    if isinstance(made, Refused):
        raise TokenizerError(f"{model_file}: no tokenizer can be made of it ({made}); {_REPLACE}")
    if isinstance(made, str):
        raise TokenizerError(made)
    return {name: text.encode("latin-1") for name, text in made.items()}


def _make(_: Path, asked: Any) -> dict[str, str] | str:
    """Return the files' bytes as latin-1, or why there are none."""
    model_file, release = asked
    try:
        made = files(Path(model_file), release=release)
    except TokenizerError as error:
        return str(error)
    return {name: data.decode("latin-1") for name, data in made.items()}


def files(model_file: Path, *, release: Release = "3.1") -> dict[str, bytes]:
    """Make the files that stand beside a built model's config.json, as name → content.

    Equal input gives equal bytes, with equal versions of transformers and tokenizers.

    Args:
        model_file: Meta's tokenizer.model.
        release: Whose special tokens go behind tiktoken's ranks; see `release_of`. Without effect
            on a sentencepiece model, which names its own.

    Raises:
        TokenizerError: the file is damaged, or of a make whose ids transformers would not give.
    """
    # transformers, as it is imported, warns where there is no torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if kind(model_file) == "tiktoken":
        tokenizer = _from_tiktoken(_read_ranks(model_file), special_tokens(release))
        # No tokenizer.model, which nothing needs beside these: tools that find one take it for
        # sentencepiece, and llama.cpp's converter stops at it (ggml-org/llama.cpp#7021). Meta's own
        # Hugging Face repositories keep it out of this folder as well.
        return {
            "tokenizer.json": _dump(tokenizer),
            "tokenizer_config.json": _config(bos="<|begin_of_text|>", eos="<|end_of_text|>"),
        }
    return {
        # Everything about the tokenization; also what mlx-lm picks its streaming detokenizer by.
        "tokenizer.json": _dump(_from_sentencepiece(model_file)),
        # Names the bos and eos tokens, which tokenizer.json cannot, and the class.
        "tokenizer_config.json": _config(bos="<s>", eos="</s>", unk="<unk>"),
        # Not read by transformers beside a tokenizer.json; for the tools that prefer it.
        "tokenizer.model": read_bytes(model_file),
    }


def _from_sentencepiece(model_file: Path) -> Tokenizer:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import normalizers
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(read_bytes(model_file))
    except DecodeError as error:
        raise TokenizerError(
            f"{model_file}: begins as a sentencepiece model but cannot be read as one ({error}); "
            f"it is cut short or damaged; {_REPLACE}"
        ) from error
    _refuse_damaged_pieces(model_file, [piece.piece for piece in proto.pieces])
    _refuse_unlike_llama(model_file, proto)

    vocab = {piece.piece: token for token, piece in enumerate(proto.pieces)}
    # What text can be merged into: not control tokens, nor the 256 bytes, which are what is left.
    scores = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    # Merges in the order of the scores, not of the ids, as transformers 5 orders them when left to
    # convert the file by itself: Llama scores its runs of spaces -1e9, to be merged last, yet
    # numbers them first, and every indented line would come out differently.
    merges = generate_merges({piece: vocab[piece] for piece in scores}, scores)
    llama = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    tokenizer: Tokenizer = llama.backend_tokenizer
    # LlamaTokenizer's own pre-tokenizer leaves the first space away where the text begins with one
    # (" a" would be tokenized as "a"). sentencepiece always adds one; so does this normalizer,
    # which is the one that tokenizer.json of Llama 1 and 2 has. It is why the class in the config
    # is not LlamaTokenizer: that class would put its own pre-tokenizer back.
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def _refuse_damaged_pieces(model_file: Path, pieces: list[str | bytes]) -> None:
    """Refuse pieces that are no text, as protobuf hands on what is no UTF-8, or are there twice."""
    for piece, count in Counter(pieces).items():
        if isinstance(piece, bytes) or count > 1:
            fact = "is no text" if isinstance(piece, bytes) else "is there twice"
            raise TokenizerError(
                f"{model_file}: its piece {printable(repr(piece))} {fact}; {_REPLACE}"
            )


def _refuse_unlike_llama(model_file: Path, proto: Any) -> None:
    """Refuse what Llama's models do not use and the conversion would get wrong without a word."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    unlike = [
        f"{name} is {actual}, Llama's is {expected}"
        for name, actual, expected in (
            ("model_type", trainer.ModelType.Name(trainer.model_type), "BPE"),
            ("byte_fallback", trainer.byte_fallback, True),
            ("treat_whitespace_as_suffix", trainer.treat_whitespace_as_suffix, False),
            (
                "unk, bos and eos",
                [piece.piece for piece in proto.pieces[:3]],
                ["<unk>", "<s>", "</s>"],
            ),
            ("add_dummy_prefix", normalizer.add_dummy_prefix, True),
            ("remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
            ("escape_whitespaces", normalizer.escape_whitespaces, True),
            (
                "normalization",
                "a table" if normalizer.precompiled_charsmap else "identity",
                "identity",
            ),
        )
        if actual != expected
    ]
    unlike += [
        f"piece {token} {piece.piece!r} is {piece.Type.Name(piece.type)}"
        for token, piece in enumerate(proto.pieces)
        if piece.type in (piece.USER_DEFINED, piece.UNUSED)
    ]
    if unlike:
        more = f", and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise TokenizerError(
            f"{model_file}: {'; '.join(unlike[:3])}{more}; transformers would not tokenize as "
            'sentencepiece does; build with layout = "mlx-examples", which keeps tokenizer.model'
        )


def _from_tiktoken(ranks: Mapping[bytes, int], specials: tuple[str, ...]) -> Tokenizer:
    from tokenizers import AddedToken, processors
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    class Converter(TikTokenConverter):  # type: ignore[misc]
        # transformers' own reads the file through another package, tiktoken.
        def extract_vocab_merges_from_model(self, _: object) -> tuple[dict[str, int], list[Any]]:
            vocab = {spell(token): rank for token, rank in ranks.items()}
            return vocab, [(spell(left), spell(right)) for left, right in _merges(ranks)]

    # Its default pattern is Llama 3's.
    tokenizer: Tokenizer = Converter().converted()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in specials]
    )
    bos = specials[0]
    # The converter's own post-processor adds no bos token.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
                special_tokens=[(bos, tokenizer.token_to_id(bos))],
            ),
        ]
    )
    return tokenizer


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, by the rank of what it makes, then by its own."""
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _read_ranks(model_file: Path) -> dict[bytes, int]:
    """Read tiktoken's lines, in the order of the file, as token → rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(model_file).splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise TokenizerError(
                f"{model_file}:{number}: {line[:40]!r} is not a token in base64 and its rank; "
                f"the file is damaged; {_REPLACE}"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(
        bytes([byte]) not in ranks for byte in range(256)
    ):
        raise TokenizerError(
            f"{model_file}: {len(ranks)} tokens, whose ranks are not 0 to {len(ranks) - 1} or "
            f"which lack some of the 256 bytes; lines are missing or double; {_REPLACE}"
        )
    if len(ranks) > _LLAMA_3_RANKS:
        raise TokenizerError(
            f"{model_file}: {len(ranks)} ranks, where Llama 3 has {_LLAMA_3_RANKS}; it is a later "
            "model's, which splits text by another pattern and has other special tokens; build "
            "from the model's Hugging Face folder, which has a tokenizer.json"
        )
    return ranks


def _head(model_file: Path) -> bytes:
    check_regular(model_file)
    with model_file.open("rb") as file:
        return file.read(4096)


def _begins_as_sentencepiece(head: bytes) -> bool:
    """Whether a protobuf ModelProto begins here.

    That is field 1, a piece, and in it field 1, its text, then a score or a type. The first piece
    is `<unk>` and short, so both lengths are a single byte.
    """
    if len(head) < 5 or head[0] != 0x0A or head[2] != 0x0A:
        return False
    end = 4 + head[3]
    return end < 2 + head[1] and len(head) > end and head[end] in (0x15, 0x18)


def _likely_cause(head: bytes) -> str:
    if not head:
        return "a download that did not happen"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, whose file `git lfs pull` fetches"
    if head.lstrip()[:1] == b"<":
        return "a web page saved in its place, as an expired download link gives"
    if head.lstrip()[:1] == b"{":
        return "JSON, such as a tokenizer.json under another name"
    return "another format"


def _config(**tokens: str) -> bytes:
    content: dict[str, object] = {f"{role}_token": token for role, token in tokens.items()}
    # Loads tokenizer.json just as it is, in transformers 4 and 5; and the text as the tokens have
    # it, not with the space before a full stop taken away.
    content |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _dump(tokenizer: Tokenizer) -> bytes:
    return tokenizer.to_str().encode()


if __name__ == "__main__":
    limited.serve(_make)

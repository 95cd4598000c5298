"""mlx_lm: the layout that mlx_lm.convert writes and mlx_lm.load reads."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from msgspec import structs

from cache.digest import digest
from cache.errors import printable
from cache.files.stamp import Stamp
from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint
from tasks.checkpoints.small_files import (
    TEMPLATES_FOLDER,
    check_own,
    check_values,
    damaged,
    matches,
    parse_json,
    read_bytes,
)
from tasks.core.errors import CheckpointError
from tasks.core.spec import Target
from tasks.layouts import architecture, card, leftovers, llama_tokenizer, slow_tokenizer
from tasks.layouts.importing import importing
from tasks.layouts.libraries import LIBRARIES, MLX_LM
from tasks.layouts.llama_names import to_huggingface
from tasks.layouts.model import Model
from tasks.layouts.safetensors_format import SAFETENSORS

weight_format = SAFETENSORS
default_shard_bytes = 5 << 30  # the peer's own limit
loaded = "model*.safetensors"
loading = """\
from mlx_lm import load, generate

model, tokenizer = load("{model}")
print(generate(model, tokenizer, prompt="hello"))
"""
pipeline_tag = "text-generation"
# What a tokenizer may be made of, by transformers' own file names, and code that goes with it.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "*.jsonl", "*vocab*.txt", "tekken.json",
    "*.tiktoken", "tiktoken.model", "sentencepiece*.model", "spiece.model",
    "*.py",
)  # fmt: skip
TORCH_DTYPES = r"bfloat16|half|float|double|bool|float(16|32|64|8_\w+)|u?int\d+|complex\d+"
TEMPLATES = f"{TEMPLATES_FOLDER}/*.jinja"  # of models with several
COPIED = (*TOKENIZER, "generation_config.json")
TOKENIZER_PROGRAMS = ("transformers", "tokenizers", "sentencepiece")  # that make tokenizer.json
# What transformers reads of any tokenizer, if it is there.
READ = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
ENOUGH = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken",
    "tiktoken.model", "sentencepiece*.model", "spiece.model", "tokenizer_config.json",
    "tekken.json",
)  # fmt: skip


def model(
    checkpoint: Checkpoint, memos: Memos, library: str = MLX_LM, more: Sequence[str] = ()
) -> Model:
    """Return the model by Hugging Face's names, as mlx-lm's classes take it, or another library's.

    Args:
        checkpoint: what the model is built from.
        memos: where answers are remembered.
        library: whose classes it is of.
        more: see ``sources``.

    Raises:
        CheckpointError: the library has no class for it, or would take one of the checkpoint's own.
    """
    if code := checkpoint.config.get("model_file"):
        raise CheckpointError(
            f"{checkpoint.folder / checkpoint.config_file} has model_file = {code!r}: code of the "
            "checkpoint's own, which is never run here. Take the original checkpoint, whose "
            "architecture the installed library has, or remove the key if it has this one."
        )
    named = checkpoint
    if checkpoint.names == "meta":
        named = to_huggingface(checkpoint, _token_ids(checkpoint, memos))
    told = named if LIBRARIES[library].PARTS else leftovers.without_parts(named)
    model = architecture.model(told, memos, library)
    if told is not named:
        note = leftovers.of_parts(named, LIBRARIES[library].DISTRIBUTION)
        model = structs.replace(model, told=model.told or told, notes=(*model.notes, note))
    _, notes = card.front_matter(checkpoint.folder, memos)
    notes = (*notes, *_dtype_notes(checkpoint.config, library))
    if checkpoint.names != "meta":
        _check_tokenizer(checkpoint, memos, more)
        _, cause = _fast_tokenizer(checkpoint, memos, more)
        notes = (*notes, *([_slow_note(cause, library)] if cause else []))
        if elsewhere := LIBRARIES[library].TOWERS:
            convert = f"{LIBRARIES[library].PACKAGE}.convert"
            notes = (*notes, *leftovers.of_processors(checkpoint, convert, elsewhere))
    return structs.replace(model, notes=(*model.notes, *notes))


def _dtype_notes(config: Mapping[str, Any], library: str) -> list[str]:
    """Return the note on a dtype in config.json that torch has not."""
    load = f"{LIBRARIES[library].PACKAGE}.load"
    said = {key: config.get(key) for key in ("dtype", "torch_dtype")}
    return [
        f"config.json has {key} = {printable(repr(value))}, which is no dtype: where torch is "
        f'installed, transformers refuses it, and {load} with it. Write one, as "bfloat16"'
        for key, value in said.items()
        if isinstance(value, str) and not re.fullmatch(TORCH_DTYPES, value)
    ]


def default_dtype(checkpoint: Checkpoint, model: Model) -> str | None:
    """Return what mlx_lm.convert casts to by default: the dtype in config.json, if any."""
    config = model.config
    dtype = config.get("torch_dtype")
    if dtype is None and (text := config.get("text_config")):
        dtype = text.get("dtype")
    return dtype if isinstance(dtype, str) else None


def check(target: Target, model: Model) -> None:
    """Every setting is possible in this layout."""


def config(target: Target, model: Model, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return config.json as mlx_lm.convert writes it."""
    config = dict(model.config)
    if quantization is not None:
        config["quantization"] = quantization
    if "quantization" in config:
        config["quantization_config"] = config["quantization"]  # for Hugging Face's model tree
    return dict(sorted(config.items()))


def takes(name: str, more: Sequence[str] = ()) -> bool:
    """Tell whether the layout takes over a checkpoint's small file of that name."""
    return matches(name, (*COPIED, TEMPLATES, *more)) or card.is_document(name)


def sources(checkpoint: Checkpoint, more: Sequence[str] = ()) -> list[Path]:
    """Return the checkpoint's small files that go into the built model, as they are or changed.

    Args:
        checkpoint: what the model is built from.
        more: patterns of files beside those of a tokenizer, which may be there instead of one.

    Raises:
        CheckpointError: it has no tokenizer, or what must not be copied.
    """
    folder = checkpoint.folder
    if checkpoint.names == "meta":
        return [tokenizer_model(folder), *card.source_files(folder)]
    if not any(True for pattern in (*ENOUGH, *more) for _ in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has no tokenizer ({', '.join(ENOUGH[:3])}, …), so that nothing could load "
            "the built model. Fetch it from where the checkpoint came from."
        )
    own = sorted(
        path
        for path in folder.iterdir()
        if matches(path.name, (*COPIED, *more)) and not path.name.startswith("._")  # macOS's
    )
    for path in own:
        check_own(path)
    templates = sorted(p for p in folder.glob(TEMPLATES) if not p.name.startswith("._"))
    for path in templates:
        check_own(path, folder)
    return [*own, *templates, *card.source_files(folder)]


def _check_tokenizer(checkpoint: Checkpoint, memos: Memos, more: Sequence[str]) -> None:
    """Refuse a damaged file of those that transformers reads of any tokenizer.

    Raises:
        CheckpointError: it is none that transformers can read.
    """
    for path in sources(checkpoint, more):
        if path.name not in READ:
            continue
        question = _state(checkpoint, path)
        cause = memos.get("tokenizer_files", question, str)
        if cause is None:
            cause = _unreadable(path)
            memos.put("tokenizer_files", question, cause)
        if cause:
            raise damaged(path, cause)


def _state(checkpoint: Checkpoint, path: Path) -> list[Any]:
    """Return JSON that is another wherever a small file may have other content."""
    if checkpoint.source.available:
        return [str(path), *Stamp.of(path)]
    return [path.name, digest(read_bytes(path))]  # a record's files may lie elsewhere in each run


def _unreadable(path: Path) -> str:
    """Return why transformers cannot read a tokenizer's file; nothing if it can."""
    data = read_bytes(path)
    try:
        if data.startswith(codecs.BOM_UTF8) and path.suffix == ".json":
            return "it begins with a byte order mark (save it as UTF-8 without one)"
        check_values(data)
        if path.name == slow_tokenizer.FAST:  # up to 30 MB; tokenizers is as strict
            msgspec.json.decode(data, type=msgspec.Raw)
        elif path.suffix == ".json" and not isinstance(parse_json(data), dict):
            return "it is no JSON object"
        data.decode()
    except (ValueError, RecursionError) as error:
        return f"it cannot be read ({error})"
    return ""


def tokenizer_model(folder: Path) -> Path:
    """Return Meta's tokenizer file.

    Raises:
        CheckpointError: there is none. Meta ships it beside the folders of its models.
    """
    path = folder / "tokenizer.model"
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing. Meta ships it beside the models' folders: copy it there."
        )
    check_own(path)
    return path


def files(
    checkpoint: Checkpoint,
    memos: Memos,
    shards: Sequence[Sequence[tuple[str, int]]],
    parameters: int | None,
    more: Sequence[str] = (),
) -> dict[str, bytes]:
    """Return the files that the layout has besides config.json and the weights.

    Args:
        checkpoint: what the model is built from.
        memos: where a tokenizer is remembered that had to be made.
        shards: the tensors of each weight file: name and size in bytes.
        parameters: weights of the model, as mlx-lm counts them; None, the index does not say.
        more: see ``sources``.
    """
    names = shard_names(len(shards))
    weight_map = {
        name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard
    }
    metadata = {"total_size": sum(size for shard in shards for _, size in shard)}
    if parameters is not None:
        metadata["total_parameters"] = parameters
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    if checkpoint.names == "meta":
        small = _made_tokenizer(checkpoint, memos)
        copied = card.legal_files(checkpoint.folder)
    else:
        copied = sources(checkpoint, more)
        tokenizer_json, _ = _fast_tokenizer(checkpoint, memos, more)
        small = {slow_tokenizer.FAST: tokenizer_json.encode()} if tokenizer_json else {}
    return {
        **small,
        **{path.relative_to(checkpoint.folder).as_posix(): read_bytes(path) for path in copied},
        "model.safetensors.index.json": json.dumps(index, indent=4).encode(),
    }


def tokenizer_files(checkpoint: Checkpoint, memos: Memos) -> dict[str, bytes]:
    """Return the files of the built model that its tokenizer is made of, but for code."""
    return {
        name: data
        for name, data in sorted(files(checkpoint, memos, [], 0).items())
        if matches(name, TOKENIZER) and not name.endswith(".py")
    }


def _token_ids(checkpoint: Checkpoint, memos: Memos) -> dict[str, Any]:
    path = tokenizer_model(checkpoint.folder)
    release = llama_tokenizer.release_of(checkpoint.config)
    question = [llama_tokenizer.VERSION, *_state(checkpoint, path), release]
    answer = memos.get("token_ids", question, dict[str, int | list[int]])
    if answer is None:
        answer = llama_tokenizer.token_ids(path, release=release)
        memos.put("token_ids", question, answer)
    return dict(answer)


def _made_tokenizer(checkpoint: Checkpoint, memos: Memos) -> dict[str, bytes]:
    """Return Hugging Face's tokenizer files, made once: that takes seconds of imports."""
    path = checkpoint.folder / "tokenizer.model"
    release = llama_tokenizer.release_of(checkpoint.config)
    question = [llama_tokenizer.VERSION, digest(read_bytes(path)), release, _tokenizer_versions()]
    with importing():  # one at a time, and once
        answer = memos.get("tokenizers", question, dict[str, str])
        if answer is None:
            files = llama_tokenizer.make(path, release=release)
            answer = {name: data.decode("latin-1") for name, data in files.items()}
            memos.put("tokenizers", question, answer)
    return {name: text.encode("latin-1") for name, text in answer.items()}


def _fast_tokenizer(
    checkpoint: Checkpoint, memos: Memos, more: Sequence[str] = ()
) -> tuple[str, str]:
    """Return tokenizer.json if it is to be made, or why it cannot be, once for the same files."""
    paths = [path for path in sources(checkpoint, more) if path.parent == checkpoint.folder]
    paths = [path for path in paths if matches(path.name, COPIED) or card.is_document(path.name)]
    there = [path.name for path in paths]
    if slow_tokenizer.FAST in there or not any(matches(name, ENOUGH) for name in there):
        return "", ""
    files = {path.name: read_bytes(path) for path in paths if path.suffix != ".py"}
    files["config.json"] = json.dumps(checkpoint.config).encode()
    digests = {name: digest(data) for name, data in files.items()}
    question = [slow_tokenizer.VERSION, digests, _tokenizer_versions()]
    answer = memos.get("fast_tokenizers", question, tuple[str, str])
    if answer is None:
        answer = slow_tokenizer.make(files)
        memos.put("fast_tokenizers", question, answer)
    return answer


def programs(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the versions of what makes tokenizer.json, where the checkpoint has none."""
    if checkpoint.names != "meta" and (checkpoint.folder / slow_tokenizer.FAST).exists():
        return {}
    return dict(zip(TOKENIZER_PROGRAMS, _tokenizer_versions(), strict=True))


@cache
def _tokenizer_versions() -> list[str]:
    return [version(name) for name in TOKENIZER_PROGRAMS]


def _slow_note(cause: str, library: str) -> str:
    said = printable(" ".join(cause.split()))
    transformers = f"transformers {version('transformers')}"
    if re.match(r"\w+: ", cause):  # an exception, as the library's load will see it
        load = f"{LIBRARIES[library].PACKAGE}.load"
        return f"{load} will refuse its tokenizer, as {transformers} does ({said})"
    return (
        f"no {slow_tokenizer.FAST}, which clients in Swift need: {transformers} makes none of the "
        f"tokenizer's files ({said})"
    )


def shard_names(count: int) -> list[str]:
    """Return the names of ``count`` weight files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

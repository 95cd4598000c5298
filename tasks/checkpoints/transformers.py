"""transformers: Hugging Face folders: config.json with *.safetensors or pytorch_model*.bin."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cache.files.stamp import Stamp
from cache.records.memos import Memos
from tasks.checkpoints.checkpoint import Checkpoint, LogicalTensor
from tasks.checkpoints.small_files import numbered, parse_json, read_json, read_text
from tasks.checkpoints.source import ReadableSource
from tasks.checkpoints.stored import TORCH, Stored
from tasks.core.errors import CheckpointError
from tasks.core.text import some

# The kinds of weight file, the first that is there wins: (all of them, a numbered row, index).
KINDS = (
    ("model*.safetensors", r"model.*-(\d+)-of-(\d+)\.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", r".*-(\d+)-of-(\d+)\.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", r"pytorch_model-(\d+)-of-(\d+)\.bin", "pytorch_model.bin.index.json"),
)
MISTRAL = "consolidated*.safetensors"
PARTS = "*/model*.safetensors"  # of sentence-transformers: what follows the model, in folders
MODULES = "modules.json"  # which says so
WEIGHTS = (*(pattern for pattern, *_ in KINDS), PARTS)
WeightFiles = tuple[list[str], Mapping[str, str], tuple[str, ...]]
HOLDS = "*.safetensors or pytorch_model*.bin with config.json (Hugging Face)"
# Of a model that was saved in a wrapper. Before all names: DataParallel's, Lightning Fabric's.
OUTER = ("module.", "_forward_module.")
# Wherever a module was wrapped: torch's for compiling, sharding and checkpointing.
INNER = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "*adapters.safetensors")
AGAIN = " Fetch it again."
# What mlx-lm reads beside config.json to build a model.
SIDE_FILES = ("generation_config.json", "hf_quant_config.json", "quanto_qmap.json")
ADAPTER = "adapter_config.json"
GGUF = "GGUF files are not read: take the model that they were made from."
SMALL_FILES = ("config.json", *SIDE_FILES, ADAPTER, *{index: None for _, _, index in KINDS})


def fits(source: ReadableSource) -> bool:
    """Tell whether a source looks like one of these."""
    if source.has("config.json") or _adapters(source):
        return not is_mistral(source)
    weights = any(source.names(pattern) for pattern, *_ in KINDS)
    return weights and not source.has("params.json")


def is_mistral(source: ReadableSource) -> bool:
    """Tell whether a source has its weights by Mistral's own names alone."""
    mistral = source.names(MISTRAL)
    return source.has("config.json") and bool(mistral) and mistral == source.names("*.safetensors")


def read(source: ReadableSource, memos: Memos) -> Checkpoint:
    """Read the checkpoint's headers.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    return read_files(source, memos, _weight_files)


def read_files(
    source: ReadableSource, memos: Memos, choose: Callable[[ReadableSource], WeightFiles]
) -> Checkpoint:
    """Read the headers of the weight files that ``choose`` returns.

    With these an index's map from tensors to files, and notes on what is left out.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = source.small_files
    _refuse_adapter(source)
    config = read_json(folder / "config.json", "it names the architecture and its dimensions")
    _refuse_other_json(folder / "generation_config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{folder / 'config.json'} has no model_type, which names the architecture."
        )
    names, weight_map, notes = choose(source)
    tables = source.headers(names, memos)
    if source.has(MODULES):
        tables |= {name: _part(source, name, memos) for name in source.names(PARTS)}
    stored = _stored(folder, (header for _, header in tables.values()), weight_map)
    _drop_tied_head(config, stored)
    if not stored:
        raise CheckpointError(f"{folder}: its weight files hold no tensor. Fetch them again.")
    _check_layers(folder, config, len(stored))
    files = {
        name: read_text(folder / name)
        for name in ("config.json", *SIDE_FILES)
        if (folder / name).exists()
    }
    unwrapped = _unwrapped(stored)
    tensors = {
        unwrapped[name]: LogicalTensor(s.dtype, s.shape, (name,)) for name, s in stored.items()
    }
    stamps = {name: stamp for name, (stamp, _) in tables.items()}
    return Checkpoint(
        source, "huggingface", config, files, stored, tensors, stamps, notes, "config.json"
    )


def _part(source: ReadableSource, name: str, memos: Memos) -> tuple[Stamp, list[Stored]]:
    """Return a part's stamp and tensors, by names that begin with its folder's."""
    ((stamp, tensors),) = source.headers([name], memos).values()
    folder = name.partition("/")[0]
    return stamp, [t._replace(name=f"{folder}.{t.name}", file=name) for t in tensors]


def is_adapter(source: ReadableSource) -> bool:
    """Tell whether a source holds what was trained on top of a model, and no model."""
    adapters = _adapters(source)
    weights = {name for pattern, *_ in KINDS for name in source.names(pattern)}
    described = source.has(ADAPTER) and not source.has("config.json")
    return described or (bool(adapters) and not weights.difference(adapters))


def _refuse_adapter(source: ReadableSource) -> None:
    """Say what an adapter is."""
    if not is_adapter(source):
        return
    adapters, path = _adapters(source), source.small_files / ADAPTER
    settings = read_json(path, "it describes the adapter") if path.exists() else {}
    base = settings.get("base_model_name_or_path") or settings.get("model") or "its base model"
    raise CheckpointError(
        f"{source.location} is a LoRA adapter ({', '.join(adapters) or path.name}) and no model. "
        f"Name {base} as source, and this as adapter: it is then fused with the model."
    )


def _adapters(source: ReadableSource) -> list[str]:
    """Return the files of what was trained on top of a model."""
    return [name for pattern in ADAPTERS for name in source.names(pattern)]


def _refuse_other_json(path: Path) -> None:
    """Refuse a file of JSON that is no object; of what is no JSON, mlx-lm takes no notice."""
    try:
        value = parse_json(read_text(path)) if path.exists() else {}
    except ValueError:
        return
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deep. Fetch it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object. Fetch it again, or remove it.")


def _check_layers(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse a number of layers that no such files can hold, before a model of it is made."""
    for settings in (config, config.get("text_config")):
        layers = settings.get("num_hidden_layers") if isinstance(settings, dict) else None
        if isinstance(layers, int) and layers > tensors:
            raise CheckpointError(
                f"{folder / 'config.json'} says num_hidden_layers = {layers:,}, the weight files "
                f"have {tensors:,} tensors. One of them is of another model."
            )


def _stored(
    folder: Path, headers: Iterable[list[Stored]], weight_map: Mapping[str, str]
) -> dict[str, Stored]:
    """Return the tensors of all files by name; of one in two files, the index's.

    Raises:
        CheckpointError: the index has neither.
    """
    stored: dict[str, Stored] = {}
    for tensor in itertools.chain.from_iterable(headers):
        other = stored.get(tensor.name)
        if other is None or weight_map.get(tensor.name) == tensor.file:
            stored[tensor.name] = tensor
        elif weight_map.get(tensor.name) != other.file:
            raise CheckpointError(
                f"{folder}: {tensor.name} is both in {other.file} and in {tensor.file}. "
                "Move the file that is left from another checkpoint to a folder of its own."
            )
    return stored


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Return each tensor's name without what a wrapper of the model put into it."""
    unwrapped = {name: INNER.sub("", name) for name in names}
    for outer in OUTER:
        if all(name.startswith(outer) for name in unwrapped.values()):
            unwrapped = {name: short.removeprefix(outer) for name, short in unwrapped.items()}
    if len({*unwrapped.values()}) < len(unwrapped):  # of a model and of a wrapped copy of it
        return {name: name for name in unwrapped}
    return unwrapped


def _drop_tied_head(config: dict[str, Any], stored: dict[str, Stored]) -> None:
    """Drop a head that is the embedding by another name: torch.save keeps both, mlx-lm one."""
    head = stored.get("lm_head.weight")
    if head is None or head.offset == TORCH or config.get("tie_word_embeddings") is False:
        return
    place = head[1:]
    if any(tensor[1:] == place for name, tensor in stored.items() if name != head.name):
        del stored[head.name]


def _weight_files(source: ReadableSource) -> WeightFiles:
    """Return the names of the weight files, the index's map, and notes on what is left out."""
    for pattern, row, index in KINDS:
        adapters = _adapters(source)
        names = [name for name in source.names(pattern) if name not in adapters]
        if not names:
            continue
        notes = [f"{name} left out: a LoRA adapter, which adapter = … fuses" for name in adapters]
        weight_map: Mapping[str, str] = {}
        try:
            weight_map = _weight_map(source, index)
        except CheckpointError as error:  # mlx_lm.convert does not look at it
            if not _is_whole(source.location, names, row):
                raise
            what = str(error).removesuffix(AGAIN)
            notes.append(f"{what} It is left aside: no weight file is missing")
        named = {name for name in weight_map.values() if fnmatchcase(name, pattern)}
        if beside := sorted({*weight_map.values()} - named):
            notes.append(f"{', '.join(beside)} left out: {pattern} alone is read")
        if missing := sorted(named.difference(names)):
            if not _is_whole(source.location, names, row):
                raise CheckpointError(
                    f"{source.location}: {missing[0]} is missing ({len(missing)} of the "
                    f"{len(named)} files that {index} names). Fetch the missing files."
                )
            notes.append(f"{index} is not of these files, and left aside: no {missing[0]} is here")
            named, weight_map = set(), {}
        if not named:
            refuse_gaps(source.location, names, row)
            return names, weight_map, tuple(notes)
        series = {_series(name, row) for name in named} - {""}  # an index may name a part of one
        used = [name for name in names if name in named or _series(name, row) in series]
        if extra := [name for name in names if name not in used]:
            notes.append(f"{', '.join(extra)} left out: not in {index}")
        return used, weight_map, tuple(notes)
    kinds = [pattern for pattern, *_ in KINDS]
    below = {path.parent for kind in kinds for path in source.small_files.glob(f"*/{kind}")}
    there = (
        f" Its folder {min(below).name} has some: put them beside config.json."
        if below
        else f" (it has {some(source.names('*'), 5)}). {_mend(source)}"
    )
    none = f"{source.location} has no *.safetensors and no pytorch_model*.bin"
    raise CheckpointError(f"{none}{'.' if below else ''}{there}")


def _mend(source: ReadableSource) -> str:
    if source.names("*.gguf"):
        return GGUF
    return "Fetch the weight files."


def _weight_map(source: ReadableSource, index: str) -> Mapping[str, str]:
    """Return the files that an index says tensors are in; nothing if there is none."""
    if not source.has(index):
        return {}
    path = source.small_files / index
    weight_map = read_json(path, "it lists the shards").get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not all(isinstance(name, str) for name in weight_map.values())
        or not all(Path(name).name == name for name in {*weight_map.values()})
    ):
        raise CheckpointError(f"{path} has no weight_map from tensors to files.{AGAIN}")
    return weight_map


def _series(name: str, row: str) -> str:
    """Return a weight file's name without its number in the row; "" if it has none."""
    match = re.fullmatch(row, name)
    return f"{name[: match.start(1)]}N{name[match.end(1) :]}" if match else ""


def refuse_gaps(location: str, names: Iterable[str], row: str) -> None:
    """Refuse a row of files with a gap; there may be several rows.

    Their names begin otherwise, or their files are so many others: parts of one model that were
    saved each by itself, which mlx_lm.convert reads together.

    Raises:
        CheckpointError: one has a gap.
    """
    rows: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(row, name)
        key = (name[: match.start(1)], match[2]) if match else ("", "")
        rows.setdefault(key, []).append(name)
    for (begin, count), each in rows.items():
        try:
            numbered(location, each, row)
        except CheckpointError as error:
            others = [other for other in rows if other[0] == begin and other[1] != count]
            if not (count and others):
                raise
            raise CheckpointError(
                f"{error} Beside them is a row of {others[0][1]}, and no index says which of them "
                "are the model's. Fetch the index as well, or move the files of another "
                "checkpoint to a folder of their own."
            ) from error


def _is_whole(location: str, names: Iterable[str], row: str) -> bool:
    """Tell whether weight files are all there, by their names alone."""
    names = list(names)
    try:
        return len(names) == 1 or len(numbered(location, names, row)) == len(names)
    except CheckpointError:
        return False
